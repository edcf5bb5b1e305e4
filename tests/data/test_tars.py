import io
import json
import random
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, count_rows, find_units, read_samples


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
