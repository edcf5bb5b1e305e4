"""Duplicates among millions of images, from their digests and perceptual hashes alone.

Both searches sort instead of comparing all with all. They look at the samples in the order of the source and name, for
each duplicate, an earlier sample that it repeats: the first of a group is never a duplicate, whatever the workers did.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.signedinteger[Any]]
"""Of samples, in the order of the source."""

HASH_BITS = 64
_CHUNK = 1 << 20  # positions compared at once: bounds the memory beside the sorted arrays
_MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2 ** 64 / golden ratio (Knuth): all bits of a number reach the upper ones
# Measured, of a hash in each level of a sort, of a hash, of a comparison; they only decide how hashes are cut.
_LEVEL_NS, _HASH_NS, _PAIR_NS = 3.0, 25.0, 40.0


def exact_duplicates(digests: NDArray[np.uint64]) -> Indices:
    """Find digests that came up before.

    Args:
        digests: (N, 2), 128 bits of a cryptographic digest for each sample: no two contents share them by accident.

    Returns:
        (N,): the index of the first sample with the same digest, or -1 where that is the sample itself.
    """
    return _repeats(digests, np.lexsort((digests[:, 1], digests[:, 0])).astype(index_type(len(digests))))


def near_duplicates(hashes: NDArray[np.uint64], max_distance_bits: int) -> Indices:
    """Find hashes that differ in few bits from one that came before, itself a duplicate or not.

    Hashes are cut into more blocks than bits may differ, so that two near ones agree in at least the surplus of the
    blocks (pigeonhole principle). For each choice of so many blocks, hashes are sorted by those blocks, and only those
    that agree in them are compared. The number of blocks follows from the number of hashes.

    Args:
        hashes: (N,) 64-bit hashes in the order of the source.
        max_distance_bits: Bits that may differ.

    Returns:
        (N,): the index of an earlier sample within the distance, or -1 if there is none.
    """
    order = np.argsort(hashes, kind="stable").astype(index_type(len(hashes)))
    found = _repeats(hashes, order)
    del order
    if max_distance_bits > 0:
        # Equal hashes are left out: crowds of them would be compared in every table.
        singles = np.flatnonzero(found < 0).astype(np.uint64 if len(hashes) >> 32 else np.uint32)
        _find_near(hashes, singles, found, max_distance_bits)
    return found


def index_type(length: int) -> type[np.signedinteger[Any]]:
    """Return the smallest type for indices of so many elements: half the memory below two thousand millions."""
    return np.int64 if length >> 31 else np.int32


def _repeats(values: NDArray[np.uint64], order: Indices) -> Indices:
    """Return, for each value, the index of the first equal one, or -1 for the first.

    Args:
        order: Sorts the values; equal ones stay in the order of the source.
    """
    repeated = np.zeros(len(order), dtype=bool)
    for start in range(1, len(order), _CHUNK):
        stop = min(start + _CHUNK, len(order))
        alike = values[order[start:stop]] == values[order[start - 1 : stop - 1]]
        repeated[start:stop] = alike if alike.ndim == 1 else alike.all(axis=1)
    places = np.flatnonzero(repeated)
    begins = np.ones(len(places), dtype=bool)
    begins[1:] = places[1:] != places[:-1] + 1
    firsts = np.maximum.accumulate(np.where(begins, places - 1, 0))
    found = np.full(len(order), -1, dtype=order.dtype)
    found[order[places]] = order[firsts]
    return found


@dataclass(frozen=True)
class _Table:
    """Hashes sorted by one choice of blocks: `ranked` has a digest of the blocks above, the index below."""

    hashes: NDArray[np.uint64]
    ranked: NDArray[np.uint64]
    index_bits: np.uint64
    max_distance_bits: int

    def compare(self, positions: NDArray[np.int64], found: Indices) -> None:
        """Compare what is at each position with those before it that agree in the blocks, until one is near.

        Those before it come earlier in the source, too: they have the smaller index.
        """
        here = self._index(positions)
        fresh = found[here] < 0
        positions, here = positions[fresh], here[fresh]
        distance = 0
        while len(positions):
            distance += 1
            inside = positions >= distance
            positions, here = positions[inside], here[inside]
            before = positions - distance
            alike = (self.ranked[positions] ^ self.ranked[before]) >> self.index_bits == 0
            positions, here = positions[alike], here[alike]
            earlier = self._index(before[alike])
            near = np.bitwise_count(self.hashes[here] ^ self.hashes[earlier]) <= self.max_distance_bits
            found[here[near]] = earlier[near]
            positions, here = positions[~near], here[~near]

    def _index(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        below = (np.uint64(1) << self.index_bits) - np.uint64(1)
        return (self.ranked[positions] & below).astype(np.int64)


def _find_near(hashes: NDArray[np.uint64], singles: NDArray[Any], found: Indices, max_distance_bits: int) -> None:
    """Fill in `found` for those of the hashes, all different, whose sorted indices are `singles`."""
    index_bits = np.uint64(len(hashes).bit_length())
    for mask in _masks(len(singles), max_distance_bits):
        # One number for each hash, which is sorted in place: a digest of the masked bits, then the index. Digests that
        # are alike by accident cost a comparison.
        ranked = hashes[singles]
        ranked &= mask
        ranked *= _MIXER
        ranked >>= index_bits
        ranked <<= index_bits
        ranked |= singles
        ranked.sort()
        table = _Table(hashes, ranked, index_bits, max_distance_bits)
        for start in range(1, len(ranked), _CHUNK):
            table.compare(np.arange(start, min(start + _CHUNK, len(ranked))), found)


def _masks(num_hashes: int, max_distance_bits: int) -> Iterator[np.uint64]:
    """Yield the choices of blocks, those whose sorts and comparisons are estimated to take the least time."""

    def estimate_ns(num_blocks: int) -> float:
        num_equal = num_blocks - max_distance_bits
        bits = HASH_BITS * num_equal / num_blocks
        num_pairs = num_hashes**2 / 2 ** (0.95 * bits + 1)  # bits of real pictures are not independent
        sort_ns = num_hashes * (log2(num_hashes + 1) * _LEVEL_NS + _HASH_NS)
        return comb(num_blocks, num_equal) * (sort_ns + num_pairs * _PAIR_NS)

    num_blocks = min(range(max_distance_bits + 1, max_distance_bits + 8), key=estimate_ns)
    # Neighbouring bits of a perceptual hash go together in pictures: blocks take every n-th bit.
    blocks = [sum(1 << bit for bit in range(block, HASH_BITS, num_blocks)) for block in range(num_blocks)]
    for chosen in combinations(blocks, num_blocks - max_distance_bits):
        yield np.uint64(sum(chosen))
