"""Duplicates among millions of images, from their digests and perceptual hashes alone.

Both searches sort instead of comparing all with all. They look at the samples in the order of the source and name, for
each duplicate, an earlier sample that it repeats: the first of a group is never a duplicate, whatever the workers did.
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.signedinteger[Any]]
"""Of samples, in the order of the source."""

HASH_BITS = 64
_CHUNK = 1 << 22  # positions compared at once: bounds the memory beside the sorted arrays
_SORT_NS, _PAIR_NS = 6.0, 12.0  # of one element and level, of one comparison; they only decide how hashes are cut


def exact_duplicates(digests: NDArray[np.uint64]) -> Indices:
    """Find digests that came up before.

    Args:
        digests: (N, 2), 128 bits of a cryptographic digest for each sample: no two contents share them by accident.

    Returns:
        (N,): the index of the first sample with the same digest, or -1 where that is the sample itself.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0])).astype(index_type(len(digests)))
    found, _ = _repeats(digests, order)
    return found


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
    # Equal hashes first: crowds of them would be compared in every table.
    found, singles = _repeats(hashes, _order(hashes))
    if max_distance_bits > 0:
        among = _near(hashes[singles], max_distance_bits)
        hit = among >= 0
        found[singles[hit]] = singles[among[hit]]
    return found


def index_type(length: int) -> type[np.signedinteger[Any]]:
    """Return the smallest type for indices of so many elements: half the memory below two thousand millions."""
    return np.int64 if length >> 31 else np.int32


def _order(values: NDArray[np.uint64]) -> Indices:
    """Return what sorts the values; equal ones stay in the order of the source."""
    return np.argsort(values, kind="stable").astype(index_type(len(values)))


def _repeats(values: NDArray[np.uint64], order: Indices) -> tuple[Indices, Indices]:
    """Return, for each value, the index of the first equal one or -1, and the sorted indices of the first ones."""
    fresh = np.ones(len(order), dtype=bool)
    for start in range(1, len(order), _CHUNK):
        stop = min(start + _CHUNK, len(order))
        differing = values[order[start:stop]] != values[order[start - 1 : stop - 1]]
        fresh[start:stop] = differing if differing.ndim == 1 else differing.any(axis=1)
    first = np.full(len(order), -1, dtype=order.dtype)
    repeats, starts = np.flatnonzero(~fresh), np.flatnonzero(fresh)
    first[order[repeats]] = order[starts[np.searchsorted(starts, repeats, side="right") - 1]]
    return first, np.sort(order[fresh])


def _near(hashes: NDArray[np.uint64], max_distance_bits: int) -> Indices:
    found = np.full(len(hashes), -1, dtype=index_type(len(hashes)))
    for mask in _masks(len(hashes), max_distance_bits):
        order = _order(hashes & mask)
        ranked = hashes[order]
        for start in range(1, len(order), _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, len(order)))
            _compare(ranked, order, positions[found[order[positions]] < 0], (mask, max_distance_bits), found)
    return found


def _compare(
    ranked: NDArray[np.uint64],
    order: Indices,
    positions: Indices,
    rule: tuple[np.uint64, int],
    found: Indices,
) -> None:
    """Compare each position with those before it that agree under the mask, until one is near.

    Those before it come earlier in the source, too, because the sort is stable.
    """
    mask, max_distance_bits = rule
    distance = 0
    while len(positions):
        distance += 1
        positions = positions[positions >= distance]
        differing = ranked[positions] ^ ranked[positions - distance]
        alike = (differing & mask) == 0
        positions, differing = positions[alike], differing[alike]
        near = np.bitwise_count(differing) <= max_distance_bits
        found[order[positions[near]]] = order[positions[near] - distance]
        positions = positions[~near]


def _masks(num_hashes: int, max_distance_bits: int) -> Iterator[np.uint64]:
    """Yield the choices of blocks, those whose sorts and comparisons are estimated to take the least time."""

    def estimate_ns(num_blocks: int) -> float:
        num_equal = num_blocks - max_distance_bits
        bits = HASH_BITS // num_blocks * num_equal
        pairs = num_hashes**2 / 2 ** (0.9 * bits + 1)  # bits of real pictures are not independent
        num_tables = comb(num_blocks, num_equal)
        return num_tables * (num_hashes * log2(num_hashes + 1) * _SORT_NS + pairs * _PAIR_NS)

    num_blocks = min(range(max_distance_bits + 1, max_distance_bits + 8), key=estimate_ns)
    # Neighbouring bits of a perceptual hash go together in pictures: blocks take every n-th bit.
    blocks = [sum(1 << bit for bit in range(block, HASH_BITS, num_blocks)) for block in range(num_blocks)]
    for chosen in combinations(blocks, num_blocks - max_distance_bits):
        yield np.uint64(sum(chosen))
