"""Sizes from image headers against those of the decoder, and from every table that holds them."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_data import sizes as module
from pixart_data.archives import publish_rows, seal_images
from pixart_data.captions import seal_captions
from pixart_data.commits import COMMITS, MANIFEST, Record, publish_table, write_record
from pixart_data.errors import ConfigError, DataError
from pixart_data.images import decode
from pixart_data.records import CAPTIONS, FETCHED, KEPT, MEASURES
from pixart_data.selection import Part, Selection, seal_selection
from pixart_data.shards import Manifest, manifest_bytes
from pixart_data.sizes import find_origins, read_sizes
from pixart_data.storage import location, write_atomic

TURNED = Image.Exif()
TURNED[0x0112] = 6


def encoded(kind, size=(60, 40), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def images():
    return {
        "plain.jpg": encoded("JPEG"),
        "turned.jpg": encoded("JPEG", (61, 40), exif=TURNED),
        "turned.png": encoded("PNG", (62, 40), exif=TURNED),
        "turned.tif": encoded("TIFF", (63, 40), tiffinfo={274: 6}),
        "plain.webp": encoded("WEBP", (400, 300), quality=100),  # more than is read at first
        "profile.jpg": encoded("JPEG", (64, 40), icc_profile=bytes(200_000)),
        "frames.gif": encoded("GIF", (65, 40)),
    }


@pytest.fixture
def folder(tmp_path):
    """Seven images and one that is none."""
    made = tmp_path / "pictures"
    made.mkdir()
    for name, data in images().items():
        (made / name).write_bytes(data)
    (made / "bad.jpg").write_bytes(b"no image")
    return made


def counted(*paths, every=1):
    found = read_sizes(find_origins([str(path) for path in paths]), every)
    rows = zip(found.width_px.tolist(), found.height_px.tolist(), found.count.tolist(), strict=True)
    return {(width, height): count for width, height, count in rows}, found.num_left_out


def expected():
    decoded = [decode(data, max_pixels=1 << 20) for data in images().values()]
    return dict.fromkeys(((image.width_px, image.height_px) for image in decoded), 1), 1


def test_headers_give_the_sizes_that_the_decoder_gives(folder, tmp_path):
    assert len(images()["plain.webp"]) > max(module._HEADS_BYTES)
    assert (40, 61) in expected()[0]
    assert counted(folder) == expected()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    assert counted(tmp_path / "x.tar") == expected()
    paths = [{"path": f"pictures/{path.name}"} for path in sorted(folder.iterdir())]
    pq.write_table(pa.Table.from_pylist(paths), tmp_path / "list.parquet")
    assert counted(tmp_path / "list.parquet") == expected()


def test_only_the_begin_of_a_large_image_is_read(tmp_path, monkeypatch):
    whole = encoded("JPEG", (1200, 900), quality=100)
    assert len(whole) > 20 * module._HEADS_BYTES[0]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(whole)
            tar.addfile(info, io.BytesIO(whole))
    heads = []
    header = module._header
    monkeypatch.setattr(module, "_header", lambda file: heads.append(len(file.getvalue())) or header(file))
    assert counted(tmp_path / "x.tar") == ({(1200, 900): 2}, 0)
    assert heads == [module._HEADS_BYTES[0]] * 2


def test_every_nth_unit_stands_for_the_others(tmp_path):
    for i in range(5):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            data = encoded("PNG", (50 + i, 40))
            info = tarfile.TarInfo("a.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert counted(tmp_path, every=2) == ({(50, 40): 2, (52, 40): 2, (54, 40): 2}, 0)


def test_a_damaged_tar_gives_what_can_be_read(folder, tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("plain.jpg", "turned.jpg"):
            tar.add(folder / name, name)
    data = (tmp_path / "x.tar").read_bytes()
    cut = data.index(b"turned.jpg") + 600
    (tmp_path / "x.tar").write_bytes(data[:cut])
    assert counted(tmp_path / "x.tar") == ({(60, 40): 1}, 0)
    assert "x.tar: the tar ends at byte" in caplog.text


def table(tmp_path, name="sizes.parquet", **columns):
    pq.write_table(pa.table(columns), tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("names", module.COLUMNS)
def test_tables_with_sizes(tmp_path, names):
    width, height = names
    path = table(tmp_path, **{width: [640, 640, None, 0, 512], height: [480, 480, 480, 480, 512]})
    assert counted(path) == ({(640, 480): 2, (512, 512): 1}, 2)


def test_floats_as_laion_has_them(tmp_path):
    path = table(tmp_path, WIDTH=[640.0, float("nan"), None], HEIGHT=[480.0, 480.0, 480.0])
    assert counted(path) == ({(640, 480): 1}, 2)


def test_a_folder_of_tables_and_several_paths(tmp_path):
    for i in range(3):
        table(tmp_path, f"{i}.parquet", WIDTH=[640 + i], HEIGHT=[480])
    assert counted(tmp_path) == ({(640, 480): 1, (641, 480): 1, (642, 480): 1}, 0)
    assert counted(tmp_path / "[12].parquet", tmp_path / "2.parquet") == ({(641, 480): 1, (642, 480): 1}, 0)


def rows_of(schema, rows):
    return pa.Table.from_pylist(rows, schema=schema)


SIZED = [
    {"key": "a", "width_px": 640, "height_px": 480},
    {"key": "b", "width_px": 512, "height_px": 512},
    {"key": "c", "error": "truncated_image"},
]


def test_captions_and_fetched_images(tmp_path):
    captions, fetched = tmp_path / "captions", tmp_path / "fetched"
    file = publish_table(rows_of(CAPTIONS, SIZED), captions, captions / "parts", "u")
    seal_captions(captions, [Record("u", "", {}, 3, 2, {"truncated_image": 1}, [file])])
    blank = dict.fromkeys(FETCHED.names)
    file = publish_rows(fetched, "u", [blank | row for row in SIZED])
    seal_images(fetched, [Record("u", "", {}, 3, 2, {"truncated_image": 1}, [file])])
    for root in (captions, fetched):
        assert counted(root) == ({(640, 480): 1, (512, 512): 1}, 1)


def test_of_filtered_images_those_that_were_kept(tmp_path):
    file = publish_table(rows_of(MEASURES, SIZED), tmp_path, tmp_path / "measures", "u")
    write_record(tmp_path, Record("u", "", {}, 3, 2, {"truncated_image": 1}, [file]))
    kept = publish_table(pa.table({"key": ["b"]}, schema=KEPT), tmp_path, tmp_path / "kept", "u")
    part = Part("u", "", 3, 1, "", kept)
    seal_selection(tmp_path, Selection({}, 3, 1, {"too_small": 1, "truncated_image": 1}, [part], kept))
    assert counted(tmp_path) == ({(512, 512): 1}, 0)


def test_many_different_sizes_are_merged(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PENDING", 10)
    monkeypatch.setattr(module, "_ROWS_PER_READ", 7)
    generator = np.random.default_rng(0)
    width, height = generator.integers(1, 6, (2, 200))
    path = table(tmp_path, width=width, height=height)
    pairs = list(zip(width.tolist(), height.tolist(), strict=True))
    assert counted(path) == ({pair: pairs.count(pair) for pair in set(pairs)}, 0)


def test_what_is_not_there_or_not_finished(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nothing: expected images or what pixart wrote, found nothing; check the path"
    ):
        find_origins([str(tmp_path / "nothing")])
    for inside in ("out", "dataset/256px"):
        (tmp_path / inside / COMMITS).mkdir(parents=True)
        root = tmp_path / inside.split("/")[0]
        with pytest.raises(
            DataError, match=f"{root}: expected a finished output, found one that is not; run its stage"
        ):
            find_origins([str(root)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^paths: expected images or \.tar files in .*/empty, found none"):
        find_origins([str(tmp_path / "empty")])
    with pytest.raises(
        ConfigError, match=r"expected a pair of columns with sizes .*width and height.*, found url; name the"
    ):
        find_origins([str(table(tmp_path, "x.parquet", url=["a"]))])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet: expected a Parquet file, found one that cannot be read"):
        find_origins([str(tmp_path / "broken.parquet")])
    with pytest.raises(DataError, match="expected images with a size, found 2 without"):
        counted(table(tmp_path, "none.parquet", width=[None, 0], height=[1, 1]))


def test_a_dataset_without_images(tmp_path):
    (tmp_path / "text").mkdir()
    manifest = Manifest("text", "t5", "BF16", {}, {}, {"rows_out": 1})
    (tmp_path / "text" / MANIFEST).write_bytes(manifest_bytes(manifest))
    with pytest.raises(ConfigError, match="expected a feature set of images, found text; name one of images"):
        find_origins([str(tmp_path)])


def test_on_an_object_store(bucket, folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    captions = tmp_path / "captions"
    file = publish_table(rows_of(CAPTIONS, SIZED), captions, captions / "parts", "u")
    seal_captions(captions, [Record("u", "", {}, 3, 2, {"truncated_image": 1}, [file])])
    table(tmp_path, WIDTH=[640], HEIGHT=[480])
    store = location(bucket)
    paths = [tmp_path / "x.tar", tmp_path / "sizes.parquet", *folder.iterdir(), *captions.rglob("*.*")]
    for path in paths:
        write_atomic(store / path.relative_to(tmp_path).as_posix(), path.read_bytes())
    assert counted(f"{bucket}/x.tar") == expected()
    assert counted(f"{bucket}/pictures") == expected()
    assert counted(f"{bucket}/sizes.parquet") == counted(f"{bucket}/size*.parquet") == ({(640, 480): 1}, 0)
    assert counted(f"{bucket}/captions") == ({(640, 480): 1, (512, 512): 1}, 1)
    write_atomic(store / "tables" / "a.parquet", (tmp_path / "sizes.parquet").read_bytes())
    assert counted(f"{bucket}/tables") == ({(640, 480): 1}, 0)
    with pytest.raises(ConfigError, match=f"nothing matches {bucket}/none"):
        find_origins([f"{bucket}/none"])
