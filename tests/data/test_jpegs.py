import functools
import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pixart_data import images, jpegs
from pixart_data.buckets import Bucket, bucket_table
from pixart_data.images import ImageRejected, decode
from pixart_data.jpegs import OVERSAMPLING, box, divisor, least_size, shrink
from pixart_data.records import Reason

LIMIT = 10**6


def tiny(number: int) -> tuple[Bucket]:
    """A bucket for which pictures of 128 x 128 pixels are shrunk by a number."""
    side_px = 128 // number // OVERSAMPLING
    return (Bucket("1.00", side_px, side_px),)


@functools.cache
def picture(width: int = 161, height: int = 131) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 100 * np.sin(x / 9 + y / 17), 127 + 90 * np.sin(y / 5), (x * y) % 256], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def encoded(mode: str = "RGB", format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


KINDS = {
    "4:2:0": encoded(),
    "4:4:4": encoded(quality=97, subsampling=0),
    "4:2:2": encoded(quality=60, subsampling=1),
    "progressive": encoded(progressive=True),
    "restarts": encoded(restart_marker_blocks=4),
    "optimized": encoded(quality=30, optimize=True),
    "RGB inside": encoded(keep_rgb=True),
    "grey": encoded("L"),
    "turned": encoded(exif=turned()),
}


@pytest.mark.parametrize(
    ("size", "least", "number"),
    [
        ((2000, 1500), (576, 448), 2),
        ((2304, 1792), (576, 448), 4),
        ((2303, 1792), (576, 448), 2),
        ((2304, 1791), (576, 448), 2),
        ((9000, 9000), (576, 448), 8),
        ((1152, 895), (576, 448), 1),
        ((100, 100), (576, 448), 1),
        ((8, 8), (1, 1), 8),
        ((7, 8), (1, 1), 4),
        ((1, 1), (1, 1), 1),
    ],
)
def test_a_side_never_falls_below_its_least_length(size, least, number):
    assert divisor(size, least) == number


def test_a_bucket_takes_twice_its_size():
    assert least_size((2000, 1500), bucket_table(256)) == (576, 448)
    assert least_size((1500, 2000), bucket_table(256)) == (448, 576)
    assert least_size((10, 10), bucket_table(1024)) == (2048, 2048)


def test_the_box_leaves_out_what_lies_beyond_the_original():
    assert box((100, 60), 4, 1) == (0, 0, 25, 15)
    assert box((101, 61), 1, 3) == (0, 0, 101, 61)
    assert box((101, 61), 4, None) == (0, 0, 25.25, 15.25)  # of 26 x 16 pixels
    assert box((101, 61), 4, 2) == (0.75, 0, 26, 15.25)
    assert box((101, 61), 4, 3) == (0.75, 0.75, 26, 16)
    assert box((101, 61), 4, 4) == (0, 0.75, 25.25, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_box_is_where_the_original_is(orientation):
    """The last column of 129 lies alone in a column of its own; it is white, and found where the box ends."""
    stored = Image.new("L", (128 + 1, 128))
    stored.paste(255, (128, 0, 129, 128))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=100, exif=exif)
    decoded = decode(buffer.getvalue(), max_pixels=LIMIT, buckets=tiny(8))
    assert "draft8" in decoded.ops
    left, top, right, bottom = decoded.box
    width, height = decoded.image.size
    cut = {"left": left, "top": top, "right": width - right, "bottom": height - bottom}
    [(end, missing)] = [(end, missing) for end, missing in cut.items() if missing]
    assert missing == 7 / 8
    rows = decoded.pixels[..., 0]
    edges = {"left": rows[:, 0], "top": rows[0], "right": rows[:, -1], "bottom": rows[-1]}
    assert edges[end].mean() > 200
    assert rows.mean() < 40


@pytest.mark.parametrize("number", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_the_same_bytes(kind, number):
    image = opened(KINDS[kind])
    found = jpegs.decode(KINDS[kind], image, number)
    assert found is not None
    shrink(image, number)
    assert image.size == (-(-161 // number), -(-131 // number))
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize("buckets", [(), *(tiny(number) for number in (1, 2, 4, 8))])
@pytest.mark.parametrize("kind", KINDS)
def test_without_simplejpeg_pillow_does_the_same(monkeypatch, kind, buckets):
    with_it = decode(KINDS[kind], max_pixels=LIMIT, buckets=buckets)
    monkeypatch.setattr(jpegs, "decoder", lambda: "pillow")
    assert jpegs.decode(KINDS[kind], opened(KINDS[kind]), 1) is None
    without = decode(KINDS[kind], max_pixels=LIMIT, buckets=buckets)
    assert np.array_equal(with_it.pixels, without.pixels)
    sizes = [(it.width_px, it.height_px, it.ops, it.box) for it in (with_it, without)]
    assert sizes[0] == sizes[1]


def test_the_decoder_is_the_one_that_is_installed(monkeypatch):
    assert jpegs.decoder() == "simplejpeg"
    monkeypatch.setattr(jpegs.importlib.util, "find_spec", lambda name: None)
    assert jpegs.decoder() == "pillow"


def test_buckets_see_the_upright_picture():
    wide, tall = Bucket("0.80", 32, 40), Bucket("1.25", 40, 32)
    for bucket, number in ((wide, 1), (tall, 2)):  # upright it is 131 x 161, and stored as 161 x 131
        decoded = decode(KINDS["turned"], max_pixels=LIMIT, buckets=(bucket,))
        assert (decoded.width_px, decoded.height_px) == (131, 161)
        assert decoded.ops == ("exif6" if number == 1 else f"draft{number},exif6")
        assert decoded.image.size == (-(-131 // number), -(-161 // number))


def test_only_jpegs_are_shrunk():
    for format in ("PNG", "WEBP", "TIFF"):
        assert decode(encoded(format=format), max_pixels=LIMIT, buckets=tiny(8)).image.size == (161, 131)


@pytest.mark.parametrize(
    ("data", "ops"),
    [
        (encoded("CMYK"), "draft4,cmyk"),
        (encoded(format="MPO", save_all=True, append_images=[picture()]), "draft4,frame0"),
        (KINDS["4:2:0"] + b"\xff\xd8 something after the end", "draft4"),
        (KINDS["restarts"].replace(b"\xff\xd3", b"\xff\xd4", 1), "draft4"),  # libjpeg mends it, and says so
    ],
    ids=["cmyk", "mpo", "tail", "odd"],
)
def test_what_is_unusual_comes_out_as_it_did(data, ops):
    decoded = decode(data, max_pixels=LIMIT, buckets=tiny(4))
    assert decoded.ops == ops
    image = opened(data)
    shrink(image, 4)
    image.load()
    assert np.array_equal(decoded.pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "grey"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 0.999])
def test_truncated_jpegs_are_rejected_at_every_scale(kind, share):
    data = KINDS[kind][: int(len(KINDS[kind]) * share)]
    for number in (1, 2, 4, 8):
        with pytest.raises(ImageRejected) as caught:
            decode(data, max_pixels=LIMIT, buckets=tiny(number))
        assert caught.value.reason is Reason.TRUNCATED_IMAGE
        assert "damaged JPEG" in caught.value.detail


def test_the_limit_of_pixels_comes_before_any_decoder(monkeypatch):
    monkeypatch.setattr(jpegs, "decode", None)
    with pytest.raises(ImageRejected) as caught:
        decode(KINDS["4:2:0"], max_pixels=161 * 131 - 1, buckets=tiny(4))
    assert caught.value.reason is Reason.TOO_LARGE


def damaged(generator: random.Random) -> bytes:
    data = bytearray(generator.choice([*KINDS.values(), encoded("CMYK")]))
    for _ in range(generator.choice((0, 1, 1, 2, 8))):
        at = generator.randrange(min(len(data), generator.choice((30, 200, 700, 100_000))))
        data[at] = generator.choice((data[at] ^ 1 << generator.randrange(8), generator.randrange(256)))
    cut = generator.random()
    if cut < 0.25:
        del data[generator.randrange(1, len(data)) :]
    elif cut < 0.4:
        at = generator.randrange(len(data))
        del data[at : at + generator.randrange(1, 60)]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_damage_has_the_verdict_of_a_full_decode():
    """Pillow's full decode says which images are good; a quicker way must not let one in that it refuses."""
    generator = random.Random(0)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for _ in range(2500):
        data = damaged(generator)
        try:
            with Image.open(io.BytesIO(data), formats=images._formats()) as image:
                good = image.width * image.height <= LIMIT and image.load() is not None
        except images._DAMAGED:
            good = False
        try:
            found = decode(data, max_pixels=LIMIT, buckets=tiny(generator.choice((1, 2, 4, 8)))).image.mode == "RGB"
        except ImageRejected:
            found = False
        verdicts[good, found] += 1
    assert set(verdicts) == {(True, True), (False, False)}
    assert min(verdicts.values()) > 500
