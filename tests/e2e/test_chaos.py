"""The short cut of chaos: a few kills on each kind of storage; `make chaos` does many. See tests/chaos.py."""

import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import chaos
from tests.conftest import ROOT

LIMIT_S = 240


def run_chaos(*words):
    """Run it in a process of its own, which adopts and ends all that it starts; also when it takes too long."""
    command = [sys.executable, "-m", "tests.chaos", "--units", "24", "--rows-per-unit", "3", "--nodes", "2", *words]
    process = subprocess.Popen(
        [*command, "--limit-s", str(LIMIT_S)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S + 20)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    assert process.returncode == 0, err[-6000:]
    return {line[:24].strip(): line[24:] for line in out.splitlines()}, err


@pytest.mark.parametrize(
    ("storage", "seed", "struck"),
    [("local", 194, ["worker", "term", "raylet", "driver"]), ("s3", 27, ["driver", "rival", "worker"])],
)
def test_what_is_killed_at_random_ends_as_if_nothing_had_been(storage, seed, struck):
    num_kills = len([kind for kind in struck if kind not in chaos.GENTLE])
    table, log = run_chaos("--storage", storage, "--seed", str(seed), "--kills", str(num_kills))
    assert table["kills"] == f"{num_kills}: " + ", ".join(f"{kind} 1" for kind in sorted(struck)), log
    assert int(table["rounds, all identical"]) >= 1
    assert (table["faults injected"] != "none") == (storage == "s3")


@pytest.fixture
def output(tmp_path):
    for name in chaos.SETS:
        folder = tmp_path / "output" / name
        (folder / "commits").mkdir(parents=True)
        (folder / "commits/a.json").write_text("{}")
        (folder / "status.json").write_text("a time of day")
        pq.write_table(pa.table({"key": ["a", "b", "c"]}), folder / "index.parquet")
        pq.write_table(pa.table({"key": ["d"]}), folder / "rejected.parquet")
    return tmp_path / "output"


def test_every_byte_and_every_file_counts(output):
    expected = chaos.contents(output)
    assert len(expected) == 6
    assert chaos.differences(expected, chaos.contents(output)) == []
    (output / "text/status.json").write_text("another time of day")
    (output / "text/.lease").mkdir()
    (output / "text/.lease/000007.json").write_text("of the last run")
    assert chaos.differences(expected, chaos.contents(output)) == []
    (output / "text/.lease/.tmp-1").touch()
    (output / "text/commits/a.json").write_text("{} ")
    (output / "256px/.tmp-2").touch()
    (output / "256px/index.parquet").unlink()
    assert chaos.differences(expected, chaos.contents(output)) == [
        "missing: 256px/index.parquet",
        "left over: 256px/.tmp-2",
        "left over: text/.lease/.tmp-1",
        "differs: text/commits/a.json",
    ]


def test_rows_that_are_lost_or_there_twice_are_found(output):
    printed = "extract 256px: 4 in = 3 out + 1 rejected (truncated_image 1)\nextract text: 4 in = 3 out + 1 rejected\n"
    assert chaos.accounts(output, printed, 4) == []
    assert len(chaos.accounts(output, printed, 5)) == 2
    assert len(chaos.accounts(output, printed.replace("text: 4", "text: 5"), 4)) == 1
    assert len(chaos.accounts(output, "", 4)) == 2
    pq.write_table(pa.table({"key": ["a", "b", "b"]}), output / "text/index.parquet")
    assert len(chaos.accounts(output, printed, 4)) == 1


def test_a_record_that_is_written_twice_is_found(output, tmp_path):
    storage = chaos.LocalStorage(tmp_path)
    before = storage.commits("output")
    assert len(before) == 2
    assert storage.commits("output") == before
    path = output / "text/commits/a.json"
    os.utime(path, ns=(1, 1))
    assert storage.commits("output") != before
