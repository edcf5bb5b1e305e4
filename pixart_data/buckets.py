"""Aspect-ratio buckets: which canvas an image goes to, and the resize and crop that get it there.

Units are pixels; one latent cell is 8 px. A ratio is height / width, as in the reference, whose 40 training buckets
for 256, 512 and 1024 px are one table in units of resolution / 16. Unlike the reference, which takes the nearest
ratio on a linear scale and so favours tall canvases for wide images, nearness here is |log(a / b)|.
Source: PixArt-alpha (arXiv:2310.00426), section "multi-aspect"; SDXL (arXiv:2307.01952).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pixart_data.errors import ConfigError, DataError

RESOLUTIONS_PX = (256, 512, 1024)
MULTIPLE_PX = 16
"""Sides of canvases are multiples of this: a latent cell of 8 px times the model's patch of 2 cells."""

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")

# (height, width) in sixteenths of the resolution, from the widest canvas to the tallest.
_CELLS = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23),
    (11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16),
    (16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11),
    (23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """A canvas. `ratio` is height / width with two decimals, the name of its folder in a feature set."""

    ratio: str
    height_px: int
    width_px: int


@dataclass(frozen=True)
class Placement:
    """How an image fills its bucket: resize to cover, then cut the centre."""

    resized_width_px: int
    resized_height_px: int
    crop_left_px: int
    crop_top_px: int


def bucket_table(resolution_px: int) -> tuple[Bucket, ...]:
    """Return the reference's 40 buckets for a resolution, ordered by ratio from 0.25 to 4.0.

    Raises:
        ConfigError: If the resolution is not 256, 512 or 1024.
    """
    if resolution_px not in RESOLUTIONS_PX:
        raise ConfigError(f"resolution: expected one of {RESOLUTIONS_PX}, got {resolution_px}")
    unit = resolution_px // 16
    return tuple(Bucket(f"{h / w:.2f}", h * unit, w * unit) for h, w in _CELLS)


def custom_table(sizes: Sequence[str], resolution_px: int) -> tuple[Bucket, ...]:
    """Return the buckets of a table of one's own, ordered by ratio, whatever the order they are given in.

    Args:
        sizes: `HEIGHTxWIDTH` in pixels, e.g. `288x224`.
        resolution_px: Side of the square of about their area.

    Raises:
        ConfigError: If one is spelt otherwise, has a side that the model cannot take or an area that is not about that
            of the square, or two have the same ratio at two decimals and so would share a folder.
    """
    if not sizes:
        raise ConfigError("expected at least one canvas, found none")
    table = sorted((_bucket(size, resolution_px) for size in sizes), key=lambda b: b.height_px / b.width_px)
    for first, second in zip(table, table[1:], strict=False):
        if first.ratio == second.ratio:
            raise ConfigError(
                "expected canvases whose height / width differs at two decimals, which name their folders, found "
                f"'{size_name(first)}' and '{size_name(second)}', both {first.ratio}; leave one out"
            )
    return tuple(table)


def _bucket(size: str, resolution_px: int) -> Bucket:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(f"expected HEIGHTxWIDTH in px, e.g. '{resolution_px}x{resolution_px}', found {size!r}")
    height_px, width_px = int(match[1]), int(match[2])
    if height_px % MULTIPLE_PX or width_px % MULTIPLE_PX:
        near = "x".join(str(max(1, round(side / MULTIPLE_PX)) * MULTIPLE_PX) for side in (height_px, width_px))
        raise ConfigError(
            f"expected sides that are multiples of {MULTIPLE_PX} px (a latent cell of 8 px times the model's patch of "
            f"2), found '{size}'; use {near}"
        )
    if not 0.5 <= height_px * width_px / resolution_px**2 <= 2.0:
        raise ConfigError(
            f"expected canvases with half to twice the area of {resolution_px} x {resolution_px} px, found '{size}'; "
            "leave it out, or set image.resolution_px to what the table was made for"
        )
    return Bucket(f"{height_px / width_px:.2f}", height_px, width_px)


def size_name(bucket: Bucket) -> str:
    """Return a canvas as job files spell it."""
    return f"{bucket.height_px}x{bucket.width_px}"


def nearest_bucket(width_px: int, height_px: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is closest, measured as |log(a / b)|.

    Args:
        width_px: Width after the EXIF rotation.
        height_px: Height after the EXIF rotation.
        buckets: Not empty; ties go to the earlier one.

    Raises:
        DataError: If a side is not positive.
    """
    if width_px <= 0 or height_px <= 0:
        raise DataError(f"image size: expected positive sides, got {width_px} x {height_px}")
    log_ratio = math.log(height_px / width_px)
    return min(buckets, key=lambda b: abs(math.log(b.height_px / b.width_px) - log_ratio))


def place(width_px: int, height_px: int, bucket: Bucket) -> Placement:
    """Return the smallest aspect-preserving resize that covers the bucket, and the centred crop in it."""
    scale = max(bucket.width_px / width_px, bucket.height_px / height_px)
    resized_width_px = max(bucket.width_px, round(width_px * scale))
    resized_height_px = max(bucket.height_px, round(height_px * scale))
    return Placement(
        resized_width_px,
        resized_height_px,
        (resized_width_px - bucket.width_px) // 2,
        (resized_height_px - bucket.height_px) // 2,
    )
