"""`pixart fetch` as a user runs it: killed in the middle, run again, and handed to the next stage."""

import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.commits import read_records
from pixart_data.sections import Source
from pixart_data.sources import find_units, read_samples
from pixart_data.verification import verify
from tests.web import Web, after, http, picture

NUM_ROWS = 48
ROWS_PER_UNIT = 4


@pytest.fixture
def web():
    with Web() as web:
        for i in range(NUM_ROWS):
            page = http(404) if i % 12 == 5 else http(200, picture(seed=i))
            web.pages[f"{i}.jpg"] = after(0.15, page)
        yield web


@pytest.fixture
def job(web, tmp_path, job_file):
    rows = [{"url": web.url(f"{i}.jpg", f"127.0.0.{1 + i % 9}"), "caption": f"number {i}"} for i in range(NUM_ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    return job_file(
        "fetch",
        {
            "output": "out/fetched",
            "urls": {"paths": ["list.parquet"], "rows_per_unit": ROWS_PER_UNIT},
            "downloads": {"allow_private_addresses": True, "backoff_s": 0.01, "concurrency": 2},
            "cluster": {"num_workers": 2, "cpus_per_worker": 0.5},
        },
    )


def numbers_of(record):
    first = int(record.unit) * ROWS_PER_UNIT
    return range(first, first + ROWS_PER_UNIT)


def captions_of(output):
    """Return the captions of what the next stage reads, all of it good."""
    source = Source(paths=[str(output)])
    samples = [sample for unit in find_units(source) for sample in read_samples(unit, source)]
    assert not any(sample.error for sample in samples)
    return [sample.caption for sample in samples]


def test_a_killed_fetch_goes_on_where_it_was(web, job, pixart, miniatures, tmp_path):
    output = tmp_path / "out/fetched"
    planned = pixart("fetch", job, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "12 shards, 0 done, 12 to do" in planned.stdout
    assert f"{NUM_ROWS} rows, 0 done, {NUM_ROWS} to do" in planned.stdout
    assert not web.asked

    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "fetch", str(job)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 120
    while len(list((output / "commits").glob("[!.]*.json"))) < 3:
        assert driver.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in (output / "commits").glob("[!.]*.json")}
    finished = {i for record in read_records(output).values() for i in numbers_of(record)}
    assert 3 * ROWS_PER_UNIT <= len(finished) < NUM_ROWS
    with pytest.raises(Exception, match="run `pixart fetch` on it to the end"):
        find_units(Source(paths=[str(output)]))

    done = pixart("fetch", job)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_ROWS} in = {NUM_ROWS - 4} out + 4 rejected (not_found 4)" in done.stdout
    assert f"{len(before)} done" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    asked = {i: web.asked[f"{i}.jpg"] for i in range(NUM_ROWS)}
    assert {asked[i] for i in finished} == {1}
    assert min(asked.values()) == 1

    fetched = captions_of(output)
    assert sorted(fetched) == sorted(f"number {i}" for i in range(NUM_ROWS) if i % 12 != 5)
    named = {output / file.path for record in read_records(output).values() for file in record.files}
    assert {path for folder in ("images", "rows") for path in (output / folder).iterdir()} == named
    assert not any(finding.problem for finding in verify(output))

    total = web.asked.total()
    again = pixart("fetch", job)
    assert again.returncode == 0, again.stderr
    assert web.asked.total() == total

    web.pages |= dict.fromkeys(("5.jpg", "17.jpg"), http(200, picture(seed=99)))
    web.asked.clear()
    retried = pixart("retry", "out/fetched", "--reason", "not_found")
    assert retried.returncode == 0, retried.stderr
    assert f"{NUM_ROWS} in = {NUM_ROWS - 2} out + 2 rejected (not_found 2)" in retried.stdout
    assert {path for path in web.asked if "robots" not in path} == {"5.jpg", "17.jpg", "29.jpg", "41.jpg"}
    assert sorted(captions_of(output)) == sorted([*fetched, "number 5", "number 17"])
    assert not any(finding.problem for finding in verify(output))

    words = ["--set", "output=c", "--set", f"captioner.model={miniatures['llava']}", "--dry-run"]
    caption = pixart("caption", "--set", 'source.paths=["out/fetched"]', *words)
    assert caption.returncode == 0, caption.stderr
    assert f"{NUM_ROWS - 2} rows, 0 done" in caption.stdout
    shown = pixart("inspect", "out/fetched")
    assert shown.returncode == 0, shown.stderr
    assert f"{NUM_ROWS} URLs in 12 units: {NUM_ROWS - 2} images" in shown.stdout
    assert "not_found 2" in shown.stdout
