"""In which order samples are trained on: an endless sequence of batches, any of which can be named at once.

Each bucket has a stream: its samples in the order of epoch 0, then all of them in that of epoch 1, and so on. Batch j
of a bucket of N samples is positions [j m, (j + 1) m) of its stream, so nothing is dropped or doubled, and the last
N e mod m samples of epoch e - 1 lead epoch e. A bucket smaller than a batch waits until it has enough. Epoch e of the
dataset emits batches floor(e N / m) to floor((e + 1) N / m) - 1 of each bucket, interleaved in proportion.

Samples of a bucket lie in *runs* of neighbours on the disk, runs in *chunks*. An epoch takes the chunks in random
order, so many at a time that they make a *block*, and shuffles the runs of a block, and the samples of each run. Runs
make reads longer, blocks bound what is read from at a time; runs of 1 in one block are a full shuffle.

All is a function of the arguments and the number of the batch (`draws`): the state of a reader is that number. Global
batches are dealt to ranks, and a rank's to its workers, in turn (`dealt`), so their order is the same for any number.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.errors import ConfigError, DataError
from pixart_model.draws import draws, stream, uniform

Integers = npt.NDArray[np.int64]

CHUNKS_PER_BLOCK = 64
RUN_LENGTH = 1
BLOCK_ROWS = 65_536

_CHUNKS, _RUNS, _ROWS, _TURNS, _MIX = range(5)  # what numbers are drawn for
_SEGMENT_BATCHES = 4096
_SEGMENTS = 4  # kept, of each epoch or mixture
_MOST_SLOTS = 1 << 20
_FEWEST_SLOTS = 64


class Picks(NamedTuple):
    """The samples of a batch of m, all of one bucket.

    Attributes:
        bucket: Its number.
        samples: Their numbers in the plan; (m,).
        epochs: Of each, which time round its bucket this is, from 0; what is drawn for a sample (text, mirroring,
            noise) is drawn for this. It may be below the epoch of the batch: a tail carried over. (m,)
    """

    bucket: int
    samples: npt.NDArray[np.uint32]
    epochs: Integers


class Order:
    """The batches of one dataset. Calls may come from any thread; a pickled one starts with empty caches.

    Attributes:
        num_samples: In an epoch.

    Args:
        bucket_counts: Samples of each bucket, in the order of their numbers; 0 is allowed.
        batch_size: Samples of every batch, m.
        seed: Any integer.
        run_length: Neighbours in storage that stay together, in samples.
        block_rows: About how many samples are shuffled among each other, at least.

    Raises:
        DataError: If there are no samples.
    """

    def __init__(
        self,
        bucket_counts: Sequence[int] | Integers,
        batch_size: int,
        seed: int,
        run_length: int = RUN_LENGTH,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        if min(batch_size, run_length, block_rows) < 1:
            raise ValueError("expected batch_size, run_length and block_rows of at least 1")
        self._counts = np.array(bucket_counts, np.int64)
        self.num_samples = int(self._counts.sum())
        if not self.num_samples:
            raise DataError("the plan: expected samples, found none; check what the sets and the selection hold")
        self.batch_size, self.seed, self.run_length, self.block_rows = batch_size, seed, run_length, block_rows
        self._starts = np.cumsum(self._counts) - self._counts
        self._runs_per_chunk = -(-block_rows // (CHUNKS_PER_BLOCK * run_length))
        blocks = 2 * int(np.count_nonzero(self._counts)) + 16  # one of each bucket, the next, and what threads hold
        self._chunks = functools.lru_cache(blocks)(self._make_chunks)
        self._block = functools.lru_cache(blocks)(self._make_block)
        self._edges = functools.lru_cache(_SEGMENTS)(self._make_edges)
        self._turns = functools.lru_cache(_SEGMENTS)(self._make_turns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self._counts, self.batch_size, self.seed, self.run_length, self.block_rows)

    @property
    def chunk_rows(self) -> int:
        """Samples of a chunk."""
        return self._runs_per_chunk * self.run_length

    @property
    def bucket_counts(self) -> Integers:
        """Samples of each bucket."""
        return self._counts.copy()

    def first_batch(self, epoch: int) -> int:
        """Return the number of the first batch of an epoch: how many there are before."""
        return int(np.sum(epoch * self._counts // self.batch_size))

    def num_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has; they differ by at most one for each bucket, and may be 0."""
        return self.first_batch(epoch + 1) - self.first_batch(epoch)

    def locate(self, batch: int) -> tuple[int, int]:
        """Return the epoch of a batch and its place in it, from 0."""
        low = batch * self.batch_size // self.num_samples  # first_batch(low) <= batch
        high = (batch + len(self._counts)) * self.batch_size // self.num_samples + 1  # first_batch(high) > batch
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.first_batch(middle) <= batch else (low, middle)
        return low, batch - self.first_batch(low)

    def epoch_of(self, batch: int) -> float:
        """Return how often the batches before one go through the samples: 1.5 times in the middle of the second epoch.

        It goes by samples, as an epoch of few may have no batch at all: so it can lag behind `locate` by what buckets
        that wait for more samples have left over.
        """
        return batch * self.batch_size / self.num_samples

    def batch(self, number: int) -> Picks:
        """Return the samples of a batch of the endless sequence, from 0."""
        epoch, place = self.locate(number)
        bucket, ordinal = self._turn(epoch, place)
        ordinal += epoch * int(self._counts[bucket]) // self.batch_size
        samples = np.empty(self.batch_size, np.uint32)
        epochs = np.empty(self.batch_size, np.int64)
        done = 0
        while done < self.batch_size:
            round_, row = divmod(ordinal * self.batch_size + done, int(self._counts[bucket]))
            starts = self._chunks(bucket, round_)[1]
            block = int(np.searchsorted(starts, row, side="right")) - 1
            some = self._block(bucket, round_, block)[row - int(starts[block]) :][: self.batch_size - done]
            samples[done : done + len(some)] = some
            epochs[done : done + len(some)] = round_
            done += len(some)
        return Picks(bucket, samples, epochs)

    # The buckets take turns

    def _turn(self, epoch: int, place: int) -> tuple[int, int]:
        """Return the bucket of a batch of an epoch, and how many of the bucket come before it in the epoch."""
        segment = int(np.searchsorted(self._edges(epoch), place, side="right")) - 1
        buckets, ordinals, first = self._turns(epoch, segment)
        return int(buckets[place - first]), int(ordinals[place - first])

    def _line(self, epoch: int) -> tuple[Integers, int, int]:
        """Return what `interleaved` wants to know of an epoch: counts, state and segments."""
        before, after = (edge * self._counts // self.batch_size for edge in (epoch, epoch + 1))
        counts = after - before
        return counts, stream(self.seed, _TURNS, epoch), -(-int(counts.sum()) // _SEGMENT_BATCHES)

    def _make_edges(self, epoch: int) -> Integers:
        """Return how many batches of an epoch come before each segment."""
        counts, state, segments = self._line(epoch)
        edges: Integers = _prefix(counts, state, np.arange(segments)[:, None], segments).sum(axis=1)
        return edges

    def _make_turns(self, epoch: int, segment: int) -> tuple[Integers, Integers, int]:
        counts, state, segments = self._line(epoch)
        return interleaved(counts, state, segment, segments)

    # The samples of a bucket

    def _make_chunks(self, bucket: int, epoch: int) -> tuple[Integers, Integers]:
        """Return the chunks of a bucket in the order of an epoch, and the first row of each block of them."""
        rows = int(self._counts[bucket])
        chunks = -(-rows // self.chunk_rows)
        order = np.argsort(draws(stream(self.seed, _CHUNKS, epoch, bucket), np.arange(chunks)))
        sizes = np.minimum((order + 1) * self.chunk_rows, rows) - order * self.chunk_rows
        starts = (np.cumsum(sizes) - sizes)[::CHUNKS_PER_BLOCK]
        return order, starts

    def _make_block(self, bucket: int, epoch: int, block: int) -> npt.NDArray[np.uint32]:
        """Return the samples of a block in the order of an epoch."""
        rows = int(self._counts[bucket])
        chunks = self._chunks(bucket, epoch)[0][block * CHUNKS_PER_BLOCK :][:CHUNKS_PER_BLOCK]
        runs = (chunks[:, None] * self._runs_per_chunk + np.arange(self._runs_per_chunk)).ravel()
        runs = runs[runs * self.run_length < rows]
        runs = runs[np.argsort(draws(stream(self.seed, _RUNS, epoch, bucket, block), runs))]
        members = runs[:, None] * self.run_length + np.arange(self.run_length)  # (runs, run_length)
        if self.run_length > 1:
            turns = np.argsort(draws(stream(self.seed, _ROWS, epoch, bucket, block), members), axis=1)
            members = np.take_along_axis(members, turns, axis=1)
        members = members.ravel()
        samples: npt.NDArray[np.uint32] = (members[members < rows] + self._starts[bucket]).astype(np.uint32)
        return samples


class Mix:
    """Which dataset each global batch comes from. Of t batches a dataset of share w gives w t, give or take a few.

    Batches come in cycles. After whole cycles every dataset has given within 1 of its share exactly; inside a cycle the
    datasets are interleaved in proportion, at random.

    Args:
        weights: Of each dataset, above 0; in proportion to each other.
        seed: Any integer.

    Raises:
        ConfigError: If a weight is not above 0, or under a millionth of them all.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(weight) for weight in weights if 0 < weight < float("inf")]
        if not exact or len(exact) < len(weights):
            raise ConfigError(f"weights of datasets: expected numbers above 0, got {list(weights)}; correct them")
        self.weights, self.seed = tuple(weights), seed
        self._bounds = [total / sum(exact) for total in itertools.accumulate(exact)]
        # A cycle holds each dataset at least once: then the difference of two rounded bounds never falls.
        self._slots = max(_FEWEST_SLOTS, -(-sum(exact) // min(exact)))
        if self._slots > _MOST_SLOTS:
            raise ConfigError(
                f"weights of datasets: expected each to be a millionth of the sum or more, got {list(weights)}; "
                "leave the smallest out"
            )
        self._cycle = functools.lru_cache(_SEGMENTS)(self._make_cycle)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mix, (self.weights, self.seed)

    def locate(self, batch: int) -> tuple[int, int]:
        """Return the dataset of a global batch, and which of the dataset's own batches it is: 0, 1, 2 and so on."""
        cycle, place = divmod(batch, self._slots)
        datasets, ordinals, first = self._cycle(cycle)
        dataset = int(datasets[place])
        return dataset, first[dataset] + int(ordinals[place])

    def given(self, cycles: int) -> list[int]:
        """Return how many batches each dataset has given after so many cycles."""
        totals = [int(bound * cycles * self._slots) for bound in self._bounds]
        return [total - before for total, before in zip(totals, [0, *totals], strict=False)]

    def _make_cycle(self, cycle: int) -> tuple[Integers, Integers, list[int]]:
        first, after = self.given(cycle), self.given(cycle + 1)
        counts = np.array(after, np.int64) - np.array(first, np.int64)
        datasets, ordinals, _ = interleaved(counts, stream(self.seed, _MIX, cycle), 0, 1)
        return datasets, ordinals, first


def dealt(first: int, rank: int = 0, world: int = 1, worker: int = 0, num_workers: int = 1) -> Iterator[int]:
    """Return the numbers of the global batches that one reader reads, without end.

    A rank reads every `world`-th batch; its workers every `num_workers`-th of those, which a `DataLoader` puts in order
    again.

    Args:
        first: The batch to start from; the same for all ranks.
    """
    return itertools.count(first + rank + world * worker, world * num_workers)


def interleaved(counts: Integers, state: int, segment: int, segments: int) -> tuple[Integers, Integers, int]:
    """Return a stretch of a sequence that holds kind k `counts[k]` times, in proportion at every prefix.

    The i-th of the n things of a kind has the place (i + u) / n, with u drawn from 0 to 1; sorted by it they stand in
    line. Of a prefix of t of T things, n t / T are of a kind, give or take less than 1 + kinds * n / T.

    Args:
        counts: Things of each kind.
        state: From `draws.stream`.
        segment: Which of `segments` equal parts of the line; a part of one is made without the others.

    Returns:
        The kind of each thing of the part, how many of the same kind come before it in the whole line, and how many
        things there are before this part.
    """
    low, high = (_prefix(counts, state, edge, segments) for edge in (segment, segment + 1))
    sizes = high - low
    kinds = np.repeat(np.arange(len(counts)), sizes)
    ordinals = np.arange(len(kinds)) - np.repeat(np.cumsum(sizes) - sizes - low, sizes)
    line = np.argsort(_places(counts, state, kinds, ordinals), kind="stable")  # within a kind it ascends already
    return kinds[line], ordinals[line], int(low.sum())


def _prefix(counts: Integers, state: int, segment: int | Integers, segments: int) -> Integers:
    """Return how many things of each kind stand before a segment; (kinds,), or (S, kinds) for segments (S, 1)."""
    near = counts * segment // segments  # the thing whose place may lie on either side; its neighbours for rounding
    kinds = np.arange(len(counts))
    total: Integers = np.maximum(near - 1, 0)
    for ordinals in (near - 1, near, near + 1):
        there = (ordinals >= 0) & (ordinals < counts)
        places = _places(counts, state, kinds, np.clip(ordinals, 0, None))
        total += there & (np.minimum(places * segments, segments - 1).astype(np.int64) < segment)
    return total


def _places(counts: Integers, state: int, kinds: Integers, ordinals: Integers) -> npt.NDArray[np.float64]:
    shift = uniform(draws(draws(state, kinds), ordinals))
    places: npt.NDArray[np.float64] = (ordinals + shift) / np.maximum(counts[kinds], 1)
    return places
