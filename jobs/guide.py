"""The made parts of the guide of clusters: `python -m jobs.guide` renders them anew in docs/cluster.md.

A made part stands between `<!-- made by: COMMAND -->` and `<!-- end -->`; the command is one that a reader can type.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

from jobs import budget, cli

GUIDE = Path(__file__).parent.parent / "docs" / "cluster.md"
_PART = re.compile(r"(<!-- made by: (.*?) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def renewed(text: str) -> str:
    """Return a page with its made parts rendered anew.

    Raises:
        ValueError: If a part's command fails or is none of ours.
    """
    return _PART.sub(lambda part: f"{part[1]}{_made(part[2])}{part[4]}", text)


def commands(text: str) -> list[str]:
    """Return the commands of the made parts of a page."""
    return [part[2] for part in _PART.finditer(text)]


def _made(command: str) -> str:
    words = shlex.split(command)
    if words == ["python", "-m", "jobs.budget"]:
        return budget.Budget().table()
    if words[:2] != ["pixart", "submit"]:
        raise ValueError(f"{command}: expected pixart submit ... or python -m jobs.budget")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(words[1:])
    if code:
        raise ValueError(f"{command}: exited with {code}")
    return f"```{'bash' if out.getvalue().startswith('#!') else 'yaml'}\n{out.getvalue()}```\n"


if __name__ == "__main__":
    GUIDE.write_text(renewed(GUIDE.read_text()))
