"""How well an order shuffles: what its batches draw from, beside what a full shuffle's would."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixart_model.draws import draws, stream
from pixart_model.orders import Integers, Order

Numbers = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Spread:
    """Means over batches; distances in samples.

    Attributes:
        runs: Different runs that a batch draws from.
        chunks: Different chunks.
        shards: Different shards of the image set, or NaN.
        distance: In storage, between neighbours in the batch.
    """

    runs: float
    chunks: float
    shards: float
    distance: float


@dataclass(frozen=True)
class Quality:
    """The spread of batches and of as many drawn from all samples of the same buckets."""

    batch_size: int
    num_batches: int
    ordered: Spread
    full: Spread

    def __str__(self) -> str:
        if not self.num_batches:
            return f"shuffle: no bucket holds a batch of {self.batch_size}: every sample of a bucket is in each"
        ours, full = self.ordered, self.full
        parts = [f"{ours.runs:.1f} runs ({full.runs:.1f})", f"{ours.chunks:.1f} chunks ({full.chunks:.1f})"]
        if not np.isnan(ours.shards):
            parts.append(f"{ours.shards:.1f} shards ({full.shards:.1f})")
        return (
            f"shuffle: a batch of {self.batch_size} draws from {', '.join(parts)}, of which neighbours lie "
            f"{ours.distance / full.distance:.2f} as far apart in storage as in a full shuffle (in brackets)"
        )


def shuffle_quality(
    order: Order, num_batches: int, shard_of: Callable[[Numbers], npt.NDArray[np.integer]] | None = None
) -> Quality:
    """Measure batches spread over the first epoch, of buckets that hold at least one batch.

    Args:
        num_batches: How many to look at, at most.
        shard_of: Gives the number of the shard that holds each sample; not looked at where None.
    """
    counts = order.bucket_counts
    starts = np.cumsum(counts) - counts
    available = order.num_batches(0)
    ours: list[list[float]] = []
    full: list[list[float]] = []
    for number in sorted({available * i // num_batches for i in range(num_batches)} if available else ()):
        picks = order.batch(number)
        rows, start = int(counts[picks.bucket]), int(starts[picks.bucket])
        random = _random_rows(rows, order.batch_size, stream(order.seed, number)) + start
        for found, samples in ((ours, picks.samples), (full, random.astype(np.uint32))):
            found.append(_spread(order, samples, start, shard_of))
    return Quality(order.batch_size, len(ours), _mean(ours), _mean(full))


def _spread(
    order: Order, samples: Numbers, start: int, shard_of: Callable[[Numbers], npt.NDArray[np.integer]] | None
) -> list[float]:
    rows = samples.astype(np.int64) - start
    distances = np.abs(np.diff(rows))
    return [
        len(np.unique(rows // order.run_length)),
        len(np.unique(rows // order.chunk_rows)),
        len(np.unique(shard_of(samples))) if shard_of else np.nan,
        float(distances.mean()) if len(distances) else np.nan,
    ]


def _mean(found: list[list[float]]) -> Spread:
    return Spread(*np.mean(found, axis=0)) if found else Spread(np.nan, np.nan, np.nan, np.nan)


def _random_rows(rows: int, size: int, state: int) -> Integers:
    """Return `size` different rows below `rows`, or all of them, shuffled."""
    if rows < 4 * size:
        return np.argsort(draws(state, np.arange(rows)))[:size]
    drawn = (draws(state, np.arange(2 * size)) % np.uint64(rows)).astype(np.int64)
    return drawn[np.sort(np.unique(drawn, return_index=True)[1])][:size]
