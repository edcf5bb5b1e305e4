"""JPEGs decoded at a half, a quarter or an eighth of their size, for the price of what is kept.

A JPEG is coded in blocks of 8 x 8 pixels, each a sum of cosines. A decoder can compute 4 x 4, 2 x 2 or 1 x 1 pixels of
a block from its low frequencies alone, and never makes the others. libjpeg-turbo also knows 3/8, 5/8 and the like;
they are not used: without SIMD code they take longer than the full size, and they are less like a good resize than the
next smaller power of two (docs/LOG.md).

Two libraries decode with libjpeg-turbo, to the same bytes: `simplejpeg`, about a tenth faster, and Pillow. The first is
only taken at its word when it found nothing at all to complain of; for every doubt Pillow decodes again and its
verdict counts, so what is damaged does not depend on what is installed.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixart_data.buckets import Bucket, nearest_bucket

# A JPEG is never decoded to less than this many times the size that it is then resized to. Against Lanczos of the full
# size, photographs of fine detail then keep 43 dB in the worst case; at 1.67 times 41, at 1.33 times 37.
OVERSAMPLING = 2
_DIVISORS = (8, 4, 2)


def divisor(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return 8, 4, 2 or 1: by how much a JPEG can be shrunk so that neither side falls below its least length.

    Args:
        size: Width and height in pixels.
        least: Width and height in pixels.
    """
    fitting = (n for n in _DIVISORS if size[0] >= n * least[0] and size[1] >= n * least[1])
    return next(fitting, 1)


def least_size(size: tuple[int, int], buckets: Sequence[Bucket]) -> tuple[int, int]:
    """Return the least width and height in pixels from which an upright image can still be resized well."""
    bucket = nearest_bucket(*size, buckets)
    return OVERSAMPLING * bucket.width_px, OVERSAMPLING * bucket.height_px


def decoder() -> str:
    """Return the name of the library that decodes good JPEGs here."""
    return "simplejpeg" if importlib.util.find_spec("simplejpeg") else "pillow"


def decode(data: bytes, opened: Image.Image, number: int) -> NDArray[np.uint8] | None:
    """Decode a good JPEG as Pillow would after `shrink`, to the same bytes.

    Args:
        opened: What Pillow made of its header.
        number: The divisor of its sides.

    Returns:
        Pixels (ceil(H / number), ceil(W / number), 3), or without the last axis if it is grey; None if Pillow has to
        decode it: colours other than RGB and grey, several pictures in one file, anything odd or damaged.
    """
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L") or decoder() != "simplejpeg":
        return None
    import simplejpeg  # type: ignore[import-untyped]

    width_px, height_px = (-(-side // number) for side in opened.size)
    colours = "rgb" if opened.mode == "RGB" else "gray"
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, min_height=height_px, min_width=width_px)
    except (ValueError, RuntimeError):  # warnings of libjpeg included: pillow does not hear them
        return None
    if pixels.shape[:2] != (height_px, width_px):
        return None
    return pixels if opened.mode == "RGB" else pixels[..., 0]


def shrink(opened: Image.Image, number: int) -> None:
    """Tell Pillow to decode a JPEG at its size over `number`."""
    if number > 1:
        opened.draft(None, (max(1, opened.width // number), max(1, opened.height // number)))


def box(size: tuple[int, int], number: int, orientation: Any = None) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of what the original covers of its shrunk and upright image, in its pixels.

    A side that is no multiple of the divisor is rounded up: the last column or row then reaches beyond the original.
    Ignoring that would move what lies there by up to half a pixel of the result.

    Args:
        size: Upright width and height of the original in pixels.
        number: The divisor.
        orientation: The EXIF orientation that has been undone; it says to which end the last column has gone.
    """
    width_px, height_px = (side / number for side in size)
    left = -(-size[0] // number) - width_px if orientation in (2, 3, 6, 7) else 0.0
    top = -(-size[1] // number) - height_px if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width_px, top + height_px
