import errno
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import retries
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import count_rows, find_units, read_samples
from pixart_data.units import encode_path

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"


def source(*paths: object, **settings: object) -> Source:
    return Source(paths=[str(path) for path in paths], **settings)


def units_of(*paths: object, **settings: object) -> list:
    return find_units(source(*paths, **settings))


def read(*paths: object, **settings: object) -> list:
    job = source(*paths, **settings)
    samples = []
    for unit in find_units(job):
        rows = list(read_samples(unit, job))
        assert count_rows(unit) == len(rows)
        light = list(read_samples(unit, job, with_images=False))
        assert [(row.key, row.caption) for row in light] == [(row.key, row.caption) for row in rows]
        assert all(row.data is None for row in light)
        samples += rows
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_/%~-]+", key) and "//" not in key and key[0] != "/" for key in keys)
    return samples


def write(path: Path, content: bytes | str = b"image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name in names:
            file.add(write(path.parent / "member"), arcname=name)
    (path.parent / "member").unlink(missing_ok=True)
    return path


# Finding


def test_globs_expand_in_order_and_once(tmp_path):
    for name in ("b", "a", "c"):
        tar(tmp_path / f"{name}.tar", "x.jpg")
    units = units_of(tmp_path / "*.tar", tmp_path / "a.tar", tmp_path)
    assert [(unit.id, unit.name, unit.kind) for unit in units] == [(n, n, "tar") for n in "abc"]
    assert units[0].path == str(tmp_path / "a.tar")
    assert (units[0].start, units[0].stop, units[0].num_rows) == (0, -1, 0)
    assert pickle.loads(pickle.dumps(units)) == units
    assert units_of(tmp_path / "c.tar", tmp_path / "b.tar") == [units[2], units[1]]


def test_brackets_in_a_real_name_are_no_pattern(tmp_path):
    tar(tmp_path / "x[1].tar", "a.jpg")
    assert [unit.id for unit in units_of(tmp_path / "x[1].tar")] == ["x%5B1%5D"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent*.tar", "source.paths: nothing matches .*absent.*; check"),
        ("notes.txt", "expected a .tar, a folder of images, or a .jsonl, .json or .parquet list, got .*notes.txt"),
        ("a.jpg", "name the folder"),
        ("sa.tar.gz", "run `gunzip .*sa.tar.gz`"),
        ("sa.tar.zst", "unzstd"),
        ("sa.tgz", "gunzip"),
        ("empty", "expected images or .tar files in .*empty, found none"),
        ("packed", "gunzip"),
    ],
)
def test_paths_of_no_known_kind(tmp_path, name, message):
    for file in ("notes.txt", "a.jpg", "sa.tar.gz", "sa.tar.zst", "sa.tgz", "packed/x.tar.gz", "empty/x.txt"):
        write(tmp_path / file)
    with pytest.raises(ConfigError, match=message):
        units_of(tmp_path / name)


def test_storage_that_has_no_package_is_named():
    with pytest.raises(ConfigError, match="nowhere://bucket/?: no storage is known by this name"):
        units_of("nowhere://bucket/x.tar")


def test_equal_names_need_a_root(tmp_path):
    for part in ("one", "two"):
        tar(tmp_path / part / "00000.tar", "a.jpg")
    with pytest.raises(ConfigError, match=r"one/00000.tar and .*two/00000.tar .*; set source.root"):
        units_of(tmp_path / "*" / "*.tar")
    units = units_of(tmp_path / "*" / "*.tar", root=str(tmp_path))
    assert [unit.id for unit in units] == ["one%2F00000", "two%2F00000"]
    samples = read(tmp_path / "*" / "*.tar", root=str(tmp_path))
    assert [sample.key for sample in samples] == ["one%2F00000/a", "two%2F00000/a"]
    with pytest.raises(ConfigError, match="source.root: expected a folder above all sources"):
        units_of(tmp_path / "one" / "*.tar", root=str(tmp_path / "two"))


def test_a_tar_and_a_folder_of_one_name_clash(tmp_path):
    tar(tmp_path / "x.tar", "a.jpg")
    write(tmp_path / "x" / "a.jpg")
    with pytest.raises(ConfigError, match="both called 'x'"):
        units_of(tmp_path / "x.tar", tmp_path / "x")
    tar(tmp_path / "x-00000.tar", "a.jpg")
    with pytest.raises(ConfigError, match="both called 'x-00000'"):
        units_of(tmp_path / "x-00000.tar", tmp_path / "x")


def test_layouts_are_checked(tmp_path):
    tar(tmp_path / "mixed" / "x.tar", "a.jpg")
    write(tmp_path / "mixed" / "b.jpg")
    assert [unit.kind for unit in units_of(tmp_path / "mixed")] == ["tar"]
    assert [unit.kind for unit in units_of(tmp_path / "mixed", layout="sa1b")] == ["tar"]
    assert [unit.kind for unit in units_of(tmp_path / "mixed", layout="folder")] == ["folder"]
    with pytest.raises(ConfigError, match="source.layout: 'list' expects .*lists, found .*x.tar, a tar"):
        units_of(tmp_path / "mixed" / "x.tar", layout="list")
    with pytest.raises(ConfigError, match="source.layout: 'sa1b' expects tars, found .*, a folder"):
        units_of(write(tmp_path / "images" / "a.jpg").parent, layout="sa1b")


def test_sidecars_are_no_lists(tmp_path):
    tar(tmp_path / "00000.tar", "a.jpg")
    write(tmp_path / "00000.parquet", b"PAR1")
    write(tmp_path / "00000_stats.json", b"{}")
    for name in ("*", "00000.parquet", "00000.tar"):
        units = units_of(tmp_path / name)
        assert [(unit.id, unit.kind, unit.sidecar) for unit in units] == [
            ("00000", "tar", str(tmp_path / "00000.parquet"))
        ]


def test_fingerprints_of_tars_follow_content_not_time(tmp_path):
    path = tar(tmp_path / "x.tar", "a.jpg")
    before = units_of(path)[0].fingerprint
    os.utime(path, (1, 1))
    assert units_of(path)[0].fingerprint == before
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    assert units_of(path)[0].fingerprint != before
    path.write_bytes(data)
    assert units_of(path)[0].fingerprint == before
    write(tmp_path / "x.parquet", b"PAR1")
    assert units_of(path)[0].fingerprint != before


# Keys


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("./sa_1", "sa_1"),
        ("a.b/c d", "a%2Eb/c%20d"),
        ("../../etc/x", "%2E%2E/%2E%2E/etc/x"),
        ("/etc//x", "etc/x"),
        ("a~2", "a%7E2"),
        ("é%", "%C3%A9%25"),
        ("\udcff\\", "%ED%B3%BF%5C"),
        ("", "_"),
    ],
)
def test_keys_are_harmless(path, key):
    assert encode_path(path) == key


def test_long_names_are_cut_and_stay_distinct():
    first, second = encode_path("é" * 120 + "1"), encode_path("é" * 120 + "2")
    assert len(first) == len(second) == 160
    assert first != second


# Folders


def folder(tmp_path: Path) -> Path:
    top = tmp_path / "pictures"
    for name in ("b.jpg", "a.png", "a.jpg", "a.JPG", "deep/er/c.webp", "deep/d.tiff", "x.y.gif", "._b.jpg", ".h/i.jpg"):
        write(top / name, name)
    write(top / "a.txt", b"\xef\xbb\xbf a \xff cat\n")
    write(top / "deep/d.txt", "a dog")
    write(top / "deep/readme.md", "no image")
    return top


EXPECTED = ["a", "a~jpg", "a~png", "b", "deep/d", "deep/er/c", "x%2Ey"]


@pytest.mark.parametrize("rows_per_unit", [1, 2, 3, 1000])
def test_folders_and_their_slices(tmp_path, rows_per_unit):
    top = folder(tmp_path)
    samples = read(top, rows_per_unit=rows_per_unit)
    assert [sample.key for sample in samples] == [f"pictures/{key}" for key in EXPECTED]
    assert samples[0].data == b"a.JPG"
    assert [sample.caption for sample in samples[:4]] == ["a � cat"] * 3 + [None]
    assert samples[4].caption == "a dog"
    units = units_of(top, rows_per_unit=rows_per_unit)
    assert [unit.id for unit in units] == [f"pictures-{i:05d}" for i in range(-(-7 // rows_per_unit))]
    assert [(unit.start, unit.num_rows) for unit in units[:2]][0] == (0, min(rows_per_unit, 7))
    assert units[-1].stop == 7


def test_fingerprints_of_folders(tmp_path):
    top = folder(tmp_path)

    def prints() -> list[str]:
        return [unit.fingerprint for unit in units_of(top, rows_per_unit=4)]

    first, second = prints()
    os.utime(top / "b.jpg", (1, 1))
    assert prints() == [first, second]
    write(top / "deep/d.txt", "a longer dog")
    assert prints()[0] == first
    assert prints()[1] != second
    write(top / "b.jpg", "longer than before")
    assert prints()[0] != first


def test_odd_things_in_folders(tmp_path):
    top = tmp_path / "odd"
    write(top / "good.jpg")
    write(top / "empty.jpg", b"")
    (top / "gone.jpg").symlink_to(top / "nowhere")
    os.mkfifo(top / "pipe.jpg")
    (top / "folder.jpg").mkdir()
    write(top / "folder.jpg" / "in.png")
    (top / "loop").symlink_to(top)
    write(tmp_path / "elsewhere" / "far.jpg")
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "again").symlink_to(tmp_path / "elsewhere")
    found = {sample.key: sample for sample in read(top)}
    assert sorted(found) == [f"odd/{key}" for key in ("again/far", "empty", "folder%2Ejpg/in", "gone", "good", "pipe")]
    assert found["odd/gone"].error is Reason.MISSING_FILE
    assert "No such file" in found["odd/gone"].detail
    assert found["odd/pipe"].error is Reason.NOT_A_FILE
    assert found["odd/empty"].data == b""


def test_a_file_that_went_away_is_a_row(tmp_path):
    top = folder(tmp_path)
    job = source(top)
    (unit,) = find_units(job)
    (top / "b.jpg").unlink()
    samples = list(read_samples(unit, job))
    assert [sample.error for sample in samples] == [None] * 3 + [Reason.MISSING_FILE] + [None] * 3


def test_a_folder_inside_another_is_refused(tmp_path):
    top = folder(tmp_path)
    with pytest.raises(ConfigError, match="pictures/deep lies in .*pictures, which is searched recursively"):
        units_of(top / "deep", top)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tar(tmp_path / "x.tar", "a.jpg")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"x.tar: cannot be read: Permission denied"):
        units_of(path)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        units_of(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        units_of(tmp_path, layout="folder")


def test_sources_do_not_import_pillow():
    code = "import sys, pixart_data.sources; sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not on this machine")
def test_real_tars():
    samples = read(PHOTOS / "*")
    assert len(samples) == 240
    assert all(sample.data and not sample.error for sample in samples)
    captions = [sample.caption for sample in samples]
    assert all(captions[:120])
    assert captions[120:] == [None] * 120
    assert (samples[0].key, samples[0].caption) == ("laion_00000/000000000", "fire engine")
    assert samples[120].key == "sa_000000/sa_1"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "json", "parquet"])
def test_storage_that_recovers_is_waited_for(tmp_path, monkeypatch, kind):
    top = folder(tmp_path)
    rows = [{"path": f"{name}.jpg", "caption": "x"} for name in ("a", "b", "gone")]
    write(top / "x.jsonl", "\n".join(map(json.dumps, rows)))
    write(top / "x.json", json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), top / "x.parquet")
    path = top if kind == "folder" else top / f"x.{kind}"
    expected, units = read(path), units_of(path)
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.0001)
    failed = []

    def fail_now_and_then(real: Callable[..., object]) -> Callable[..., object]:
        calls = [0]

        def call(*args: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] % 3 == 1:
                failed.append(real)
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail_now_and_then(open))
        patch.setattr(os, "scandir", fail_now_and_then(os.scandir))
        assert units_of(path) == units
        assert [sample for unit in units for sample in read_samples(unit, source(path))] == expected
    assert len(failed) > 2


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_storage_that_keeps_failing_is_an_error_not_a_row(tmp_path, monkeypatch, kind):
    top = folder(tmp_path)
    write(top / "x.jsonl", json.dumps({"path": "a.jpg"}))
    path = top if kind == "folder" else top / "x.jsonl"
    (unit,) = units_of(path)
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.0001)
    attempts = []
    real = open

    def fail(name: object, *args: object, **options: object) -> object:
        if str(name).endswith("a.JPG") or str(name).endswith("a.jpg"):
            attempts.append(name)
            raise OSError(errno.EIO, "Input/output error")
        return real(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        with pytest.raises(DataError, match=r"a.(jpg|JPG): cannot be read: Input/output error; check the storage"):
            list(read_samples(unit, source(path)))
    assert len(attempts) == retries._ATTEMPTS
