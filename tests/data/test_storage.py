"""Storage: the same promises on a local disk and on a real S3-compatible server, which now and then fails."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pixart_data import events
from pixart_data.commits import Record, publish, publish_table, read_records, read_table, sweep, write_record
from pixart_data.errors import ConfigError, DataError, JobError, TransientError
from pixart_data.retries import is_transient, retrying
from pixart_data.storage import (
    delete,
    exists,
    list_files,
    local_copy,
    location,
    read_bytes,
    read_many,
    replace_file,
    require_local,
    staging_path,
    write_atomic,
    write_new,
)
from pixart_data.uploads import abort_uploads
from tests.faults import FaultyProxy


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return tmp_path / "out"
    return location(f"{request.getfixturevalue('bucket')}/out")


def record(unit="u", files=()):
    return Record(unit, "digest", {"a": 1}, 3, 2, {"zero_bytes": 1}, list(files))


def stage(root, folder, content):
    staged = staging_path(root / folder, "u.tar")
    staged.write_bytes(content)
    return staged


def test_what_is_written_is_read_replaced_listed_and_deleted(root):
    write_atomic(root / "a/one.json", b"1")
    write_atomic(root / "a/one.json", b"one")
    write_atomic(root / "a/b/two.json", b"two")
    assert read_bytes(root / "a/one.json") == b"one"
    assert read_many([root / "a/one.json", root / "a/b/two.json"]) == [b"one", b"two"]
    assert [path.name for path in list_files(root / "a")] == ["one.json"]
    assert list_files(root / "nowhere") == []
    assert exists(root / "a/one.json")
    assert delete([root / "a/one.json", root / "a/never.json"]) == 1 or "://" in str(root)
    assert not exists(root / "a/one.json")
    with pytest.raises(FileNotFoundError):
        read_bytes(root / "a/one.json")


def test_only_one_of_many_writers_makes_a_new_file(root):
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda i: write_new(root / "x/lease", b"%d" % i), range(16)))
    assert won.count(True) == 1
    assert read_bytes(root / "x/lease") == b"%d" % won.index(True)
    assert [path.name for path in list_files(root / "x")] == ["lease"]


@pytest.mark.parametrize("write", [write_atomic, write_new])
def test_a_temporary_file_that_another_run_sweeps_away_is_written_again(tmp_path, monkeypatch, write):
    swept = []

    def sweep_first(path, mode):  # between the writing and the renaming
        if not swept:
            swept.append(path)
            os.unlink(path)

    monkeypatch.setattr(os, "chmod", sweep_first)
    write(tmp_path / "file", b"content")
    assert swept
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_published_file_is_whole_and_found_by_its_record(root):
    content = os.urandom(3_000_000)
    file = publish(stage(root, "0.50", content), root, root / "0.50", "u", ".tar")
    assert file.size_bytes == 3_000_000
    with local_copy(root / file.path) as copy:
        assert copy.read_bytes() == content
    if "://" in str(root):
        assert not copy.exists()
    write_record(root, record(files=[file]), replaces=False)
    assert read_records(root) == {"u": record(files=[file])}


def test_a_record_is_committed_by_one_run_only(root):
    write_record(root, record(), replaces=False)
    write_record(root, record(), replaces=False)  # the same again: an answer that was lost on the way
    other = Record("u", "other", {}, 1, 1, {}, [])
    with pytest.raises(JobError, match=r"u\.json: another run has committed this unit; let one run at a time"):
        write_record(root, other, replaces=False)
    assert read_records(root)["u"].digest == "digest"
    write_record(root, other)
    assert read_records(root)["u"].digest == "other"


def test_tables_come_back_from_any_storage(root):
    import pyarrow as pa

    file = publish_table(pa.table({"key": ["a", "b"]}), root, root / "parts", "u")
    assert read_table(root / file.path, columns=["key"])["key"].to_pylist() == ["a", "b"]


def test_sweep_deletes_what_no_record_names(root):
    kept = publish(stage(root, "a", b"kept"), root, root / "a", "u", ".tar")
    write_record(root, record(files=[kept]))
    publish(stage(root, "a", b"orphan"), root, root / "a", "u", ".tar")
    write_atomic(root / "a/notes.txt", b"mine")
    assert sweep(root, [root / "a", root / "nowhere"], read_records(root).values()) == 1
    assert sorted(path.name for path in list_files(root / "a")) == sorted(["notes.txt", kept.path.split("/")[1]])


def begin_uploads(bucket, *keys):
    for key in keys:
        location(bucket).fs.call_s3("create_multipart_upload", Bucket=bucket.removeprefix("s3://"), Key=key)


def uploads(bucket):
    found = location(bucket).fs.list_multipart_uploads(bucket.removeprefix("s3://"))
    return sorted(upload["Key"] for upload in found)


def test_sweep_aborts_uploads_that_were_killed_where_this_run_writes(bucket):
    root = location(f"{bucket}/out")
    others = ["elsewhere/u.tar", "out/a/b/u.tar", "out/features/commits/u.json", "out/features/u.tar", "outer/u.tar"]
    begin_uploads(bucket, "out/a/u.tar", "out/commits/u.json", "out/manifest.json", *others)
    assert sweep(root, iter([root / "a"]), read_records(root).values()) == 3
    assert uploads(bucket) == others


def test_sweep_aborts_uploads_at_the_root_of_a_bucket(bucket):
    root = location(bucket)
    begin_uploads(bucket, "a/u.tar", "manifest.json", "other/u.tar")
    assert sweep(root, [root / "a"], []) == 2
    assert uploads(bucket) == ["other/u.tar"]


class PagedStore:
    """Uploads in pages of two, as S3 gives them in pages of a thousand; it may refuse."""

    def __init__(self, keys, refusals=()):
        self.keys, self.refusals, self.aborted = keys, dict(refusals), []

    def list_multipart_uploads(self, bucket):
        raise AssertionError("one page only")

    def call_s3(self, method, Bucket, Prefix="", KeyMarker="", UploadIdMarker="", Key="", UploadId=""):  # noqa: N803
        if method in self.refusals:
            raise self.refusals[method]
        assert Bucket == "bucket"
        if method == "abort_multipart_upload":
            assert UploadId == f"id-{Key}"
            return self.aborted.append(Key)
        assert UploadIdMarker == (f"id-{KeyMarker}" if KeyMarker else "")
        left = [key for key in self.keys if key.startswith(Prefix) and key > KeyMarker]
        page = {"Uploads": [{"Key": key, "UploadId": f"id-{key}"} for key in left[:2]], "IsTruncated": len(left) > 2}
        return page | ({"NextKeyMarker": left[1], "NextUploadIdMarker": f"id-{left[1]}"} if len(left) > 2 else {})


class PagedPlace:
    def __init__(self, fs, path):
        self.fs, self.path = fs, path

    def __str__(self):
        return f"s3://{self.path}"


def test_uploads_are_looked_for_on_every_page():
    mine = [f"out/{i}" for i in range(7)]
    store = PagedStore(["a", *mine, "z"])
    root = PagedPlace(store, "bucket/out")
    assert abort_uploads(root, [root]) == 7
    assert store.aborted == mine


@pytest.mark.parametrize("method", ["list_multipart_uploads", "abort_multipart_upload"])
@pytest.mark.parametrize(
    "refusal", [PermissionError("Access Denied"), OSError(errno.ENOSYS, "Not implemented"), NotImplementedError("no")]
)
def test_uploads_that_may_not_be_aborted_are_told_of_in_one_line(method, refusal, caplog):
    root = PagedPlace(PagedStore(["out/0", "out/1"], {method: refusal}), "bucket/out")
    assert abort_uploads(root, [root]) == 0
    [line] = caplog.messages
    assert line.startswith("s3://bucket/out: uploads that were cut off are not looked for or not aborted: ")
    assert str(refusal) in line


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path, monkeypatch):
    (tmp_path / "commits").mkdir()
    (tmp_path / "file").touch()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(JobError, match="commits: cannot read: permission denied"):
            read_records(tmp_path)
    assert list_files(tmp_path / "file") == []
    assert list_files(tmp_path / "nowhere") == []


def test_a_listing_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.002)
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    (tmp_path / "folder").mkdir()
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    scandir = os.scandir

    def fail_first(path):
        if failures:
            raise failures.pop()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_first)
    assert list_files(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert not failures


def test_without_hard_links_a_failed_copy_leaves_nothing(tmp_path, monkeypatch):
    def no_links(name, path):
        raise OSError(errno.EPERM, "Operation not permitted")

    def fill_disk(source, target):
        target.write(b"cont")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", fill_disk)
        with pytest.raises(JobError, match="the disk is full"):
            write_new(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []
    assert write_new(tmp_path / "file", b"content")
    assert not write_new(tmp_path / "file", b"another")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


@pytest.fixture
def faulty(bucket, s3_server, monkeypatch):
    """A place on the S3 server that can be reached through a proxy that fails a third of all requests."""
    with FaultyProxy(s3_server, seed=7, error_rate=0.2, slow_rate=0.05, reset_rate=0.1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield location(f"{bucket}/out"), proxy
    s3fs.S3FileSystem.clear_instance_cache()


def test_failures_that_pass_are_waited_out(faulty):
    root, proxy = faulty
    contents = {f"f{i:02d}": os.urandom(2000 + i) for i in range(10)}
    before = events.counts().get("storage_retry", 0)
    for name, content in contents.items():
        replace_file(stage(root, "a", content), root / "a" / name)
        write_atomic(root / "b" / name, content)
        assert write_new(root / "c" / name, content)
        assert not write_new(root / "c" / name, b"another")
    for folder in "abc":
        assert [path.name for path in list_files(root / folder)] == list(contents)
        assert read_many(list_files(root / folder)) == list(contents.values())
        assert all(exists(root / folder / name) and not exists(root / folder / f"no-{name}") for name in contents)
    assert proxy.num_faults > 10
    assert events.counts().get("storage_retry", 0) > before


def test_a_store_that_stays_away_is_a_transient_error(bucket, s3_server, monkeypatch):
    import s3fs

    monkeypatch.setattr("pixart_data.retries._ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(TransientError, match="cannot write: .*; check the storage, then run again"):
        write_atomic(location(f"{bucket}/out") / "a", b"a")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there_is_said_to_be(s3_server):
    with pytest.raises(JobError, match="s3://never-made-bucket/out/a: cannot write: there is no such place"):
        write_atomic(location("s3://never-made-bucket/out") / "a", b"a")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY])
def test_a_mount_that_fails_for_a_while_is_waited_out(tmp_path, monkeypatch, number):
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.001)
    replace, failures = os.replace, [number, number]

    def sometimes(*names):
        if failures:
            raise OSError(failures.pop(), "later")
        replace(*names)

    monkeypatch.setattr(os, "replace", sometimes)
    write_atomic(tmp_path / "a", b"a")
    assert (tmp_path / "a").read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_does_not_pass_is_not_waited_for(number):
    calls = []

    def fail():
        calls.append(1)
        raise OSError(number, "no")

    with pytest.raises(JobError) as caught:
        retrying(fail, "/out")
    assert len(calls) == 1
    assert not isinstance(caught.value, TransientError)


def test_what_passes_is_told_from_what_does_not():
    assert is_transient(ConnectionResetError())
    assert is_transient(TimeoutError())
    assert not is_transient(FileNotFoundError())
    assert not is_transient(PermissionError())
    assert not is_transient(ValueError())


def test_staged_files_of_a_killed_process_are_deleted_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = "import os\nfrom pixart_data import storage\nstorage.scratch_file('a').write_text('half')\nos._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.rglob(".tmp-*"))) == 1
    code = "from pixart_data import storage\nprint(storage.scratch_file('b'))"
    mine = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert [str(path) for path in tmp_path.rglob(".tmp-*")] == [mine]


def test_unknown_places_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="nowhere://x/y: no storage is known by this name"):
        location("nowhere://x/y")


def test_training_reads_local_disks(s3_server):
    with pytest.raises(DataError, match="copy it to a local disk first"):
        require_local(location("s3://bucket/set"), "training reads local disks and mounts only")
