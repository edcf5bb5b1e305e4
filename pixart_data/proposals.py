"""Bucket tables made for the sizes of a pile of images, and what any table loses on them.

An image of ratio r on the nearest canvas, of ratio c, loses 1 - exp(-|log r - log c|) of its pixels to the crop. Ranks
with canvases of different area wait for the one with the largest. `propose` finds, among all choices of k canvases out
of the candidates, one with the least sum of both: on the line of log ratios the images between two neighbouring
canvases go to the nearer of the two, whatever else is chosen, so that a dynamic program over neighbours is exact, like
that of one-dimensional k-medians (Wang and Song 2011, "Ckmeans.1d.dp").

Shapes in comments: M candidates, from the widest to the tallest; n distinct ratios of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pixart_data.buckets import MULTIPLE_PX, Bucket
from pixart_data.errors import ConfigError
from pixart_data.sizes import Sizes

WORST_SHARE = 0.01
"""The share of images that `Losses.worst` is exceeded by."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Losses:
    """What a table costs on given images. All shares are of 1.

    Attributes:
        cropped: Share of an image's pixels that its canvas cuts off, the mean over the images.
        worst: The share that one image in a hundred exceeds.
        enlarged: Share of the images that are smaller than their canvas and so are enlarged.
        waiting: Share of GPU time in which ranks wait for the one with the largest canvas; the time of a batch is
            taken to grow with the area.
        counts: Images of each canvas of the table.
        rare: Share of the images in canvases with less than a global batch of them.
        carried: Share of the images that the first epoch leaves over for the second: less than a batch of each canvas.
    """

    cropped: float
    worst: float
    enlarged: float
    waiting: float
    counts: tuple[int, ...]
    rare: float
    carried: float

    @property
    def total(self) -> float:
        """What tables are compared by: pixels cropped and time waited, both shares of what was paid for."""
        return self.cropped + self.waiting

    @property
    def num_used(self) -> int:
        """Canvases with images: the shapes that a compiled model is compiled for."""
        return sum(count > 0 for count in self.counts)


def losses(sizes: Sizes, table: Sequence[Bucket], batch_size: int, num_gpus: int) -> Losses:
    """Measure a table, assigning images as `buckets.nearest_bucket` does.

    Args:
        table: Ordered by ratio.
        batch_size: Of one rank; a batch is of one canvas, and each rank has a canvas of its own.
    """
    log_ratio = np.log(sizes.height_px / sizes.width_px)
    log_canvas = np.array([np.log(b.height_px / b.width_px) for b in table])
    nearest = np.searchsorted((log_canvas[1:] + log_canvas[:-1]) / 2, log_ratio, side="left")
    crop = 1 - np.exp(-np.abs(log_ratio - log_canvas[nearest]))
    counts = np.bincount(nearest, weights=sizes.count, minlength=len(table)).astype(np.int64)
    height_px, width_px = (np.array([getattr(b, name) for b in table]) for name in ("height_px", "width_px"))
    small = (sizes.height_px < height_px[nearest]) | (sizes.width_px < width_px[nearest])
    num_images = sizes.num_images
    rare = counts[counts < batch_size * num_gpus]
    return Losses(
        cropped=float(crop @ sizes.count) / num_images,
        worst=_exceeded_by(crop, sizes.count, WORST_SHARE),
        enlarged=float(sizes.count[small].sum()) / num_images,
        waiting=_waiting(height_px * width_px, counts, num_gpus),
        counts=tuple(counts.tolist()),
        rare=float(rare.sum()) / num_images,
        carried=float((counts % batch_size).sum()) / num_images,
    )


def _exceeded_by(values: Floats, weights: Ints, share: float) -> float:
    """Return the least of the values that no more than a share of the weight exceeds."""
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(below, (1 - share) * below[-1])]])


def _waiting(areas: Ints, counts: Ints, num_gpus: int) -> float:
    """Return 1 - mean / E[max] of the area of `num_gpus` canvases, drawn independently by their images."""
    order = np.argsort(areas)
    areas, shares = areas[order], counts[order] / counts.sum()
    up_to = np.minimum(np.cumsum(shares), 1.0) ** num_gpus  # P(all are at most this large)
    largest = float(np.diff(up_to, prepend=0.0) @ areas)
    return max(0.0, 1 - float(shares @ areas) / largest)


def candidates(resolution_px: int, multiple_px: int, min_area: float, max_aspect: float) -> tuple[Bucket, ...]:
    """Return all canvases of about the area of a square and none of more, which would need memory, ordered by ratio.

    Args:
        resolution_px: Side of the square.
        multiple_px: Of the sides.
        min_area: Least share of the square's area.
        max_aspect: Longer over shorter side, at most.

    Raises:
        ConfigError: If `multiple_px` is no multiple of what the model takes, or does not divide the square's side.
    """
    if multiple_px % MULTIPLE_PX or resolution_px % multiple_px:
        raise ConfigError(
            f"multiple_px: expected a multiple of {MULTIPLE_PX} that divides {resolution_px}, found {multiple_px}; "
            f"use {MULTIPLE_PX}"
        )
    full, longest = resolution_px**2, int(resolution_px * max_aspect)
    largest: dict[float, tuple[int, int]] = {}  # of canvases of one ratio, such as all squares, the largest
    for height_px in range(multiple_px, longest + 1, multiple_px):
        for width_px in range(multiple_px, full // height_px + 1, multiple_px):
            aspect = max(height_px / width_px, width_px / height_px)
            if height_px * width_px >= min_area * full and aspect <= max_aspect:
                largest[height_px / width_px] = (height_px, width_px)
    return tuple(Bucket(f"{ratio:.2f}", *largest[ratio]) for ratio in sorted(largest))


def propose(
    sizes: Sizes, choices: Sequence[Bucket], most: int, num_gpus: int, min_images: int
) -> dict[int, tuple[Bucket, ...]]:
    """Return the best table of each number of canvases from 1 to `most`, as far as there is one.

    Best is the least sum of pixels cropped and, with more than one GPU, of the area by which canvases fall short of
    the largest candidate: that is what ranks wait in the limit of many GPUs.

    Args:
        choices: From `candidates`.
        most: Largest number of canvases to look for.
        min_images: Images that every canvas of a table gets at least.
    """
    costs = _costs(sizes, choices, num_gpus > 1)
    search = _Search(costs, min_images)
    tables = {}
    for number in range(1, min(most, len(choices)) + 1):
        chosen = search.best(number)
        if chosen is not None:
            tables[number] = tuple(choices[i] for i in chosen)
    return tables


@dataclass(frozen=True)
class _Costs:
    """What neighbouring canvases cost the images between them.

    Attributes:
        between: (M, M) cost of the images between canvases i < j, each going to the nearer; infinite for pairs that
            cannot be neighbours: i >= j, or the same name.
        first: (M,) cost of the images wider than a canvas, if it is the widest chosen.
        last: (M,) cost of the images taller than a canvas, if it is the tallest chosen.
        before: (M, M) number of images up to the middle of canvases i and j.
    """

    between: Floats
    first: Floats
    last: Floats
    before: Ints
    num_images: int


def _costs(sizes: Sizes, choices: Sequence[Bucket], waits: bool) -> _Costs:
    ratio = sizes.height_px / sizes.width_px
    order = np.argsort(ratio, kind="stable")
    ratio, count = ratio[order], sizes.count[order]
    # Sums over the images up to each: of 1, of r and of 1 / r, from which the crop of any run of images follows.
    images, tall, wide = (np.concatenate([[0], np.cumsum(count * x)]) for x in (np.ones_like(count), ratio, 1 / ratio))
    canvas = np.array([b.height_px / b.width_px for b in choices])  # (M,)
    areas = np.array([b.height_px * b.width_px for b in choices])
    short = 1 - areas / areas.max() if waits else np.zeros(len(choices))
    at = np.searchsorted(ratio, canvas, side="right")  # (M,) images that are at most as tall
    middle = np.searchsorted(ratio, np.sqrt(canvas[:, None] * canvas), side="right")  # (M, M)

    def left(stop: Ints, start: Ints | int) -> Floats:
        """Cost of the images start to stop, wider than the canvas of their column, on it."""
        cost: Floats = (1 + short) * (images[stop] - images[start]) - (tall[stop] - tall[start]) / canvas
        return cost

    def right(stop: Ints | int, start: Ints) -> Floats:
        """Cost of the images start to stop, taller than the canvas of their last axis, on it."""
        cost: Floats = (1 + short) * (images[stop] - images[start]) - (wide[stop] - wide[start]) * canvas
        return cost

    between = right(middle, at).T + left(at, middle)  # the middle of j and i is that of i and j
    names = np.array([b.ratio for b in choices])
    between[np.tril_indices(len(choices))] = np.inf
    between[names[:, None] == names] = np.inf  # the ratio names the folder
    return _Costs(between, left(at, 0), right(len(ratio), at), images[middle], int(images[-1]))


@dataclass
class _Search:
    """The dynamic program: tables of ever more canvases, by the last two, (M, M).

    A canvas knows how many images it gets once both of its neighbours are known, hence two. `_reach` says up to which
    neighbour before it a canvas still gets enough.
    """

    costs: _Costs
    min_images: int
    _reach: Ints = field(init=False)
    _last: Floats = field(init=False)
    _before: list[NDArray[np.int16]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        costs = self.costs
        size = len(costs.first)
        self._reach = np.full((size, size), -1)  # [j, l]: with l next, the last neighbour i before j
        for j in range(size):
            room = costs.before[j, j:] - self.min_images
            self._reach[j, j:] = np.searchsorted(costs.before[:j, j], room, side="right") - 1
        pair = costs.first[:, None] + costs.between
        self._last = np.where(costs.before >= self.min_images, pair, np.inf)

    def best(self, number: int) -> list[int] | None:
        """Return the places of the best `number` canvases; to be called for 1, 2, 3 ... in this order."""
        costs = self.costs
        if number == 1:
            if costs.num_images < self.min_images:
                return None
            return [int(np.argmin(costs.first + costs.last))]
        if number > 2:
            self._extend()
        enough = costs.num_images - costs.before >= self.min_images
        total = np.where(enough, self._last + costs.last, np.inf)
        place = int(np.argmin(total))
        if not np.isfinite(total.flat[place]):
            return None
        chosen = list(divmod(place, total.shape[1]))
        for before in reversed(self._before):
            chosen.insert(0, int(before[chosen[0], chosen[1]]))
        return chosen

    def _extend(self) -> None:
        """Add a canvas l to the best tables that end in j, over all i before it."""
        last = self._last  # [i, j]
        least = np.minimum.accumulate(last, axis=0)
        fresh = np.ones(last.shape, dtype=bool)
        fresh[1:] = last[1:] < least[:-1]
        where = np.maximum.accumulate(np.where(fresh, np.arange(len(last))[:, None], 0), axis=0)
        columns = np.arange(len(last))[:, None]
        reach = np.maximum(self._reach, 0)
        self._last = np.where(self._reach >= 0, least[reach, columns], np.inf) + self.costs.between  # [j, l]
        self._before.append(where[reach, columns].astype(np.int16))
