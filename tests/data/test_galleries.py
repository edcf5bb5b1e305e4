"""Galleries: the same rows from any cut of a corpus, the right picture for each, and nothing read that is not shown."""

import io
import json
import logging
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_data import galleries
from pixart_data.errors import ConfigError
from pixart_data.galleries import (
    MOST_BYTES,
    MOST_CHARS,
    MOST_SIDE_PX,
    SPARES,
    Row,
    choose,
    draw_rows,
    find_shards,
    gallery,
)
from pixart_data.sections import Source
from pixart_data.sources import find_units, read_samples
from pixart_data.tars import _LocalTar
from pixart_data.units import Sample
from tests.web import bomb_png, picture

COUNT = 24
COLOURS = {f"{number:03d}": (10 * number, 255 - 10 * number, 40 * (number % 6)) for number in range(COUNT)}


def file_of(colour, size=(64, 48), form="PNG", **options):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, form, **options)
    return out.getvalue()


def colour_of(exhibit):
    image = Image.open(io.BytesIO(exhibit.jpeg))
    assert (image.width, image.height) == (exhibit.width, exhibit.height)
    return image.getpixel((image.width // 2, image.height // 2))


def is_near(found, expected):
    return all(abs(a - b) <= 6 for a, b in zip(found, expected, strict=True))


def folder(root):
    root.mkdir()
    for name, colour in COLOURS.items():
        (root / f"{name}.png").write_bytes(file_of(colour))
    return root


def a_folder(tmp_path):
    return Source(paths=[str(folder(tmp_path / "shard"))], rows_per_unit=5)


def a_tar(tmp_path, **settings):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, colour in COLOURS.items():
            for extension, data in ((".png", file_of(colour)), (".txt", b"raw")):
                info = tarfile.TarInfo(name + extension)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return Source(paths=[str(path)], **settings)


def a_sliced_tar(tmp_path):
    return a_tar(tmp_path, bytes_per_unit=8192)


def a_jsonl_list(tmp_path):
    folder(tmp_path / "images")
    path = tmp_path / "shard.jsonl"
    path.write_text("".join(json.dumps({"path": f"images/{name}.png", "key": name}) + "\n" for name in COLOURS))
    return Source(paths=[str(path)], rows_per_unit=5)


def a_parquet_list(tmp_path):
    folder(tmp_path / "images")
    rows = [{"path": f"images/{name}.png", "key": name} for name in COLOURS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet", row_group_size=7)
    return Source(paths=[str(tmp_path / "shard.parquet")], rows_per_unit=5)


def rows_of(names, shard="shard"):
    return [Row(f"{shard}/{name}", f" raw {name} ", f"dense {name}") for name in names]


@pytest.mark.parametrize("make", [a_folder, a_tar, a_sliced_tar, a_jsonl_list, a_parquet_list])
def test_every_row_gets_its_own_picture(make, tmp_path):
    shown = gallery(make(tmp_path), rows_of(COLOURS), COUNT)
    assert sorted(exhibit.key for exhibit in shown) == [f"shard/{name}" for name in COLOURS]
    for exhibit in shown:
        name = exhibit.key.partition("/")[2]
        assert (exhibit.raw, exhibit.dense) == (f"raw {name}", f"dense {name}")
        assert is_near(colour_of(exhibit), COLOURS[name])


@pytest.mark.parametrize("make", [a_folder, a_tar, a_sliced_tar, a_jsonl_list, a_parquet_list])
def test_of_the_samples_asked_for_alone_images_are_read(make, tmp_path, monkeypatch):
    source = make(tmp_path)
    wanted = {"shard/003", "shard/004", "shard/017", "shard/nowhere", "other/003"}
    everything = [sample for unit in find_units(source) for sample in read_samples(unit, source)]
    read = []
    real_tar, real_file = _LocalTar.read_at, Path.read_bytes

    def read_at(self, offset, size_bytes):
        read.append(size_bytes)
        return real_tar(self, offset, size_bytes)

    def load_file(key, path, caption):
        read.append(path)
        return Sample(key, real_file(Path(path)), caption)

    monkeypatch.setattr(_LocalTar, "read_at", read_at)
    monkeypatch.setattr("pixart_data.units._load_file", load_file)
    found = [sample for unit in find_units(source) for sample in read_samples(unit, source, keys=wanted)]
    assert found == [sample for sample in everything if sample.key in wanted]
    assert len(found) == 3
    assert len([size for size in read if not isinstance(size, int) or size > 3]) == 3  # raw captions have 3 bytes


def test_a_gallery_depends_on_the_rows_and_the_seed_and_not_on_their_order(tmp_path):
    source, rows = a_folder(tmp_path), rows_of(COLOURS)
    first = gallery(source, rows, 6, seed=3)
    assert len(first) == 6
    shuffled = random.Random(0).sample(rows, len(rows))
    assert gallery(source, shuffled, 6, seed=3) == first
    assert {e.key for e in gallery(source, rows, 6, seed=4)} != {e.key for e in first}
    assert gallery(source, rows, 4, seed=3) == first[:4]


def test_missing_and_broken_pictures_make_room_for_others_and_are_counted(tmp_path, caplog):
    source = a_folder(tmp_path)
    order = [row.key.partition("/")[2] for row in choose(rows_of(COLOURS), 12, 0)]
    (tmp_path / "shard" / f"{order[0]}.png").unlink()
    (tmp_path / "shard" / f"{order[1]}.png").write_bytes(b"<html>no picture</html>")
    (tmp_path / "shard" / f"{order[2]}.png").write_bytes(b"")
    (tmp_path / "shard" / f"{order[3]}.png").write_bytes(bomb_png())
    (tmp_path / "shard" / f"{order[4]}.png").write_bytes(file_of((1, 2, 3))[:40])
    with caplog.at_level(logging.WARNING):
        shown = gallery(source, rows_of(COLOURS), 12)
    assert [exhibit.key for exhibit in shown] == [f"shard/{name}" for name in order[5:17]]
    [record] = caplog.records
    counted = "1 not found, 1 not_an_image, 1 too_large, 1 truncated_image, 1 zero_bytes"
    assert record.getMessage() == f"gallery: left out 5 of the 17 pictures looked for: {counted}"


def test_a_gallery_of_a_source_that_has_none_of_the_pictures_says_what_to_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert gallery(a_folder(tmp_path), rows_of(COLOURS, "elsewhere"), 4) == []
    assert "left out 16 of the 16 pictures looked for: 16 not found" in caplog.text
    assert (
        "expected keys that begin with the name of a shard of its source (shard ...), found elsewhere;" in caplog.text
    )
    assert "name the images that were captioned, with the same source.root" in caplog.text


def test_a_whole_gallery_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert len(gallery(a_folder(tmp_path), rows_of(COLOURS), 5)) == 5
    assert not caplog.records


def tars(tmp_path, count):
    for number in range(count):
        with tarfile.open(tmp_path / f"t{number}.tar", "w") as tar:
            data = file_of((number, 0, 0))
            info = tarfile.TarInfo("a.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Source(paths=[str(tmp_path / "*.tar")])


def test_no_tar_is_opened_that_holds_nothing_asked_for_nor_more_than_allowed(tmp_path, monkeypatch, caplog):
    source = tars(tmp_path, 9)
    opened = []
    real = galleries.read_samples

    def watched(unit, source, keys):
        opened.append(unit.name)
        return real(unit, source, keys=keys)

    monkeypatch.setattr(galleries, "read_samples", watched)
    rows = [Row(f"t{number}/a", "raw", "dense") for number in range(9)]
    assert [exhibit.key for exhibit in gallery(source, rows[4:6], 9)] == [row.key for row in choose(rows[4:6], 9, 0)]
    assert sorted(opened) == ["t4", "t5"]
    opened.clear()
    monkeypatch.setattr(galleries, "_MOST_TARS", 3)
    with caplog.at_level(logging.WARNING):
        assert len(gallery(source, rows, 6)) == 3
    assert len(opened) == 3
    assert "6 in shards beyond the 3 that were opened" in caplog.text


def test_of_a_large_tar_the_headers_are_read_once(tmp_path, monkeypatch):
    source = a_sliced_tar(tmp_path)
    assert len(find_units(source)) > 3
    read = []
    real = _LocalTar.index
    monkeypatch.setattr(_LocalTar, "index", lambda self: read.append(self) or real(self))
    assert len(gallery(source, rows_of(COLOURS), COUNT)) == COUNT
    assert len(read) == 1


def test_of_tars_on_an_object_store_few_are_fetched(tmp_path, monkeypatch, caplog):
    units = [replace(unit, path=f"s3://bucket/{unit.name}.tar") for unit in find_units(tars(tmp_path, 9))]
    monkeypatch.setattr(galleries, "find_units", lambda source: units)
    monkeypatch.setattr(galleries, "_MOST_REMOTE_TARS", 4)
    fetched = []

    def fetch(unit, source, keys):
        fetched.append(unit.path)
        yield Sample(f"{unit.name}/a", file_of((9, 9, 9)), None)

    monkeypatch.setattr(galleries, "read_samples", fetch)
    rows = [Row(f"t{number}/a", "raw", "dense") for number in range(9)]
    assert len(gallery(Source(paths=["s3://bucket/*.tar"]), rows, 6)) == len(fetched) == 4
    assert "in shards beyond the 4 that were opened" in caplog.text


def test_a_tar_that_cannot_be_read_is_left_out(tmp_path, caplog):
    source = tars(tmp_path, 3)
    (tmp_path / "t1.tar").write_bytes(b"no tar at all" * 1000)
    rows = [Row(f"t{number}/a", "raw", "dense") for number in range(3)]
    with caplog.at_level(logging.WARNING):
        assert {exhibit.key for exhibit in gallery(source, rows, 3)} == {"t0/a", "t2/a"}
    assert "1 not found" in caplog.text


def test_a_list_that_changes_under_its_reader_leaves_out_its_pictures(tmp_path, monkeypatch, caplog):
    source = a_jsonl_list(tmp_path)
    units = find_units(source)
    (tmp_path / "shard.jsonl").write_text("")
    monkeypatch.setattr(galleries, "find_units", lambda source: units)
    with caplog.at_level(logging.WARNING):
        assert gallery(source, rows_of(COLOURS), 3) == []
    assert "it changed: run the job again; its pictures are left out" in caplog.text


def test_a_source_that_is_none_is_told(tmp_path):
    source = Source(paths=[f"{tmp_path}/source.d/*.tar"])
    for look in (lambda: find_shards(source), lambda: gallery(source, rows_of(COLOURS), 3)):
        with pytest.raises(ConfigError, match=r"^gallery\.source\.paths: nothing matches /.*/source\.d/\*\.tar; check"):
            look()


def alone(tmp_path, data, name="a.img.png"):
    root = tmp_path / "one"
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    [exhibit] = gallery(Source(paths=[str(root)]), [Row("one/a%2Eimg", "raw", "dense")], 1)
    assert len(exhibit.jpeg) <= MOST_BYTES
    assert max(exhibit.width, exhibit.height) <= MOST_SIDE_PX
    image = Image.open(io.BytesIO(exhibit.jpeg))
    image.load()
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert (image.width, image.height) == (exhibit.width, exhibit.height)
    return exhibit


def test_captions_without_end_do_not_fill_the_page(tmp_path):
    row = Row("shard/003", "x" * MOST_CHARS, "house " * 200_000)
    [exhibit] = gallery(a_folder(tmp_path), [row], 1)
    assert exhibit.raw == row.raw
    assert len(exhibit.dense) == MOST_CHARS
    assert exhibit.dense.endswith("h…")


def test_a_thumbnail_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image = Image.new("RGB", (1200, 600), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 600, 600))
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    exhibit = alone(tmp_path, out.getvalue())
    assert (exhibit.width, exhibit.height) == (240, 480)
    thumbnail = Image.open(io.BytesIO(exhibit.jpeg))
    assert is_near(thumbnail.getpixel((120, 60)), (0, 0, 254))
    assert is_near(thumbnail.getpixel((120, 420)), (254, 0, 0))
    assert not thumbnail.getexif()  # no one's camera, place or name


@pytest.mark.parametrize(
    "data",
    [
        picture(1500, 1500, "PNG"),
        picture(1, 1, "PNG"),
        picture(5000, 2, "PNG"),
        picture(2, 5000, "PNG"),
        picture(900, 700, quality=100),
    ],
    ids=["noise", "pixel", "wide", "tall", "jpeg"],
)
def test_thumbnails_are_small_whatever_the_picture(data, tmp_path):
    exhibit = alone(tmp_path, data)
    original = Image.open(io.BytesIO(data))
    assert exhibit.width <= original.width
    assert exhibit.height <= original.height


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
def test_thumbnails_are_made_of_pictures_of_any_mode(mode, tmp_path):
    out = io.BytesIO()
    Image.new(mode, (300, 200)).save(out, "TIFF" if mode == "CMYK" else "PNG")
    assert (alone(tmp_path, out.getvalue()).width, alone(tmp_path, out.getvalue()).height) == (300, 200)


# Rows


UNUSABLE = [Row("", "raw", "dense"), Row("a/b", None, "dense"), Row("a/c", "raw", None), Row("a/d", " \n", "dense"),
            Row("a/e", "raw", "\u3000")]  # fmt: skip
ROWS = [Row(f"shard{number % 7}/{number}", f"raw {number}", f"dense {number}") for number in range(500)]


def drawn(rows, count=5, seed=0, kind=None):
    columns = [pa.array([getattr(row, name) for row in rows], kind or pa.string()) for name in ("key", "raw", "dense")]
    return draw_rows(*columns, count, seed)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_rows_drawn_from_batches_are_those_chosen_from_all(kind):
    rows = UNUSABLE + ROWS
    chosen = choose(rows, 5, 0)
    assert len(chosen) == 5 * SPARES
    assert drawn(rows, kind=kind) == chosen
    for size in (1, 17, 200):
        parts = [row for start in range(0, len(rows), size) for row in drawn(rows[start : start + size], kind=kind)]
        assert choose(parts, 5, 0) == chosen
    assert choose(reversed(chosen), 5, 0) == chosen
    assert choose(rows, 2, 0) == chosen[: 2 * SPARES]
    assert choose(rows, 5, 1) != chosen


def test_rows_without_both_captions_are_never_drawn():
    assert choose(UNUSABLE, 5, 0) == drawn(UNUSABLE) == drawn([]) == choose([], 5, 0) == []
    assert draw_rows(pa.nulls(2), pa.nulls(2), pa.nulls(2), 5, 0) == []


def test_of_rows_with_one_key_the_first_that_has_captions_is_drawn():
    rows = [Row("a/b", " ", "blank"), Row("a/b", "raw", "first"), Row("a/b", "raw", "second"), Row("a/c", "raw", "x")]
    assert sorted(drawn(rows), key=lambda row: row.key) == [rows[1], rows[3]]
    assert drawn(rows) == choose(rows, 5, 0)
    assert choose(drawn(rows[:2]) + drawn(rows[2:]), 5, 0) == drawn(rows)


def test_captions_that_are_no_utf8_and_keys_that_are_numbers_do_no_harm():
    bytes_of = pa.array([b"\xff\xfe bytes"], pa.large_binary())
    [row] = draw_rows(pa.array([7]), bytes_of, pa.array(["dense"]), 1, 0)
    assert row == Row("7", "\ufffd\ufffd bytes", "dense")
