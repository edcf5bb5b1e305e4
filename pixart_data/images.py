"""Compressed bytes to RGB pixels.

`decode` is the one place where a bad image is told from a good one: the header is checked before any pixel is
decoded, and whatever is wrong comes out as `ImageRejected` with a reason. What was done to a good image on its way
to 8-bit sRGB is kept in `Decoded.ops`.
"""

import functools
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from pixart_data import jpegs
from pixart_data.buckets import Bucket
from pixart_data.records import Reason

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION = 0x0112
_TIFF_BITS = 258
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODE_OPS = {"1": "1bit", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette", "CMYK": "cmyk", "LAB": "lab"}

# What pillow's parsers and decoders raise on damaged files. 400,000 mutated files raised OSError, SyntaxError,
# ValueError, TypeError and RuntimeError; the others are in pillow's sources. Anything else is a bug and escapes.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
    zlib.error,
)

_MAGICS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
_MARKUP = ((b"<!doctype html", "HTML"), (b"<html", "HTML"), (b"<svg", "SVG"), (b"<?xml", "XML"))


class ImageRejected(Exception):
    """Why `decode` gives no image; a signal for the row's `error` and `detail`, not an error of the job."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Decoded:
    """A decoded image: 8-bit sRGB, upright; smaller than the original if it was shrunk while decoding.

    Attributes:
        content: As it came out of the decoder, or of what was done after it: an array (H, W, 3), or a picture. `image`
            and `pixels` give either as the other.
        width_px: Of the original, after the EXIF rotation.
        height_px: Of the original, after the EXIF rotation.
        ops: What was done, comma-separated, in order: `draft<n>` (shrunk n times), `exif<n>` (orientation undone),
            `frame0` (first of several), `16bit`, `float`, `palette`, `grey`, `1bit`, `cmyk`, `lab`, `mode:<X>` (another
            mode converted), `icc` (profile applied), `icc-ignored` (profile broken or of another colour space),
            `alpha` (composited on white). Empty for a plain RGB image.
        box: Left, top, right, bottom of what the original covers of the image, in pixels of the image; less than all
            of it where a side of the original is no multiple of what it was shrunk by.
    """

    content: Image.Image | NDArray[np.uint8]
    width_px: int
    height_px: int
    ops: str
    box: tuple[float, float, float, float]

    @functools.cached_property
    def image(self) -> Image.Image:
        """The picture, of mode RGB."""
        return self.content if isinstance(self.content, Image.Image) else Image.fromarray(self.content)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels (H, W, 3), writable."""
        return np.array(self.content) if isinstance(self.content, Image.Image) else self.content


@dataclass(frozen=True)
class _Limits:
    max_pixels: int
    min_side_px: int | None
    buckets: Sequence[Bucket]


@dataclass
class _Work:
    image: Image.Image
    ops: list[str] = field(default_factory=list)


def decode(data: bytes, *, max_pixels: int, min_side_px: int | None = None, buckets: Sequence[Bucket] = ()) -> Decoded:
    """Decode an image to upright 8-bit sRGB on white.

    Args:
        max_pixels: Images whose header claims more are rejected before anything is allocated for them.
        min_side_px: Lets JPEGs be shrunk by 2, 4 or 8 while decoding, as long as both sides stay at least this long.
        buckets: Lets JPEGs be shrunk as far as resizing them to the nearest of these allows, see `jpegs.least_size`;
            `min_side_px` is not looked at then.

    Raises:
        ImageRejected: With the reason and a detail; nothing else is raised for bad bytes.
    """
    if not data:
        raise ImageRejected(Reason.ZERO_BYTES, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with _open(data) as opened:
                return _convert(data, opened, _Limits(max_pixels, min_side_px, buckets))
    except _DAMAGED as error:
        raise ImageRejected(Reason.TRUNCATED_IMAGE, f"damaged {_kind(data)}, {len(data)} bytes: {error}") from error
    except MemoryError as error:
        raise ImageRejected(Reason.TOO_LARGE, f"{_kind(data)}, {len(data)} bytes: out of memory") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Prepare Pillow for the whole process, once, and return the formats it can read here."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # decode() checks every header against its own limit before any pixel is read
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # generators embed workflows of megabytes; pillow gives up at one
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        kind = _kind(data)
        if kind in _FORMATS:
            detail = f"damaged {kind}, {len(data)} bytes: its header cannot be read"
            raise ImageRejected(Reason.TRUNCATED_IMAGE, detail) from None
        detail = f"expected an image, found {kind}, {len(data)} bytes"
        raise ImageRejected(Reason.NOT_AN_IMAGE, detail) from None


def _convert(data: bytes, opened: Image.Image, limits: _Limits) -> Decoded:
    width_px, height_px = opened.size
    if width_px * height_px > limits.max_pixels:
        detail = f"{width_px} x {height_px} pixels, more than {limits.max_pixels}"
        raise ImageRejected(Reason.TOO_LARGE, detail)
    bits = _tag(opened, _TIFF_BITS)
    orientation = _tag(opened, _ORIENTATION)  # pillow turns TIFFs upright itself, header size included
    divisor = _divisor(opened, limits)
    several = _has_several_frames(opened)
    pixels = jpegs.decode(data, opened, divisor)
    ops = [f"draft{divisor}"] if divisor > 1 else []
    if pixels is not None and _is_plain(opened):  # most photographs: into a picture and back would be two copies
        return Decoded(pixels, width_px, height_px, ",".join(ops), jpegs.box(opened.size, divisor))
    work = _Work(_load(opened, divisor) if pixels is None else Image.fromarray(pixels), ops)
    if orientation in _TRANSPOSES:
        work.ops.append(f"exif{orientation}")
    else:
        orientation = _exif_orientation(opened)
        if orientation in _TRANSPOSES:
            work.image = work.image.transpose(_TRANSPOSES[orientation])
            work.ops.append(f"exif{orientation}")
            if orientation >= 5:
                width_px, height_px = height_px, width_px
    if several:
        work.ops.append("frame0")
    profile = opened.info.get("icc_profile")
    _to_eight_bits(work, bits)
    _to_rgb(work, profile if isinstance(profile, bytes) else b"")
    work.image.info.clear()  # whoever saves it must not embed the profile that was applied
    box = jpegs.box((width_px, height_px), divisor, orientation)
    return Decoded(work.image, width_px, height_px, ",".join(work.ops), box)


def _load(opened: Image.Image, divisor: int) -> Image.Image:
    jpegs.shrink(opened, divisor)
    opened.load()
    return opened


def _is_plain(opened: Image.Image) -> bool:
    """Say whether the pixels of a JPEG are upright sRGB as they come out of the decoder."""
    return opened.mode == "RGB" and "icc_profile" not in opened.info and _exif_orientation(opened) not in _TRANSPOSES


def _divisor(opened: Image.Image, limits: _Limits) -> int:
    """Return by how much the image is to be shrunk while it is decoded."""
    if opened.format not in ("JPEG", "MPO"):
        return 1
    if not limits.buckets:
        return jpegs.divisor(opened.size, (limits.min_side_px,) * 2) if limits.min_side_px else 1
    turned = _exif_orientation(opened) >= 5
    width_px, height_px = jpegs.least_size(opened.size[::-1] if turned else opened.size, limits.buckets)
    return jpegs.divisor(opened.size, (height_px, width_px) if turned else (width_px, height_px))


# Header


def _tag(image: Image.Image, number: int) -> Any:
    """Return a tag of a TIFF; None if it is none."""
    tags = getattr(image, "tag_v2", None)
    return tags.get(number) if tags is not None and image.format == "TIFF" else None


def _has_several_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _DAMAGED:  # the second frame; the first may be well
        return False


def _exif_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) else 1


# Pixels


def _to_eight_bits(work: _Work, bits: Any) -> None:
    """Scale 16-bit grey and 0..1 floats to 8 bits; pillow itself would clip them."""
    mode = work.image.mode
    if mode != "F" and not mode.startswith("I"):
        return
    pixels = np.asarray(work.image)
    if mode == "F":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise ImageRejected(Reason.UNSUPPORTED_MODE, "floating-point pixels that are not all within 0 and 1")
        scaled = np.rint(pixels.astype(np.float64) * 255)
        work.ops.append("float")
    else:
        top = 4095 if bits == (12,) else 65535
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > top:
            raise ImageRejected(Reason.UNSUPPORTED_MODE, f"integer pixels from {low} to {high}, not within 0 and {top}")
        scaled = (pixels.astype(np.uint64) * 255 + top // 2) // top
        work.ops.append("16bit")
    work.image = Image.fromarray(scaled.astype(np.uint8))


def _to_rgb(work: _Work, profile: bytes) -> None:
    image = work.image
    mode = image.mode
    if mode in _MODE_OPS:
        work.ops.append(_MODE_OPS[mode])
    alpha = None
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = image.getchannel("L") if mode in ("L", "LA") else with_alpha.convert("RGB")
    elif mode in ("1", "P"):
        image = image.convert("RGB")
    elif mode in ("YCbCr", "HSV", "RGBX"):
        work.ops.append(f"mode:{mode}")
        image = image.convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        raise ImageRejected(Reason.UNSUPPORTED_MODE, f"pixels of mode {mode}")
    image = _to_srgb(image, profile if mode != "LAB" else b"", work.ops)
    if alpha is not None and alpha.getextrema() != (255, 255):
        image = Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), alpha)
        work.ops.append("alpha")
    work.image = image


def _to_srgb(image: Image.Image, profile: bytes, ops: list[str]) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    if image.mode == "L" and profile[16:20] == b"RGB ":  # common: grey pixels with the profile of a colour camera
        image = image.convert("RGB")
    try:
        transform = _transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        ops.append("icc-ignored")
        return image.convert("RGB")
    if transform is None:
        return image.convert("RGB")
    ops.append("icc")
    return transform.apply(image, Image.new("RGB", image.size))


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it changes nothing, as sRGB's own many spellings do.

    Raises:
        ImageCms.PyCMSError: If the profile is broken or belongs to another colour space than the pixels.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    transform = ImageCms.buildTransform(
        source, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    )
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    channels = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    colours = Image.fromarray(channels).convert(mode)
    before = np.asarray(colours.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(colours, Image.new("RGB", colours.size)), dtype=np.int16)
    return transform if np.abs(after - before).max() > 2 else None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


# What the bytes are


def _kind(data: bytes) -> str:
    """Name the kind of a file by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1")
        return "AVIF" if brand in ("avif", "avis") else f"a media file ({brand!a})"
    head = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    named = [name for magic, name in _MAGICS if data.startswith(magic)]
    named += [name for magic, name in _MARKUP if head.startswith(magic)]
    if named:
        return named[0]
    if not any(data[:256]):
        return "zeros"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head) and b"\x7f" not in head:
        return f"text ({head[:32].decode('utf-8', 'replace')!r})"
    return f"bytes {data[:8].hex(' ')}"
