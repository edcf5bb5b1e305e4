"""Logs that machines read: every line of stderr one JSON object, whatever happens."""

import json
import subprocess
import sys
from datetime import UTC, datetime

SAY = """
import logging, sys, warnings
from pixart_data.logs import is_json, talk
talk(["pixart_data"], "caption", verbose={verbose}, as_json={as_json})
log = logging.getLogger("pixart_data.tars")
log.info("%s/%d shards", "two\\nlines", 3, extra={{"fields": {{"stage": "caption", "rows": 12, "seconds_left": None}}}})
log.debug("details")
logging.getLogger("elsewhere").info("unheard")
warnings.warn("old")
print(is_json())
{more}
"""


def said(as_json=True, verbose=False, more=""):
    code = SAY.format(as_json=as_json, verbose=verbose, more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done, done.stderr.splitlines()


def test_each_line_is_an_object_with_the_figures_as_keys():
    done, lines = said()
    first, warning = map(json.loads, lines)
    assert done.stdout == "True\n"
    written = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 120
    assert first == {
        "level": "info", "command": "caption", "logger": "pixart_data.tars", "message": "two\nlines/3 shards",
        "stage": "caption", "rows": 12, "seconds_left": None,
    }  # fmt: skip
    assert warning["level"] == "warning"
    assert "old" in warning["message"]


def test_a_bug_is_an_object_too_with_its_traceback():
    done, lines = said(more="raise KeyError('x')")
    last = json.loads(lines[-1])
    assert done.returncode == 1
    assert len(lines) == 3
    assert last["level"] == "critical"
    assert last["message"] == "KeyError: 'x'; this is a bug: please report it"
    assert "Traceback" in last["traceback"]


def test_text_stays_text():
    done, lines = said(as_json=False)
    assert done.stdout == "False\n"
    assert lines[1] == "lines/3 shards"
    assert lines[0].endswith(" two")
    assert not any("details" in line for line in lines)


def test_verbose_says_more():
    _, lines = said(verbose=True)
    assert [json.loads(line)["level"] for line in lines] == ["info", "debug", "warning"]
