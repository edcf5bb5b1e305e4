import io
import random
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pixart_data.buckets import bucket_table
from pixart_data.canvases import fit
from pixart_data.images import Decoded, ImageRejected, decode
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import find_units, read_samples

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"
LIMIT = 10**8


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture whose four corners differ."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(decoded: Decoded) -> np.ndarray:
    return np.asarray(decoded.image, dtype=np.int16)


def reason(data: bytes, **options) -> tuple[Reason, str]:
    with pytest.raises(ImageRejected) as caught:
        decode(data, **{"max_pixels": LIMIT, **options})
    return caught.value.reason, caught.value.detail


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats_decode_to_rgb(format):
    decoded = decode(encoded(picture(), format), max_pixels=LIMIT)
    assert decoded.image.mode == "RGB"
    assert (decoded.width_px, decoded.height_px, *decoded.image.size) == (96, 64, 96, 64)
    assert decoded.ops == ("palette" if format == "GIF" else "")
    assert np.abs(pixels(decoded) - np.asarray(picture(), dtype=np.int16)).mean() < 8
    assert np.array_equal(pixels(decoded), pixels(decode(encoded(picture(), format), max_pixels=LIMIT)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(format, orientation):
    upright = picture()
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(stored, format, exif=exif(orientation), **options), max_pixels=LIMIT)
    assert (decoded.width_px, decoded.height_px, *decoded.image.size) == (96, 64, 96, 64)
    assert decoded.ops == (f"exif{orientation}" if orientation > 1 else "")
    assert np.abs(pixels(decoded) - np.asarray(upright, dtype=np.int16)).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_broken_exif_is_ignored(format):
    data = encoded(picture(), format, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01")
    assert decode(data, max_pixels=LIMIT).ops == ""


def test_zero_bytes():
    assert reason(b"")[0] is Reason.ZERO_BYTES


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<!DOCTYPE html><html>not found</html>", "HTML"),
        (b"\n<html>", "HTML"),
        (b'{"error": "gone"}', "text"),
        (b"Access denied", "text ('access denied')"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.4", "PDF"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"PK\x03\x04", "zip"),
        (b"\0" * 600, "zeros"),
        (b"\0\0\0\x18ftypheic", "'heic'"),
        (b"\x01\x02\x03\xff", "bytes 01 02 03 ff"),
    ],
)
def test_what_is_no_image_is_named(data, kind):
    code, detail = reason(data)
    assert code is Reason.NOT_AN_IMAGE
    assert kind in detail


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_truncated_images(format, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    data = encoded(noise, format)
    code, detail = reason(data[: max(12, int(len(data) * share))])
    assert code is Reason.TRUNCATED_IMAGE
    assert format in detail


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that claims a size and holds one byte of pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_huge_images_are_rejected_by_their_header():
    decode(encoded(picture()), max_pixels=LIMIT)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, detail = reason(png_header(30_000, 30_000), max_pixels=200_000_000)
    assert code is Reason.TOO_LARGE
    assert "30000 x 30000" in detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 20_000


def test_the_limit_is_the_callers_not_pillows():
    # Pillow by itself warns from 89 million pixels on and fails from 179 million on.
    assert reason(png_header(14_000, 14_000), max_pixels=200_000_000)[0] is Reason.TRUNCATED_IMAGE
    assert reason(encoded(picture()), max_pixels=96 * 64 - 1)[0] is Reason.TOO_LARGE
    assert decode(encoded(picture()), max_pixels=96 * 64).width_px == 96


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(format):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode(encoded(Image.fromarray(ramp), format), max_pixels=LIMIT)
    assert decoded.ops == "16bit,grey"
    assert np.abs(pixels(decoded)[..., 0] - ramp / 257).max() <= 0.51


def test_integers_and_floats():
    ramp = np.linspace(0, 65535, 4096).astype(np.int32).reshape(64, 64)
    decoded = decode(encoded(Image.fromarray(ramp), "TIFF"), max_pixels=LIMIT)
    assert decoded.ops == "16bit,grey"
    assert np.abs(pixels(decoded)[..., 0] - ramp / 257).max() <= 0.51
    assert reason(encoded(Image.fromarray(ramp - 5), "TIFF"))[0] is Reason.UNSUPPORTED_MODE
    assert reason(encoded(Image.fromarray(ramp * 2), "TIFF"))[0] is Reason.UNSUPPORTED_MODE
    unit = (ramp / 65535).astype(np.float32)
    decoded = decode(encoded(Image.fromarray(unit), "TIFF"), max_pixels=LIMIT)
    assert decoded.ops == "float,grey"
    assert np.abs(pixels(decoded)[..., 0] - unit * 255).max() <= 0.51
    assert reason(encoded(Image.fromarray(unit * 3), "TIFF"))[0] is Reason.UNSUPPORTED_MODE
    unit[3, 3] = np.nan
    assert reason(encoded(Image.fromarray(unit), "TIFF"))[0] is Reason.UNSUPPORTED_MODE


@pytest.mark.parametrize(("mode", "ops"), [("RGBA", "alpha"), ("LA", "grey,alpha")])
def test_alpha_is_composited_on_white(mode, ops):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255)).convert(mode)
    mask = Image.new("L", (8, 8), 255)
    mask.paste(0, (0, 0, 4, 8))
    mask.paste(51, (0, 0, 2, 8))
    image.putalpha(mask)
    decoded = decode(encoded(image), max_pixels=LIMIT)
    assert decoded.ops == ops
    assert [decoded.image.getpixel((x, 0)) for x in (0, 2, 7)] == [(204,) * 3, (255,) * 3, (0,) * 3]


def test_opaque_alpha_changes_nothing():
    decoded = decode(encoded(picture().convert("RGBA")), max_pixels=LIMIT)
    assert decoded.ops == ""
    assert np.array_equal(pixels(decoded), np.asarray(picture()))


@pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
def test_transparent_palette(transparency):
    image = Image.new("P", (4, 4), 3)
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putpixel((0, 0), 1)
    decoded = decode(encoded(image, transparency=transparency), max_pixels=LIMIT)
    assert decoded.ops == "palette,alpha"
    assert decoded.image.getpixel((0, 0)) == (10, 20, 30)
    assert decoded.image.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9)])
def test_transparent_colour(mode, colour):
    decoded = decode(encoded(Image.new(mode, (4, 4), colour), transparency=colour), max_pixels=LIMIT)
    assert decoded.ops == ("grey,alpha" if mode == "L" else "alpha")
    assert decoded.image.getpixel((0, 0)) == (255, 255, 255)


def test_one_bit_palette_and_grey():
    assert decode(encoded(picture().convert("1")), max_pixels=LIMIT).ops == "1bit"
    assert decode(encoded(picture().quantize(16)), max_pixels=LIMIT).ops == "palette"
    decoded = decode(encoded(picture().convert("L")), max_pixels=LIMIT)
    assert decoded.ops == "grey"
    assert np.array_equal(pixels(decoded)[..., 0], np.asarray(picture().convert("L")))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    decoded = decode(encoded(picture().convert("CMYK"), format), max_pixels=LIMIT)
    assert decoded.ops == "cmyk"
    assert np.abs(pixels(decoded) - np.asarray(picture(), dtype=np.int16)).mean() < 8
    data = encoded(picture().convert("CMYK"), format, icc_profile=srgb_profile())
    assert decode(data, max_pixels=LIMIT).ops == "cmyk,icc-ignored"  # a profile of another colour space


def test_lab():
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    decoded = decode(encoded(transform.apply(picture()), "TIFF"), max_pixels=LIMIT)
    assert decoded.ops == "lab"
    assert np.abs(pixels(decoded) - np.asarray(picture(), dtype=np.int16)).mean() < 4


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries have changed places: easy to see whether it was applied."""
    profile = srgb_profile()
    count = int.from_bytes(profile[128:132], "big")
    tags = [profile[132 + 12 * i : 144 + 12 * i] for i in range(count)]
    renamed = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    table = b"".join(renamed.get(tag[:4], tag[:4]) + tag[4:] for tag in tags)
    return profile[:132] + table + profile[132 + 12 * count :]


def cmyk_profile() -> bytes:
    """A CMYK profile in which magenta ink prints green: black takes the light, the others change nothing."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    colours = [(0, 128, 128) if k else (150, 50, 190) if m else (255, 128, 128) for _, m, _, k in corners]
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity
    table += bytes(range(256)) * 4 + b"".join(map(bytes, colours)) + bytes(range(256)) * 3
    table += bytes(-len(table) % 4)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags = struct.pack(">I4sII4sII", 2, b"A2B0", 156, len(table), b"wtpt", 156 + len(table), len(white))
    header = struct.pack(
        ">I4sI4s4s4s12s4s", 156 + len(table) + len(white), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    header += bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + tags + table + white


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_profiles_of_cmyk_are_applied(format):
    magenta = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    decoded = decode(encoded(magenta, format, icc_profile=cmyk_profile()), max_pixels=LIMIT)
    assert decoded.ops == "cmyk,icc"
    red, green, _ = decoded.image.getpixel((8, 8))
    assert green > 100 > 60 > red
    plain = decode(encoded(magenta, format), max_pixels=LIMIT)
    assert plain.ops == "cmyk"
    red, green, _ = plain.image.getpixel((8, 8))
    assert red > 200 > 60 > green


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_profiles_are_applied(format):
    red = Image.new("RGB", (16, 16), (250, 5, 5))
    decoded = decode(encoded(red, format, icc_profile=swapped_profile()), max_pixels=LIMIT)
    assert decoded.ops == "icc"
    assert decoded.image.getpixel((8, 8))[2] > 200 > 60 > decoded.image.getpixel((8, 8))[0]
    assert "icc_profile" not in decoded.image.info


def test_profiles_of_srgb_and_of_transparent_palette_and_grey_pictures():
    plain = encoded(picture(), icc_profile=srgb_profile())
    decoded = decode(plain, max_pixels=LIMIT)
    assert decoded.ops == ""
    assert np.array_equal(pixels(decoded), np.asarray(picture()))
    image = Image.new("RGBA", (16, 16), (250, 5, 5, 0))
    image.putpixel((0, 0), (250, 5, 5, 255))
    decoded = decode(encoded(image, icc_profile=swapped_profile()), max_pixels=LIMIT)
    assert decoded.ops == "icc,alpha"
    assert decoded.image.getpixel((1, 1)) == (255, 255, 255)
    assert decoded.image.getpixel((0, 0))[2] > 200
    data = encoded(picture().quantize(8), icc_profile=swapped_profile())
    assert decode(data, max_pixels=LIMIT).ops == "palette,icc"
    data = encoded(picture().convert("L"), icc_profile=srgb_profile())
    assert decode(data, max_pixels=LIMIT).ops == "grey"


def test_broken_profiles_are_recorded():
    for profile in (b"not a profile", srgb_profile()[:200], b"\0" * 600):
        decoded = decode(encoded(picture(), icc_profile=profile), max_pixels=LIMIT)
        assert decoded.ops == "icc-ignored"
        assert np.array_equal(pixels(decoded), np.asarray(picture()))


def test_long_comments_are_no_damage():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert decode(encoded(picture(), pnginfo=text), max_pixels=LIMIT).ops == ""


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames(format):
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    data = encoded(first, format, save_all=True, append_images=[second])
    decoded = decode(data, max_pixels=LIMIT)
    assert "frame0" in decoded.ops.split(",")
    assert decoded.image.getpixel((8, 8))[0] > 180


@pytest.mark.parametrize(
    ("min_side_px", "shrunk"), [(None, 1), (401, 1), (400, 1), (200, 2), (199, 2), (100, 4), (51, 4), (50, 8), (1, 8)]
)
def test_jpegs_are_shrunk_while_decoding(min_side_px, shrunk):
    decoded = decode(encoded(picture(600, 400), "JPEG", exif=exif(6)), max_pixels=LIMIT, min_side_px=min_side_px)
    assert (decoded.width_px, decoded.height_px) == (400, 600)
    assert decoded.image.size == (400 // shrunk, 600 // shrunk)
    assert decoded.ops == (f"draft{shrunk},exif6" if shrunk > 1 else "exif6")
    assert decode(encoded(picture(600, 400)), max_pixels=LIMIT, min_side_px=min_side_px).ops == ""


def test_a_jpeg_is_the_same_as_array_and_as_picture():
    decoded = decode(encoded(picture(), "JPEG"), max_pixels=LIMIT)
    assert decoded.image.mode == "RGB"
    assert np.array_equal(np.asarray(decoded.image), decoded.pixels)
    turned = decode(encoded(picture(), "JPEG", exif=exif(6)), max_pixels=LIMIT)
    assert turned.pixels.shape == (96, 64, 3)
    assert np.array_equal(np.asarray(turned.image), turned.pixels)
    assert np.array_equal(turned.pixels, np.rot90(decoded.pixels, -1))


def test_damaged_bytes_raise_nothing_else():
    generator = random.Random(0)
    images = [
        encoded(picture(), "JPEG", exif=exif(6), icc_profile=srgb_profile()),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture(), "PNG", exif=exif(3), icc_profile=swapped_profile()),
        encoded(picture().quantize(16), "PNG", transparency=2),
        encoded(picture(), "WEBP", exif=exif(5)),
        encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(9)]),
        encoded(picture(), "TIFF"),
        encoded(picture(), "TIFF", compression="tiff_lzw"),
        encoded(picture(), "BMP"),
    ]
    outcomes = set()
    for _ in range(1500):
        data = bytearray(generator.choice(images))
        for _ in range(generator.choice((0, 1, 2, 8))):
            data[generator.randrange(min(len(data), generator.choice((64, 400, 100_000))))] = generator.randrange(256)
        if generator.random() < 0.4:
            del data[generator.randrange(1, len(data)) :]
        try:
            assert decode(bytes(data), max_pixels=10**6).image.mode == "RGB"
            outcomes.add("ok")
        except ImageRejected as rejected:
            outcomes.add(rejected.reason if rejected.detail else "no detail")
    assert "no detail" not in outcomes
    assert outcomes >= {"ok", Reason.TRUNCATED_IMAGE, Reason.TOO_LARGE, Reason.NOT_AN_IMAGE}


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not on this machine")
def test_real_photographs_decode():
    source = Source(paths=[str(PHOTOS / "*.tar")])
    sizes = set()
    for unit in find_units(source):
        for sample in read_samples(unit, source):
            decoded = decode(sample.data, max_pixels=source.max_image_pixels, min_side_px=128)
            sizes.add(fit(decoded, bucket_table(256)[20]).shape)
    assert sizes == {(256, 256, 3)}
