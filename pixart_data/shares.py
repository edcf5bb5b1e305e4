"""Which rows of a corpus are looked at where looking at all would cost too much.

A row's lot is drawn by the name of its file and its number in it, and by nothing else: however a file is cut into
units, whoever does them and however often, the same rows are taken, and what is known of the units adds up to what is
known of the corpus. Shares are powers of two, so that the rows of a smaller share are among those of any larger one.
"""

import numpy as np
import numpy.typing as npt

from pixart_data.entries import key_hash

MAX_LEVEL = 32
"""The smallest share is one row in 2 ** MAX_LEVEL."""

_STEP = 0x9E3779B97F4A7C15  # of splitmix64, like the factors
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_LIMITS = np.uint64(1) << np.arange(64 - MAX_LEVEL, 64, dtype=np.uint64)

Levels = npt.NDArray[np.int64]


def level_of(num_rows: int, most_rows: int) -> int:
    """Return the level at which of so many rows, on average, no more than `most_rows` are taken: 0 is all of them."""
    times_too_many = -(-num_rows // most_rows)
    return min(max(0, times_too_many - 1).bit_length(), MAX_LEVEL)


def levels(file: str, first_row: int, num_rows: int) -> Levels:
    """Return the highest level at which each of some neighbouring rows is taken, (num_rows,).

    At level n one row in 2 ** n is taken: those whose level here is n or more.

    Args:
        file: A name that the file keeps, wherever it lies and however it is cut.
        first_row: Number in the file of the first of the rows.
    """
    start = (key_hash(file) + _STEP * (first_row + 1)) % (1 << 64)
    numbers = np.arange(num_rows, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(start)
    return np.asarray(MAX_LEVEL - np.searchsorted(_LIMITS, mixed(numbers), side="right"))


def mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return numbers in 64 bits that look random, different ones for different ones (the finalizer of splitmix64)."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> _SHIFTS[2])
