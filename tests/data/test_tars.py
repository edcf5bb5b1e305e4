import errno
import io
import json
import os
import random
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import retries
from pixart_data.errors import DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, Unit, count_rows, find_units, read_samples


def write_tar(path: Path, members: list, format: int = tarfile.GNU_FORMAT) -> Path:
    """Members are (name, bytes) or TarInfo."""
    with tarfile.open(path, "w", format=format) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


def read(path: Path, **settings: object) -> list[Sample]:
    source = Source(paths=[str(path)], **settings)
    (unit,) = find_units(source)
    samples = list(read_samples(unit, source))
    assert count_rows(unit) == len(samples)
    light = list(read_samples(unit, source, with_images=False))
    assert [(row.key, row.caption, row.error) for row in light] == [(r.key, r.caption, r.error) for r in samples]
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_/%~-]+", key) for key in keys)
    return samples


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def sa1b(count: int = 3) -> list:
    members = []
    for i in range(1, count + 1):
        members.append((f"./sa_{i}.jpg", bytes([i]) * 700))
        members.append((f"./sa_{i}.json", json.dumps({"image": {}, "annotations": []}).encode()))
    return members


def img2dataset(count: int = 3) -> list:
    members = []
    for i in range(count):
        members.append((f"{i:09d}.jpg", bytes([i + 1]) * 700))
        members.append((f"{i:09d}.json", json.dumps({"caption": f"json {i}"}).encode()))
        members.append((f"{i:09d}.txt", f"text {i}".encode()))
    return members


def write_sidecar(path: Path, count: int) -> None:
    rows = [
        {"key": f"{i:09d}", "status": "failed_to_download" if i == 1 else "success", "caption": f"column {i}"}
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("layout", ["auto", "sa1b", "img2dataset"])
def test_sa1b(tmp_path, format, layout):
    samples = read(write_tar(tmp_path / "sa_000000.tar", sa1b(), format), layout=layout)
    assert keys(samples) == ["sa_000000/sa_1", "sa_000000/sa_2", "sa_000000/sa_3"]
    assert [sample.data for sample in samples] == [bytes([i]) * 700 for i in (1, 2, 3)]
    assert {sample.caption for sample in samples} == {None}


def test_captions_of_img2dataset(tmp_path):
    members = img2dataset()
    samples = read(write_tar(tmp_path / "x.tar", members))
    assert [sample.caption for sample in samples] == ["text 0", "text 1", "text 2"]
    without_text = [member for member in members if not member[0].endswith(".txt")]
    path = write_tar(tmp_path / "x.tar", without_text)
    assert [sample.caption for sample in read(path)] == ["json 0", "json 1", "json 2"]
    assert [sample.caption for sample in read(path, layout="sa1b")] == [None] * 3
    path = write_tar(tmp_path / "x.tar", [member for member in members if member[0].endswith(".jpg")])
    assert [sample.caption for sample in read(path)] == [None] * 3
    write_sidecar(path, 3)
    assert [sample.caption for sample in read(path)] == ["column 0", None, "column 2"]


@pytest.mark.parametrize(
    ("name", "content", "caption"),
    [
        ("a.txt", b"\xff cat \n", "� cat"),
        ("a.txt", b"", ""),
        ("a.json", b"{broken", None),
        ("a.json", b"[" * 100_000, None),
        ("a.json", b"[1]", None),
        ("a.json", b'{"caption": 7}', None),
        ("a.json", b'{"caption": "\\ud800 x"}', "? x"),
        ("a.json", b'{"caption": "big", "x": "' + b"x" * (1 << 20) + b'"}', None),
        ("a.json", b'{"annotations": [], "caption": "yes"}', "yes"),
    ],
)
def test_odd_captions(tmp_path, name, content, caption):
    (sample,) = read(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (name, content)]))
    assert sample.caption == caption


def test_members_group_by_stem_wherever_they_are(tmp_path):
    members = [
        ("b.txt", b"bee"),
        ("a.jpg", b"A"),
        ("b.JPEG", b"B"),
        ("d/a.png", b"D"),
        ("a.txt", b"ay"),
        ("c.y.gif", b"C"),
    ]
    samples = read(write_tar(tmp_path / "x.tar", members))
    assert [(s.key, s.data, s.caption) for s in samples] == [
        ("x/a", b"A", "ay"),
        ("x/b", b"B", "bee"),
        ("x/d/a", b"D", None),
        ("x/c%2Ey", b"C", None),
    ]


def test_images_that_share_a_stem_or_a_name(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("a.png", b"2"),
        ("a.txt", b"one"),
        ("a.jpg", b"3"),
        ("a.txt", b"two"),
        ("a~png.jpg", b"4"),
    ]
    samples = read(write_tar(tmp_path / "x.tar", members))
    assert [(s.key, s.data, s.caption) for s in samples] == [
        ("x/a", b"1", "one"),
        ("x/a~png", b"2", "two"),
        ("x/a~2", b"3", "two"),
        ("x/a%7Epng", b"4", None),
    ]


def test_hostile_names(tmp_path):
    members = [
        ("../../etc/x.jpg", b"1"),
        ("/etc/x.jpg", b"2"),
        ("etc/x.jpg", b"3"),
        ("é \n.jpg", b"4"),
        ("n" * 300 + ".jpg", b""),
    ]
    samples = read(write_tar(tmp_path / "x.tar", members))
    assert keys(samples)[:4] == ["x/%2E%2E/%2E%2E/etc/x", "x/etc/x", "x/etc/x~2", "x/%C3%A9%20%0A"]
    assert samples[4].data == b""


def test_names_that_are_not_utf8(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("\udcff.jpg", b"1"), ("\udcff.json", b"{}")])
    assert [(s.key, s.data) for s in read(path)] == [("x/%ED%B3%BF", b"1")]


def test_what_is_no_plain_file(tmp_path):
    members: list = [("a.jpg", b"1")]
    for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.gif", tarfile.DIRTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        members.append(info)
    folder = tarfile.TarInfo("images")
    folder.type = tarfile.DIRTYPE
    samples = read(write_tar(tmp_path / "x.tar", [folder, *members]))
    assert [(s.key, s.error) for s in samples] == [
        ("x/a", None),
        *((f"x/{name}", Reason.NOT_A_FILE) for name in ("l", "h", "d")),
    ]


def test_groups_without_an_image(tmp_path):
    members = [("a.json", b"{}"), ("b.jpg", b"1"), ("._b.jpg", b"mac"), ("c.heic", b"2")]
    samples = read(write_tar(tmp_path / "x.tar", members))
    assert [(s.key, s.error) for s in samples] == [
        ("x/a", Reason.NO_IMAGE),
        ("x/b", None),
        ("x/c", Reason.NO_IMAGE),
    ]
    assert samples[2].detail == "no image beside c.heic"


def test_rows_of_the_sidecar_that_the_tar_lacks(tmp_path):
    path = write_tar(tmp_path / "x.tar", img2dataset(3))
    write_sidecar(path, 5)
    samples = read(path)
    assert keys(samples)[3:] == ["x/000000003", "x/000000004"]
    assert [sample.error for sample in samples] == [None] * 3 + [Reason.NO_IMAGE] * 2


@pytest.mark.parametrize("columns", [{"path": ["a.jpg"]}, None])
def test_a_parquet_that_is_no_sidecar_is_left_alone(tmp_path, columns):
    path = write_tar(tmp_path / "x.tar", img2dataset(2))
    if columns:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    else:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    assert len(read(path)) == 2


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"<html>no</html>", b"\x1f\x8b" + b"x" * 600, b"x" * 100])
def test_what_is_no_tar_at_all(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    (sample,) = read(tmp_path / "x.tar")
    assert (sample.key, sample.error) == ("x/unreadable", Reason.UNREADABLE_TAR)
    assert f"{len(content)} bytes" in sample.detail
    assert ("gzip" in sample.detail) == content.startswith(b"\x1f\x8b")


def test_an_empty_tar_has_no_samples(tmp_path):
    assert read(write_tar(tmp_path / "x.tar", [])) == []


def test_a_preallocated_file_is_an_unfinished_download(tmp_path):
    path = write_tar(tmp_path / "x.tar", sa1b(1))
    with path.open("ab") as file:
        file.truncate(3 << 20)
    samples = read(path)
    assert [(s.key, s.error) for s in samples] == [("x/sa_1", None), ("x/truncated", Reason.TRUNCATED_TAR)]
    assert "unfinished download" in samples[1].detail


def cut(path: Path, size_bytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:size_bytes])
    return path


def offsets(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path) as file:
        return {info.name: (info.offset, info.offset_data) for info in file}


def test_a_cut_inside_of_an_image(tmp_path):
    path = write_tar(tmp_path / "x.tar", sa1b())
    samples = read(cut(path, offsets(path)["./sa_2.jpg"][1] + 300))
    assert [(s.key, s.error) for s in samples] == [("x/sa_1", None), ("x/sa_2", Reason.TRUNCATED_TAR)]
    assert samples[1].detail == "./sa_2.jpg: 300 of 700 bytes; the tar is cut there"


def test_a_cut_inside_of_a_caption(tmp_path):
    path = write_tar(tmp_path / "x.tar", img2dataset())
    samples = read(cut(path, offsets(path)["000000001.txt"][1] + 3))
    assert [(s.key, s.error) for s in samples] == [("x/000000000", None), ("x/000000001", Reason.TRUNCATED_TAR)]
    assert "000000001.txt: 3 of 6 bytes" in samples[1].detail


@pytest.mark.parametrize("extra", [0, 100, 511])
@pytest.mark.parametrize("sidecar", [False, True])
def test_a_cut_between_samples(tmp_path, extra, sidecar):
    path = write_tar(tmp_path / "x.tar", img2dataset(5))
    if sidecar:
        write_sidecar(path, 5)
    samples = read(cut(path, offsets(path)["000000002.jpg"][0] + extra))
    lost = ["x/000000002", "x/000000003", "x/000000004"] if sidecar else ["x/truncated"]
    assert keys(samples) == ["x/000000000", "x/000000001", *lost]
    assert [sample.error for sample in samples] == [None] * 2 + [Reason.TRUNCATED_TAR] * len(lost)
    assert "without an end mark" in samples[-1].detail


def test_a_lost_end_mark_loses_no_sample_that_the_sidecar_names(tmp_path):
    path = write_tar(tmp_path / "x.tar", img2dataset(3))
    with tarfile.open(path) as file:
        last = file.getmembers()[-1]
    cut(path, last.offset_data + 512)
    assert keys(read(path))[3:] == ["x/truncated"]
    write_sidecar(path, 3)
    assert len(read(path)) == 3


def test_a_cut_before_the_image_of_a_group(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.json", b"{}"), ("b.jpg", b"2")])
    samples = read(cut(path, offsets(path)["b.jpg"][0]))
    assert [(s.key, s.error) for s in samples] == [("x/a", None), ("x/b", Reason.TRUNCATED_TAR)]


def test_a_damaged_header(tmp_path):
    path = write_tar(tmp_path / "x.tar", sa1b())
    data = bytearray(path.read_bytes())
    at = offsets(path)["./sa_2.jpg"][0]
    data[at : at + 512] = b"?" * 512
    path.write_bytes(bytes(data))
    samples = read(path)
    assert [(s.key, s.error) for s in samples] == [("x/sa_1", None), ("x/truncated", Reason.TRUNCATED_TAR)]
    assert f"the header at byte {at} of {len(data)} is damaged" in samples[1].detail


def test_appended_tars_are_read_and_garbage_is_not(tmp_path):
    first, second = write_tar(tmp_path / "1.tar", sa1b(1)), write_tar(tmp_path / "2.tar", [("b.jpg", b"2")])
    path = tmp_path / "x.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert [(s.key, s.error) for s in read(path)] == [("x/sa_1", None), ("x/b", None)]
    path.write_bytes(first.read_bytes() + b"signature" * 100)
    assert keys(read(path)) == ["x/sa_1"]


def test_every_cut_accounts_for_itself(tmp_path):
    path = write_tar(tmp_path / "x.tar", img2dataset(2) + [("long/" * 30 + "a.jpg", b"5" * 600)], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    with tarfile.open(path) as file:
        whole = file.offset
    for size in range(0, whole, 101):
        path.write_bytes(data[:size])
        samples = read(path)
        assert samples[-1].error in (Reason.TRUNCATED_TAR, Reason.UNREADABLE_TAR)
        assert all(sample.error is None for sample in samples[:-1])
        assert len(samples) <= 4


def test_damaged_tars_raise_nothing(tmp_path):
    generator = random.Random(0)
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = [*img2dataset(2), ("n" * 120 + ".jpg", b"1"), ("é.jpg", b"2")]
        whole = write_tar(tmp_path / "x.tar", members, format).read_bytes().rstrip(b"\0") + b"\0" * 1024
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(generator.choice((1, 3, 20))):
                data[generator.randrange(len(data))] = generator.randrange(256)
            at = generator.randrange(len(data) // 512) * 512  # mend a checksum, to get past it
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
            (tmp_path / "x.tar").write_bytes(bytes(data))
            assert read(tmp_path / "x.tar")


def test_a_tar_that_went_away_is_the_storages_fault(tmp_path):
    source = Source(paths=[str(write_tar(tmp_path / "x.tar", sa1b()))])
    (unit,) = find_units(source)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataError, match=r"x.tar: cannot be read: No such file"):
        list(read_samples(unit, source))


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    source = Source(paths=[str(write_tar(tmp_path / "x.tar", sa1b()))])
    (unit,) = find_units(source)
    samples = read_samples(unit, source)
    next(samples)
    with (tmp_path / "x.tar").open("r+b") as file:
        file.truncate(2600)
    assert {sample.error for sample in samples} == {Reason.TRUNCATED_TAR}


# Slices


def read_slices(path: Path, bytes_per_unit: int, **settings: object) -> tuple[list[Unit], list[Sample]]:
    source = Source(paths=[str(path)], bytes_per_unit=bytes_per_unit, **settings)
    units = find_units(source)
    samples = []
    for unit in units:
        part = list(read_samples(unit, source))
        assert count_rows(unit) == len(part)
        assert keys(list(read_samples(unit, source, with_images=False))) == keys(part)
        samples += part
    return units, samples


def random_members(generator: random.Random) -> list:
    """Groups of every shape, shuffled a little or a lot, with names that repeat and members that are no files."""
    members: list = []
    for _ in range(generator.randrange(1, 40)):
        stem = f"{generator.choice(('', 'd/', 'é/'))}{generator.randrange(30)}" + "n" * generator.choice((0, 0, 0, 120))
        for extension in generator.sample(("jpg", "png", "json", "txt"), generator.randrange(1, 4)):
            content = json.dumps({"caption": stem}).encode() if extension == "json" else generator.randbytes(2000)
            members.append((f"{stem}.{extension}", content[: generator.randrange(len(content) + 1)]))
        if generator.random() < 0.1:
            link = tarfile.TarInfo(f"{stem}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            members.append(link)
    if generator.random() < 0.5:
        generator.shuffle(members)
    return members


def damage(data: bytes, generator: random.Random) -> bytes:
    kind = generator.randrange(5)
    if kind == 1:
        return data[: generator.randrange(1, len(data))]
    if kind == 2:
        at = generator.randrange(len(data))
        return data[:at] + generator.randbytes(600) + data[at + 600 :]
    if kind == 3:
        return data + bytes(generator.choice((0, 2 << 20))) + data
    return b"?" * 600 + data[600:] if kind == 4 else data


def test_slices_make_up_the_tar(tmp_path):
    generator = random.Random(1)
    seen = set()
    for number in range(80):
        path = tmp_path / "x.tar"
        format = generator.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        write_tar(path, random_members(generator), format)
        path.write_bytes(damage(path.read_bytes(), generator))
        path.with_suffix(".parquet").unlink(missing_ok=True)
        if generator.random() < 0.3:
            write_sidecar(path, 5)
        whole = read(path)
        size_bytes = path.stat().st_size
        bytes_per_unit = max(512, size_bytes // generator.randrange(1, 12))
        units, samples = read_slices(path, bytes_per_unit)
        assert samples == whole, number
        assert len(units) == (1 if size_bytes <= 1.5 * bytes_per_unit else -(-size_bytes // bytes_per_unit))
        seen |= {(sample.error, len(units) > 1) for sample in samples}
    assert seen >= {(error, True) for error in (None, Reason.TRUNCATED_TAR, Reason.NO_IMAGE, Reason.NOT_A_FILE)}
    assert (Reason.UNREADABLE_TAR, True) in seen


def test_a_group_across_slices_comes_out_whole_in_the_slice_of_its_image(tmp_path):
    members = [("a.txt", b"ay"), ("b.jpg", b"B" * 4000), ("a.jpg", b"A" * 4000), ("b.txt", b"bee")]
    path = write_tar(tmp_path / "x.tar", members)
    source = Source(paths=[str(path)], bytes_per_unit=path.stat().st_size // 4)
    parts = [[(s.key, s.caption, s.data) for s in read_samples(unit, source)] for unit in find_units(source)]
    assert [row for part in parts for row in part] == [("x/b", "bee", b"B" * 4000), ("x/a", "ay", b"A" * 4000)]
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1]


def test_units_of_slices(tmp_path):
    path = write_tar(tmp_path / "sa~1.tar", [(f"{i}.jpg", b"x" * 2000) for i in range(10)])
    size_bytes = path.stat().st_size
    units, samples = read_slices(path, size_bytes // 3)
    assert [unit.id for unit in units] == [f"sa%7E1~{i:05d}" for i in range(len(units))]
    assert {unit.name for unit in units} == {"sa%7E1"}
    assert all(re.fullmatch(r"[A-Za-z0-9_%~-]+", unit.id) for unit in units)
    assert keys(samples) == [f"sa%7E1/{i}" for i in range(10)]
    prints = {unit.fingerprint for unit in units}
    (whole,) = find_units(Source(paths=[str(path)]))
    assert whole.id == "sa%7E1"
    others = {unit.fingerprint for unit in read_slices(path, size_bytes // 2)[0]}
    assert len({*prints, *others, whole.fingerprint}) == len(prints) + len(others) + 1
    assert {unit.fingerprint for unit in read_slices(path, size_bytes // 3)[0]} == prints


def test_a_sliced_tar_that_grew_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", sa1b())
    source = Source(paths=[str(path)], bytes_per_unit=path.stat().st_size // 2)
    units = find_units(source)
    write_tar(path, sa1b(30))
    for unit in units:
        with pytest.raises(DataError, match="x.tar: expected 10240 bytes, as when it was cut .*; run the job again"):
            list(read_samples(unit, source))


# Storage that fails


@pytest.fixture
def flaky(monkeypatch):
    """Let calls of the operating system fail; `flaky(owner, name, number, times)` fails every third of them."""
    monkeypatch.setattr("pixart_data.retries._FIRST_WAIT_S", 0.0001)

    def fail(owner: object, name: str, number: int, times: float, every: int = 3) -> list:
        real, calls, failed = getattr(owner, name), [0], []

        def call(*args: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] % every == 0 and len(failed) < times:
                failed.append(number)
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)
        return failed

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_storage_that_recovers_is_waited_for(tmp_path, flaky, number):
    path = write_tar(tmp_path / "x.tar", img2dataset(20))
    write_sidecar(path, 20)
    whole = read(path)
    source = Source(paths=[str(path)])
    (unit,) = find_units(source)
    failed = [flaky(os, "pread", number, times=10), flaky(os, "open", number, times=10, every=2)]
    assert list(read_samples(unit, source)) == whole
    assert len(failed[0]) == 10
    assert failed[1]


def test_headers_are_read_again_after_a_failure(tmp_path, monkeypatch, flaky):
    path = write_tar(tmp_path / "x.tar", img2dataset(20))
    whole = read(path)
    real, calls = tarfile.TarFile.next, []

    def fail_once(tar: tarfile.TarFile) -> object:
        calls.append(tar)
        if len(calls) == 30:
            raise OSError(errno.EIO, "Input/output error")
        return real(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", fail_once)
    source = Source(paths=[str(path)])
    (unit,) = find_units(source)
    assert list(read_samples(unit, source)) == whole
    assert len(calls) > 60


def test_storage_that_keeps_failing_is_an_error_not_a_row(tmp_path, flaky):
    source = Source(paths=[str(write_tar(tmp_path / "x.tar", sa1b()))])
    (unit,) = find_units(source)
    failed = flaky(os, "pread", errno.EIO, times=float("inf"), every=1)
    with pytest.raises(DataError, match=r"x.tar: cannot be read: Input/output error; check the storage, then run"):
        list(read_samples(unit, source))
    assert len(failed) == retries._ATTEMPTS


def test_a_handle_that_goes_stale_is_not_taken_for_the_new_file(tmp_path, flaky):
    path = write_tar(tmp_path / "x.tar", sa1b())
    source = Source(paths=[str(path)])
    (unit,) = find_units(source)
    samples = read_samples(unit, source)
    next(samples)
    path.unlink()
    write_tar(path, sa1b(9))
    flaky(os, "pread", errno.ESTALE, times=1, every=1)
    with pytest.raises(DataError, match="x.tar: it changed while it was read"):
        list(samples)
