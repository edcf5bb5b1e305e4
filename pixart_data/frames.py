"""The sizes of the images behind a set of captions: resolutions, canvases, and what is lost on the way to a canvas.

Every image is placed as `extract` places it: on the canvas of the nearest ratio, resized to cover it, its centre cut
out. All is counted in whole numbers, so that parts add up to the same figures in any order.

Legend: n images, B canvases of the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.buckets import bucket_table, custom_table, nearest_bucket
from pixart_data.errors import DataError

MOST_SIDE_PX = (1 << 31) - 1
"""No image format has longer sides; what claims more has no size."""

_ROWS_AT_ONCE = 1 << 20
_PPB = 10**9
_AREA_EDGES = np.round(2.0 ** (np.arange(16, 61) / 2)).astype(np.int64)  # px: half-octaves from 256 to 2 ** 30
_SIDE_EDGES = np.round(2.0 ** (np.arange(16, 61) / 4)).astype(np.int64)  # px: quarter-octaves from 16 to 32768
_LOSS_BINS = 100
_NEARLY = 1e-9  # of logarithms of ratios: closer to the middle of two canvases, rounding might decide otherwise

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Sides: TypeAlias = pa.Array | pa.ChunkedArray | npt.NDArray[Any] | Sequence[float | None]
"""Widths or heights in pixels; what is null, no number, not finite or below 1 is no size."""


@dataclass(eq=False)
class _Tally:
    """What is counted; arrays are (B,) but for the histograms."""

    images: Ints
    upscaled: Ints
    lost_ppb: Ints
    areas: Ints
    sides: Ints
    losses: Ints
    num_without_size: int = 0


class FrameCounter:
    """Counts images by their original sizes, upright.

    `to_json` gives, of the images that have a size:

        {"resolution_px": 256, "num_images": 3, "num_without_size": 1, "num_upscaled": 1, "share_upscaled": 0.333,
         "crop_loss": {"mean": 0.031, "p99": 0.12, "edges": [0.0, 0.01, ..., 1.0], "counts": [...]},
         "megapixels": {"edges": [...], "counts": [...]}, "shorter_side_px": {"edges": [...], "counts": [...]},
         "buckets": [{"ratio": "0.25", "height_px": 128, "width_px": 512, "count": 0, "num_upscaled": 0,
                      "mean_crop_loss": 0.0, "lost_ppb": 0}, ...]}

    Histograms have one edge more than counts; a bin holds its lower edge, and the first and the last hold what is
    beyond them. Losses are the share of the resized pixels that the crop cuts off; `p99` is the least edge that no more
    than one image in a hundred exceeds. Upscaled images are smaller than their canvas in width or height. Buckets go
    from the widest to the tallest. Means and shares of nothing are 0.

    Example:
        >>> counter = FrameCounter(resolution_px=512)
        >>> counter.add([1024, 600, None], [1024, 800, 480])
        >>> counter.to_json()["num_images"], counter.to_json()["num_without_size"]
        (2, 1)

    Args:
        resolution_px: 256, 512 or 1024.
        buckets: A table of one's own, as `image.buckets` of `extract` has it; the reference's without.

    Raises:
        ConfigError: If there is no such table.
    """

    def __init__(self, resolution_px: int = 256, buckets: Sequence[str] | None = None) -> None:
        self.resolution_px = resolution_px
        self.table = custom_table(buckets, resolution_px) if buckets else bucket_table(resolution_px)
        self._height_px = np.array([bucket.height_px for bucket in self.table])
        self._width_px = np.array([bucket.width_px for bucket in self.table])
        log_canvas = np.log(self._height_px / self._width_px)
        self._middles = (log_canvas[1:] + log_canvas[:-1]) / 2
        self._tally = _Tally(
            images=_zeros(len(self.table)),
            upscaled=_zeros(len(self.table)),
            lost_ppb=_zeros(len(self.table)),
            areas=_zeros(len(_AREA_EDGES) - 1),
            sides=_zeros(len(_SIDE_EDGES) - 1),
            losses=_zeros(_LOSS_BINS),
        )

    def add(self, widths_px: Sides, heights_px: Sides) -> None:
        """Count images, (n,) and (n,); those without a size only as such.

        Raises:
            ValueError: If there are more widths than heights, or fewer.
        """
        width_px, height_px = _whole(widths_px), _whole(heights_px)
        if len(width_px) != len(height_px):
            raise ValueError(f"expected a height for each width, found {len(height_px)} for {len(width_px)}")
        for start in range(0, len(width_px), _ROWS_AT_ONCE):
            self._count(width_px[start : start + _ROWS_AT_ONCE], height_px[start : start + _ROWS_AT_ONCE])

    def _count(self, width_px: Ints, height_px: Ints) -> None:
        tally = self._tally
        sized = (width_px > 0) & (height_px > 0)
        tally.num_without_size += int(len(sized) - np.count_nonzero(sized))
        width_px, height_px = width_px[sized], height_px[sized]
        nearest = self._nearest(width_px, height_px)
        canvas_width_px, canvas_height_px = self._width_px[nearest], self._height_px[nearest]
        # As `buckets.place` has it, rounding included.
        scale = np.maximum(canvas_width_px / width_px, canvas_height_px / height_px)
        resized_width_px = np.maximum(canvas_width_px, np.rint(width_px * scale))
        resized_height_px = np.maximum(canvas_height_px, np.rint(height_px * scale))
        loss = 1 - canvas_width_px * canvas_height_px / (resized_width_px * resized_height_px)
        tally.images += np.bincount(nearest, minlength=len(self.table))
        tally.upscaled += np.bincount(nearest[scale > 1], minlength=len(self.table))
        np.add.at(tally.lost_ppb, nearest, np.rint(loss * _PPB).astype(np.int64))
        tally.areas += _histogram(width_px * height_px, _AREA_EDGES)
        tally.sides += _histogram(np.minimum(width_px, height_px), _SIDE_EDGES)
        bins = np.minimum((loss * _LOSS_BINS).astype(np.int64), _LOSS_BINS - 1)
        tally.losses += np.bincount(bins, minlength=_LOSS_BINS)

    def _nearest(self, width_px: Ints, height_px: Ints) -> Ints:
        """Return the number of each image's canvas, as `buckets.nearest_bucket` chooses it, ties included."""
        log_ratio = np.log(height_px / width_px)
        nearest = np.searchsorted(self._middles, log_ratio, side="left")
        if len(self._middles):
            beside = np.stack([np.maximum(nearest - 1, 0), np.minimum(nearest, len(self._middles) - 1)])
            close = np.flatnonzero(np.abs(self._middles[beside] - log_ratio).min(axis=0) < _NEARLY)
            pairs, place = np.unique(np.stack([width_px[close], height_px[close]]), axis=1, return_inverse=True)
            chosen = [self.table.index(nearest_bucket(int(w), int(h), self.table)) for w, h in pairs.T]
            nearest[close] = np.array(chosen, np.int64)[place.ravel()]
        return np.asarray(nearest, np.int64)

    def merge(self, other: "FrameCounter") -> None:
        """Add what another counter counted.

        Raises:
            DataError: If its table is another.
        """
        if (other.resolution_px, other.table) != (self.resolution_px, self.table):
            raise DataError(
                f"sizes of images: expected those counted on {len(self.table)} canvases of {self.resolution_px} px, "
                f"found {len(other.table)} of {other.resolution_px} px; count again with one table"
            )
        for name, value in vars(other._tally).items():
            setattr(self._tally, name, getattr(self._tally, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Return all that was counted, as the class describes it."""
        tally = self._tally
        num_images, num_upscaled = int(tally.images.sum()), int(tally.upscaled.sum())
        loss_edges = [number / _LOSS_BINS for number in range(_LOSS_BINS + 1)]
        up_to = np.searchsorted(np.cumsum(tally.losses), num_images - num_images // 100)
        return {
            "resolution_px": self.resolution_px,
            "num_images": num_images,
            "num_without_size": tally.num_without_size,
            "num_upscaled": num_upscaled,
            "share_upscaled": num_upscaled / max(num_images, 1),
            "crop_loss": {
                "mean": int(tally.lost_ppb.sum()) / _PPB / max(num_images, 1),
                "p99": loss_edges[int(up_to) + 1] if num_images else 0.0,
                "edges": loss_edges,
                "counts": tally.losses.tolist(),
            },
            "megapixels": {"edges": (_AREA_EDGES / 1e6).tolist(), "counts": tally.areas.tolist()},
            "shorter_side_px": {"edges": _SIDE_EDGES.tolist(), "counts": tally.sides.tolist()},
            "buckets": [self._bucket(number) for number in range(len(self.table))],
        }

    def _bucket(self, number: int) -> dict[str, Any]:
        bucket, tally = self.table[number], self._tally
        count, lost_ppb = int(tally.images[number]), int(tally.lost_ppb[number])
        return {
            "ratio": bucket.ratio,
            "height_px": bucket.height_px,
            "width_px": bucket.width_px,
            "count": count,
            "num_upscaled": int(tally.upscaled[number]),
            "mean_crop_loss": lost_ppb / _PPB / max(count, 1),
            "lost_ppb": lost_ppb,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "FrameCounter":
        """Return the counter whose `to_json` this is, to be merged or added to.

        Raises:
            DataError: If it is none.
        """
        try:
            canvases = [f"{bucket['height_px']}x{bucket['width_px']}" for bucket in facts["buckets"]]
            counter = cls(facts["resolution_px"], canvases)
            tally = counter._tally
            tally.num_without_size = int(facts["num_without_size"])
            for array, name in (
                (tally.images, "count"),
                (tally.upscaled, "num_upscaled"),
                (tally.lost_ppb, "lost_ppb"),
            ):
                array[:] = np.reshape([bucket[name] for bucket in facts["buckets"]], array.shape)
            for array, name in (
                (tally.areas, "megapixels"),
                (tally.sides, "shorter_side_px"),
                (tally.losses, "crop_loss"),
            ):
                array[:] = np.reshape(facts[name]["counts"], array.shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"sizes of images: expected what a count of them wrote, found {problem}") from error
        return counter


def _zeros(size: int) -> Ints:
    return np.zeros(size, np.int64)


def _histogram(values: Ints, edges: Ints) -> Ints:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(bins, minlength=len(edges) - 1)


def _whole(sides: Sides) -> Ints:
    """Return whole pixels, 0 for what is no size."""
    if isinstance(sides, pa.Array | pa.ChunkedArray):
        values = _of_arrow(sides)
    elif isinstance(sides, np.ndarray):
        values = sides.astype(np.float64) if sides.dtype.kind in "iuf" else np.zeros(len(sides))
    else:
        values = np.array([_of_python(side) for side in sides], np.float64)
    good = (values >= 1) & (values <= MOST_SIDE_PX)  # not for NaN
    return np.where(good, values, 0).astype(np.int64)


def _of_arrow(sides: pa.Array | pa.ChunkedArray) -> Floats:
    kind = sides.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return np.zeros(len(sides))
    values = pc.fill_null(sides.cast(pa.float64(), safe=False), 0.0)
    return np.asarray(values.to_numpy() if isinstance(sides, pa.ChunkedArray) else values.to_numpy(False))


def _of_python(side: object) -> float:
    try:
        return float(side) if isinstance(side, int | float) else 0.0
    except OverflowError:
        return 0.0
