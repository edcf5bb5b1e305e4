import hashlib
import json
import os
import signal
import stat
import subprocess
import sys

import pyarrow as pa
import pytest

from pixart_data.archives import publish_shard
from pixart_data.commits import PublishedFile, Record, publish, publish_table, read_records, sweep, write_record
from pixart_data.errors import DataError, JobError
from pixart_data.leases import output_lock
from pixart_data.records import FETCHED
from pixart_data.storage import location, make_dir, staging_path, write_atomic


def record(unit="u", files=(), rows_in=3, rows_out=2, rejected=None):
    return Record(unit, "digest", {"a": {"b": 1}}, rows_in, rows_out, rejected or {"zero_bytes": 1}, list(files))


def stage(folder, content, name="u.tar"):
    staged = staging_path(folder, name)
    staged.write_bytes(content)
    return staged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_published_file_is_named_by_its_content(tmp_path):
    file = publish(stage(tmp_path / "0.50", b"content"), tmp_path, tmp_path / "0.50", "u", ".tar")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert file == PublishedFile(f"0.50/u-{sha256[:8]}.tar", 7, sha256)
    assert (tmp_path / file.path).read_bytes() == b"content"
    assert names(tmp_path / "0.50") == [f"u-{sha256[:8]}.tar"]


def test_publishing_the_same_content_twice_is_one_file(tmp_path):
    files = [publish(stage(tmp_path, content), tmp_path, tmp_path, "u", ".tar") for content in (b"a", b"a", b"b")]
    assert files[0] == files[1] != files[2]
    assert names(tmp_path) == sorted({file.path for file in files})


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("step", ["pixart_data.commits.file_sha256", "pixart_data.commits.replace_file"])
def test_an_attempt_that_fails_leaves_no_staged_file(place, step, tmp_path, monkeypatch, request):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    root = tmp_path / "out" if place == "local" else location(f"{request.getfixturevalue('bucket')}/out")

    def fail(*_):
        staged.extend(path for path in tmp_path.rglob(".tmp-*"))
        raise JobError("the disk is full")

    monkeypatch.setattr(step, fail)
    monkeypatch.setattr(step.replace("commits", "archives"), fail)
    table = pa.table({"key": ["a"]})
    row = dict.fromkeys(FETCHED.names) | {"key": "a", "format": "jpg"}
    attempts = {
        1: [
            lambda: publish(stage(root / "a", b"content"), root, root / "a", "u", ".tar"),
            lambda: publish_table(table, root, root / "parts", "u"),
        ],
        2: [lambda: publish_shard(root, "u", [row], lambda _: b"image")],
    }
    for num_staged, whats in attempts.items():
        for what in whats:
            staged = []
            with pytest.raises(JobError, match="the disk is full"):
                what()
            assert len(staged) == num_staged
            assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_published_files_can_be_read_by_others(tmp_path):
    file = publish(stage(tmp_path, b"a"), tmp_path, tmp_path, "u", ".tar")
    write_atomic(tmp_path / "small.json", b"{}")
    for name in (file.path, "small.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


def test_staging_copes_with_the_longest_unit_names(tmp_path):
    paths = {staging_path(tmp_path, "%E4" * 80 + ".parquet") for _ in range(3)}
    assert len(paths) == 3
    assert all(path.name.startswith(".tmp-") and path.name.endswith(".parquet") for path in paths)


def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    for content in (b"old", b"new and longer", b""):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["file.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(JobError, match="cannot write: Input/output error; check the storage"):
        write_atomic(path, b"new")
    assert names(tmp_path) == ["file.json"]
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file.json", b"new")
    assert names(tmp_path) == []


def test_writing_where_a_folder_is_is_a_job_error(tmp_path):
    (tmp_path / "file.json").mkdir()
    with pytest.raises(JobError, match="cannot write"):
        write_atomic(tmp_path / "file.json", b"new")
    assert names(tmp_path) == ["file.json"]


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="a part of the path is a file; choose another output"):
        make_dir(tmp_path / "file" / "folder")


@pytest.mark.parametrize(("rows_out", "rejected"), [(3, {"x": 1}), (2, {}), (1, {"x": 1}), (4, {})])
def test_a_record_accounts_for_every_row(rows_out, rejected):
    with pytest.raises(DataError, match=r"unit u: -?1 of 3 rows unaccounted for"):
        Record("u", "", {}, 3, rows_out, rejected, [])


def test_records_come_back_as_written_in_the_order_of_units(tmp_path):
    written = [record(unit, [PublishedFile(f"{unit}.tar", 5, "ab")]) for unit in ("b", "a-00010", "a-00009", "ä%2F")]
    for one in written:
        write_record(tmp_path, one)
    read = read_records(tmp_path)
    assert list(read.values()) == sorted(written, key=lambda one: one.unit)
    assert list(read) == [one.unit for one in read.values()]


def test_a_record_replaces_the_earlier_one_of_its_unit(tmp_path):
    write_record(tmp_path, record())
    write_record(tmp_path, record(rows_in=9, rows_out=9, rejected={"x": 0}))
    assert [one.rows_in for one in read_records(tmp_path).values()] == [9]


def test_nothing_committed_is_no_record(tmp_path):
    assert read_records(tmp_path) == {}
    assert read_records(tmp_path / "not-there") == {}


def test_a_record_that_is_being_written_is_not_read(tmp_path):
    write_record(tmp_path, record())
    (tmp_path / "commits" / ".tmp-abc.json").write_text('{"unit"')
    assert list(read_records(tmp_path)) == ["u"]


def damage(change):
    def text(tmp_path):
        fields = json.loads((tmp_path / "commits/u.json").read_text())
        change(fields)
        return json.dumps(fields).encode()

    return text


@pytest.mark.parametrize(
    "text",
    [
        lambda _: b"",
        lambda _: b'{"unit": "u", "di',
        lambda _: b"[]",
        lambda _: b"null",
        lambda _: b"\xff\xfe\x00",
        damage(lambda fields: fields.pop("files")),
        damage(lambda fields: fields.update(surplus=1)),
        damage(lambda fields: fields.update(files=["u.tar"])),
        damage(lambda fields: fields.update(rows_out="2")),
        damage(lambda fields: fields.update(rejected=None)),
        damage(lambda fields: fields.update(rows_out=1)),
    ],
    ids=["empty", "half", "list", "null", "binary", "no files", "surplus", "files", "type", "rejected", "sum"],
)
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, text):
    write_record(tmp_path, record())
    (tmp_path / "commits/u.json").write_bytes(text(tmp_path))
    with pytest.raises(DataError, match=r"commits/u\.json: not a commit record .*; delete it to have its unit redone"):
        read_records(tmp_path)


def test_sweep_deletes_only_what_no_record_names(tmp_path):
    kept = publish(stage(tmp_path / "a", b"kept"), tmp_path, tmp_path / "a", "u", ".tar")
    write_record(tmp_path, record(files=[kept]))
    orphan = publish(stage(tmp_path / "a", b"orphan"), tmp_path, tmp_path / "a", "u", ".tar")
    halves = [stage(folder, b"half") for folder in (tmp_path / "a", tmp_path, tmp_path / "commits")]
    bystanders = [
        "a/notes.txt",
        "a/mine.parquet",
        "job.toml",
        "b/u-01234567.tar",
        "u-01234567.tar",
        "a/s/u-01234567.tar",
    ]
    for name in bystanders:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("mine")
    assert sweep(tmp_path, [tmp_path / "a", tmp_path / "not-there"], read_records(tmp_path).values()) == 4
    assert not any(path.exists() for path in (tmp_path / orphan.path, *halves))
    assert (tmp_path / kept.path).read_bytes() == b"kept"
    assert all((tmp_path / name).exists() for name in bystanders)
    assert sweep(tmp_path, [tmp_path / "a"], read_records(tmp_path).values()) == 0


HOLDER = """
import sys, time
from pathlib import Path
from pixart_data.leases import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "out"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_of_another_process_dies_with_it(holder, tmp_path):
    with pytest.raises(JobError, match="out: another run is writing here"), output_lock(tmp_path / "out"):
        pytest.fail("locked twice")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with output_lock(tmp_path / "out"):
        assert (tmp_path / "out/.lease").is_dir()


def test_the_lock_is_let_go_of_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), output_lock(tmp_path):
        raise RuntimeError("mine")
    with output_lock(tmp_path), pytest.raises(JobError, match="another run"), output_lock(tmp_path):
        pass
    with output_lock(tmp_path):
        pass
