"""Is what a server sent an image that the next stages can use? Told from its bytes, never from a header or a name."""

import functools
import hashlib
import struct
import warnings
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from pixart_data.images import ImageRejected, decode
from pixart_data.records import Reason
from pixart_data.sections import Downloads

_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
}
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, struct.error)  # see images.py


@dataclass(frozen=True)
class ImageFacts:
    """What is written down of an image; sizes are those after the EXIF rotation."""

    extension: str
    size_bytes: int
    width_px: int
    height_px: int
    sha256: str


def check_image(data: bytes, config: Downloads) -> ImageFacts:
    """Look at an image as closely as `downloads.check` says.

    Raises:
        ImageRejected: With the reason.
    """
    if config.check == "full":
        decoded = decode(data, max_pixels=config.max_image_pixels, min_side_px=1)  # JPEGs at an eighth: cheap, and all
        extension, _, _ = _header(data)
        width_px, height_px = decoded.width_px, decoded.height_px
    else:
        extension, width_px, height_px = _header(data)
    _check_size(width_px, height_px, config)
    return ImageFacts(extension, len(data), width_px, height_px, hashlib.sha256(data).hexdigest())


def _header(data: bytes) -> tuple[str, int, int]:
    """Return the extension, width and height without decoding any pixel."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(BytesIO(data), formats=_formats()) as image:
                width_px, height_px = image.size
                if image.format != "TIFF" and _orientation(image) in _TURNED:  # of TIFFs, pillow gives the turned size
                    width_px, height_px = height_px, width_px
                return _EXTENSIONS[image.format or ""], width_px, height_px
    except Image.DecompressionBombError as error:
        raise ImageRejected(Reason.TOO_LARGE, str(error)) from error
    except _DAMAGED as error:
        decode(data, max_pixels=1)  # finds the words for what is wrong, and allocates nothing should nothing be
        raise ImageRejected(Reason.TRUNCATED_IMAGE, f"its header cannot be read: {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) else 1


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _EXTENSIONS if name in Image.OPEN)


def _check_size(width_px: int, height_px: int, config: Downloads) -> None:
    short_px, long_px = sorted((width_px, height_px))
    size = f"{width_px} x {height_px} pixels"
    if width_px * height_px > config.max_image_pixels:
        raise ImageRejected(Reason.TOO_LARGE, f"{size}, more than {config.max_image_pixels}")
    if short_px < config.min_side_px:
        raise ImageRejected(Reason.TOO_SMALL, f"{size}, the shorter side under {config.min_side_px}")
    if config.max_aspect is not None and long_px > config.max_aspect * short_px:
        raise ImageRejected(Reason.EXTREME_ASPECT, f"{size}, sides of more than {config.max_aspect:g} : 1")
