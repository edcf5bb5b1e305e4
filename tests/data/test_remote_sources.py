import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import events, storage, stores
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, count_rows, find_units, read_samples
from pixart_data.units import Unit
from tests.faults import FaultyProxy


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch, tmp_path):
    """A client remembers its endpoint: none is taken over from the test before. Copies of tars go below scratch."""
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.002)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    forget_clients()
    yield
    forget_clients()


def forget_clients():
    from s3fs import S3FileSystem

    stores._store.cache_clear()
    S3FileSystem.clear_instance_cache()


def upload(folder: Path, bucket: str) -> None:
    from s3fs import S3FileSystem

    store = S3FileSystem(use_listings_cache=False)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def find(*paths: object, **settings: object) -> tuple[Source, list[Unit]]:
    source = Source(paths=[str(path) for path in paths], **settings)
    return source, find_units(source)


def read(*paths: object, **settings: object) -> list[Sample]:
    source, units = find(*paths, **settings)
    samples = []
    for unit in units:
        rows = list(read_samples(unit, source))
        assert count_rows(unit) == len(rows)
        light = list(read_samples(unit, source, with_images=False))
        assert [(row.key, row.caption) for row in light] == [(row.key, row.caption) for row in rows]
        samples += rows
    return samples


def write(path: Path, content: bytes | str = b"image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_tars(folder: Path, num_rows: int = 4, image_bytes: int = 3000) -> Path:
    """Two tars of img2dataset's, the second with a sidecar that names one row more, and one of SA-1B's, cut."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("00000", "00001", "sa_000000"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(num_rows):
                texts = {"txt": f"caption {i}"} if name.startswith("0") else {"json": '{"annotations": []}'}
                for extension, text in {"jpg": chr(97 + i) * image_bytes, **texts}.items():
                    path = write(folder / "member", text)
                    tar.add(path, arcname=f"{i:05d}.{extension}")
    (folder / "member").unlink()
    rows = [{"key": f"{i:05d}", "status": "success", "caption": f"column {i}"} for i in range(num_rows + 1)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00001.parquet")
    cut = folder / "sa_000000.tar"
    cut.write_bytes(cut.read_bytes()[: num_rows * image_bytes // 2])
    return folder


# The same rows, wherever they are


@pytest.mark.parametrize("pattern", ["data/", "*/*", "**/*.tar", "data/sa_000000.tar"])
def test_tars(tmp_path, bucket, pattern):
    write_tars(tmp_path / "top" / "data")
    upload(tmp_path / "top", bucket)
    here, there = read(tmp_path / "top" / pattern), read(f"{bucket}/{pattern}")
    assert there == here
    assert len(here) > 1
    assert {sample.error for sample in here} >= {None, Reason.TRUNCATED_TAR}


def test_a_whole_bucket(tmp_path, bucket):
    upload(write_tars(tmp_path / "top"), bucket)
    assert read(bucket) == read(tmp_path / "top")


def test_a_tar_that_is_large_here_is_one_unit_there(tmp_path, bucket):
    upload(write_tars(tmp_path / "top"), bucket)
    _, slices = find(tmp_path / "top/00000.tar", bytes_per_unit=4096)
    _, units = find(f"{bucket}/00000.tar", bytes_per_unit=4096)
    assert len(slices) > 1
    assert [(unit.id, unit.path) for unit in units] == [("00000", f"{bucket}/00000.tar")]
    assert read(tmp_path / "top/00000.tar", bytes_per_unit=4096) == read(f"{bucket}/00000.tar", bytes_per_unit=4096)


def test_a_tar_of_many_parts(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(stores, "_PART_BYTES", 5000)
    monkeypatch.setattr(stores, "_LEAST_READ_BYTES", 700)
    monkeypatch.setattr(stores, "_MOST_READ_BYTES", 3000)
    upload(write_tars(tmp_path / "top", num_rows=20), bucket)
    assert read(f"{bucket}/*.tar") == read(tmp_path / "top" / "*.tar")


def test_every_part_of_a_copy_is_a_sign_of_life(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(stores, "_PART_BYTES", 5000)
    upload(write(tmp_path / "top/a.tar", bytes(24_000)).parent, bucket)
    before = events.beats()
    with stores.scratch_copy(f"{bucket}/a.tar") as copy:
        assert Path(copy).read_bytes() == bytes(24_000)
    assert events.beats() == before + 5


def test_copies_of_tars_do_not_stay(tmp_path, bucket):
    upload(write_tars(tmp_path / "top"), bucket)
    source, units = find(f"{bucket}/*.tar")

    def copies() -> list[Path]:
        return [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]

    samples = read_samples(units[0], source)
    next(samples)
    assert len(copies()) == 1
    list(samples)
    assert copies() == []
    samples = read_samples(units[1], source)
    next(samples)
    samples.close()
    assert copies() == []


def test_names_below_a_root(tmp_path, bucket):
    for part in ("one", "two"):
        write_tars(tmp_path / "top" / part)
    upload(tmp_path / "top", bucket)
    with pytest.raises(ConfigError, match="both called '00000'; set source.root"):
        find(f"{bucket}/*/*.tar")
    _, units = find(f"{bucket}/*/*.tar", root=bucket)
    assert [unit.id for unit in units][:2] == ["one%2F00000", "one%2F00001"]
    assert read(f"{bucket}/*/*.tar", root=bucket) == read(tmp_path / "top" / "*/*.tar", root=str(tmp_path / "top"))
    with pytest.raises(ConfigError, match="source.root: expected a folder above all sources"):
        find(f"{bucket}/one", root=str(tmp_path))


def test_folders(tmp_path, bucket):
    top = tmp_path / "top" / "pictures"
    for name in ("b.jpg", "a.png", "a.jpg", "deep/er/c.webp", "deep/d.tiff", "._b.jpg", ".h/i.jpg", "empty.jpg"):
        write(top / name, "" if "empty" in name else name)
    write(top / "a.txt", b"\xef\xbb\xbf a \xff cat\n")
    write(top / "b.txt", b"")
    upload(tmp_path / "top", bucket)
    for rows_per_unit in (1, 3, 1000):
        here = read(top, rows_per_unit=rows_per_unit)
        assert read(f"{bucket}/pictures", rows_per_unit=rows_per_unit) == here
    assert [sample.key for sample in here] == [
        f"pictures/{key}" for key in ("a", "a~png", "b", "deep/d", "deep/er/c", "empty")
    ]
    assert [sample.caption for sample in here[:3]] == ["a � cat", "a � cat", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
@pytest.mark.parametrize("rows_per_unit", [2, 1000])
def test_lists(tmp_path, bucket, suffix, rows_per_unit):
    top = tmp_path / "top"
    for name in ("lists/in/a.jpg", "lists/in/b.x.png", "out.jpg", "lists/folder/x"):
        write(top / name, name)
    names = ("in/a.jpg", "in/b.x.png", "in/a.jpg", "gone.jpg", "../out.jpg", "./in/a.jpg", "folder")
    rows = [{"path": name, "caption": f"é {i}"} for i, name in enumerate(names)]
    path = top / "lists" / f"my.list{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    upload(top, bucket)
    here = read(path, rows_per_unit=rows_per_unit)
    there = read(f"{bucket}/lists/my.list{suffix}", rows_per_unit=rows_per_unit)
    facts = [[(row.key, row.data, row.caption, row.error) for row in rows] for rows in (here, there)]
    assert facts[0] == facts[1]
    assert [sample.error for sample in there].count(None) == 5
    assert "my.list" not in there[0].key
    assert f"{bucket}/lists/gone.jpg" in there[3].detail


def test_names_that_no_store_takes(tmp_path, bucket):
    names = [
        "\ud800.jpg",
        "a\0b.jpg",
        "s3://B_U/x.jpg",
        "s3://no-such-bucket-at-all/x.jpg",
        "n" * 1100 + ".jpg",
        "é #?&+%.jpg",
    ]
    write(tmp_path / "top/é #?&+%.jpg")
    write(tmp_path / "top/x.jsonl", "\n".join(json.dumps({"path": name}) for name in names))
    upload(tmp_path / "top", bucket)
    samples = read(f"{bucket}/x.jsonl")
    assert [sample.error for sample in samples] == [Reason.MISSING_FILE] * 5 + [None]


def test_a_local_list_of_urls(tmp_path, bucket):
    write(tmp_path / "top/in/a.jpg", "A")
    upload(tmp_path / "top", bucket)
    rows = [
        f"{bucket}/in/a.jpg",
        f"{bucket}/gone.jpg",
        "https://example.com/x.jpg",
        "top/in/a.jpg",
        "file:///etc/x.jpg",
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps({"path": row}) for row in rows))
    samples = read(path)
    assert [(sample.key, sample.data, sample.error) for sample in samples] == [
        ("x/in/a", b"A", None),
        ("x/gone", None, Reason.MISSING_FILE),
        ("x/https%3A/example%2Ecom/x", None, Reason.BAD_ROW),
        ("x/top/in/a", b"A", None),
        ("x/file%3A/etc/x", None, Reason.BAD_ROW),
    ]
    assert "with `pixart fetch`" in samples[2].detail


def test_any_store_that_fsspec_knows(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    write_tars(tmp_path / "top")
    for path in (tmp_path / "top").iterdir():
        store.pipe_file(f"/data/{path.name}", path.read_bytes())
    assert read("memory://data/*.tar") == read(tmp_path / "top" / "*.tar")
    store.rm("/data", recursive=True)


# Planning


def test_fingerprints_follow_the_content_and_read_none_of_it(tmp_path, bucket, s3_server, monkeypatch):
    upload(write_tars(tmp_path / "top"), bucket)
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_clients()
        first = [unit.fingerprint for unit in find(f"{bucket}/*.tar")[1]]
        assert proxy.counters["requests"] <= 3
        upload(tmp_path / "top", bucket)
        assert [unit.fingerprint for unit in find(f"{bucket}/*.tar")[1]] == first
        assert len(set(first)) == 3
        changed = (tmp_path / "top/00000.tar").read_bytes().replace(b"caption 1", b"caption 7")
        write(tmp_path / "top/00000.tar", changed)
        upload(tmp_path / "top", bucket)
        second = [unit.fingerprint for unit in find(f"{bucket}/*.tar")[1]]
        assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True]
        (tmp_path / "top/00001.parquet").unlink()
        pq.write_table(pa.table({"key": ["00000"], "status": ["success"]}), tmp_path / "top/00001.parquet")
        upload(tmp_path / "top", bucket)
        third = [unit.fingerprint for unit in find(f"{bucket}/*.tar")[1]]
        assert [a == b for a, b in zip(second, third, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent/*.tar", r"source.paths: nothing matches s3://.*/absent/\*.tar; check the path with `aws s3 ls s3://"),
        ("absent.tar", "source.paths: nothing matches s3://.*/absent.tar"),
        ("notes.md", "expected a .tar, a folder of images, or a .jsonl"),
        ("packed.tar.gz", "run `gunzip s3://"),
    ],
)
def test_what_is_not_there(tmp_path, bucket, path, message):
    write(tmp_path / "top/notes.md")
    write(tmp_path / "top/packed.tar.gz")
    upload(tmp_path / "top", bucket)
    with pytest.raises(ConfigError, match=message):
        find(f"{bucket}/{path}")


@pytest.mark.parametrize(
    "path", ["no-such-bucket-at-all/x.tar", "no-such-bucket-at-all/*.tar", "no-such-bucket", "B_U/x"]
)
def test_a_bucket_that_is_not_there(s3_server, path):
    bucket = path.split("/")[0]
    with pytest.raises(ConfigError, match=f"source.paths: there is no bucket s3://{bucket}; check its name, and AWS_"):
        find(f"s3://{path}")


def test_missing_credentials_are_the_settings_fault(tmp_path, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"access refused: Unable to locate credentials; set AWS_ACCESS_KEY_ID"):
        find(f"{bucket}/*.tar")


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from pixart_data.sources import find_units; from pixart_data.sections import Source\n"
        "find_units(Source(paths=['s3://bucket/x.tar']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: s3://bucket: a package is missing" in done.stderr
    assert "pip install 'pixart-toolkit[s3]'" in done.stderr


# Storage that fails


@pytest.fixture
def proxied(s3_server, monkeypatch):
    """The way to the server leads through the proxy, and clients do not try again: the toolkit has to."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)
    options = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(storage._STORE_OPTIONS, "s3", options)
    with FaultyProxy(s3_server, seed=1, slow_s=0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_clients()
        yield proxy


def test_a_store_that_is_busy_breaks_off_and_dawdles(tmp_path, bucket, proxied, monkeypatch):
    monkeypatch.setattr(stores, "_PART_BYTES", 20_000)
    top = write_tars(tmp_path / "top", num_rows=20)
    for i in range(20):
        write(top / f"images/{i:02d}.jpg", f"{i}" * 4000)
    write(top / "x.jsonl", "\n".join(json.dumps({"path": f"images/{i:02d}.jpg"}) for i in range(20)))
    upload(top, bucket)
    here = read(top / "*.tar") + read(top / "images") + read(top / "x.jsonl")
    proxied.error_rate, proxied.reset_rate, proxied.slow_rate = 0.08, 0.06, 0.04
    there = read(f"{bucket}/*.tar") + read(f"{bucket}/images") + read(f"{bucket}/x.jsonl")
    assert {"error_500", "error_503", "reset", "slow"} <= set(proxied.counters)
    assert there == [replace(row, detail=row.detail.replace(str(top), bucket)) for row in here]


@pytest.mark.parametrize("fault", ["error_rate", "reset_rate"])
def test_a_store_that_stays_away_is_an_error_not_a_row(tmp_path, bucket, proxied, fault):
    write(tmp_path / "top/x.jsonl", json.dumps({"path": "a.jpg"}))
    write(tmp_path / "top/a.jpg")
    upload(write_tars(tmp_path / "top"), bucket)
    source, units = find(f"{bucket}/00001.tar", f"{bucket}/x.jsonl")
    setattr(proxied, fault, 1.0)
    for unit in units:
        before = proxied.counters["requests"]
        with pytest.raises(DataError, match=f"{unit.path}: cannot be read: .*; check the storage, then run again"):
            list(read_samples(unit, source))
        assert (
            6 <= proxied.counters["requests"] - before <= 18
        )  # the client's connections have a second try of their own
    with pytest.raises(DataError, match="cannot be listed: .*; check the network and the store"):
        find(f"{bucket}/*.tar")


def test_credentials_that_expire_are_no_verdict_on_images(tmp_path, bucket, monkeypatch):
    write(tmp_path / "top/x.jsonl", json.dumps({"path": "a.jpg"}))
    write(tmp_path / "top/images/a.jpg")
    upload(write_tars(tmp_path / "top"), bucket)
    source, units = find(f"{bucket}/00001.tar", f"{bucket}/x.jsonl", f"{bucket}/images")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    forget_clients()
    for unit in units:
        with pytest.raises(
            DataError, match="cannot be read: Unable to locate cred.*; check the credentials in the env"
        ):
            list(read_samples(unit, source))


def test_a_tar_that_changes_while_it_is_read(tmp_path, bucket, monkeypatch):
    upload(write_tars(tmp_path / "top"), bucket)
    source, (unit,) = find(f"{bucket}/00000.tar")
    real = stores.read_range

    def replace_then_read(url: str, start: int, stop: int) -> bytes:
        shutil.copy(tmp_path / "top/00001.tar", tmp_path / "top/00000.tar")
        write(tmp_path / "top/00000.tar", (tmp_path / "top/00001.tar").read_bytes().replace(b"caption", b"CAPTION"))
        upload(tmp_path / "top", bucket)
        return real(url, start, stop)

    monkeypatch.setattr(stores, "read_range", replace_then_read)
    with pytest.raises(DataError, match="00000.tar: changed while it was read; run the job again"):
        list(read_samples(unit, source))


def test_a_scratch_disk_that_is_full(tmp_path, bucket, monkeypatch):
    upload(write_tars(tmp_path / "top"), bucket)
    source, (unit,) = find(f"{bucket}/00000.tar")

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(JobError, match="expected room for a copy of s3://.*No space left.*set TMPDIR to a folder"):
        list(read_samples(unit, source))


def test_many_images_are_fetched_at_once_in_order(tmp_path, bucket, s3_server, monkeypatch):
    for i in range(40):
        write(tmp_path / f"top/images/{i:02d}.jpg", f"{i}")
    upload(tmp_path / "top", bucket)
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_clients()
        source, (unit,) = find(f"{bucket}/images")
        proxy.slow_rate, proxy.slow_s = 1.0, 0.05
        real, inside, most = stores.read_range, [0], [0]
        lock = threading.Lock()

        def counted(url: str, start: int, stop: int) -> bytes:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            try:
                return real(url, start, stop)
            finally:
                with lock:
                    inside[0] -= 1

        monkeypatch.setattr("pixart_data.units.read_range", counted)
        assert [sample.data for sample in read_samples(unit, source)] == [f"{i}".encode() for i in range(40)]
    assert most[0] > 4
