"""Kill -9 of the driver in the middle: nothing lost, nothing twice, finished shards not redone."""

import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_data.commits import read_records
from pixart_data.verification import verify

NUM_PICTURES = 48


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "many"
    folder.mkdir()
    for i in range(NUM_PICTURES):
        picture = Image.new("RGB", (64 + 8 * (i % 5), 64), (5 * i, 255 - 5 * i, 90))
        picture.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder


def kill_after(words, commits, count, cwd):
    """Start the command, kill its driver once `count` records exist, and return the records' times."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        cwd=cwd,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 120
    while len(list(commits.glob("[!.]*.json"))) < count:
        assert driver.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    return {path: path.stat().st_mtime_ns for path in commits.glob("[!.]*.json")}


def untouched(before):
    return {path: path.stat().st_mtime_ns for path in before} == before


def leftovers(root):
    named = {root / file.path for record in read_records(root).values() for file in record.files}
    known = {"job.toml", "status.json", "summary.html", "manifest.json"}
    known |= {"index.parquet", "entries.bin", "rejected.parquet"}
    files = {path for path in root.rglob("*") if path.is_file() and path.parent.name not in ("commits", ".lease")}
    return {path for path in files - named if path.name not in known}


def test_a_killed_caption_job_goes_on(many, miniatures, pixart, job_file, tmp_path):
    output = tmp_path / "captions"
    job = job_file(
        "caption",
        {
            "output": str(output),
            "source": {"paths": [str(many)], "rows_per_unit": 2},
            "captioner": {"model": miniatures["llava"], "max_new_tokens": 16},
        },
    )
    before = kill_after(["caption", job], output / "commits", 4, tmp_path)
    assert 4 <= len(before) < NUM_PICTURES / 2
    done = pixart("caption", job)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_PICTURES} in = {NUM_PICTURES} out + 0 rejected" in done.stdout
    assert f"{len(before)} done" in done.stderr
    assert untouched(before)
    files = [output / file.path for record in read_records(output).values() for file in record.files]
    keys = [key for file in files for key in pq.read_table(file)["key"].to_pylist()]
    assert sorted(keys) == [f"many/{i:03d}" for i in range(NUM_PICTURES)]
    assert not leftovers(output)
    assert not any(finding.problem for finding in verify(output))


def test_a_killed_extract_job_goes_on(many, miniatures, pixart, job_file, tmp_path):
    output = tmp_path / "features"
    job = job_file(
        "extract",
        {
            "output": str(output),
            "source": {"paths": [str(many)], "rows_per_unit": 2},
            "image": {"model": miniatures["vae"]},
            "text": {"model": miniatures["t5"]},
        },
    )
    images = kill_after(["extract", job], output / "256px/commits", 4, tmp_path)
    texts = kill_after(["extract", job], output / "text/commits", 4, tmp_path)
    assert not (output / "text/manifest.json").exists()
    done = pixart("extract", job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{NUM_PICTURES} in = {NUM_PICTURES} out + 0 rejected") == 2
    assert untouched(images)
    assert untouched(texts)
    for name in ("256px", "text"):
        keys = pq.read_table(output / name / "index.parquet")["key"].to_pylist()
        assert sorted(keys) == [f"many/{i:03d}" for i in range(NUM_PICTURES)]
        assert not leftovers(output / name)
    assert not any(finding.problem for finding in verify(output))
