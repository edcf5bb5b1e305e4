"""Random numbers that are a function of what they are for: (seed, epoch, purpose, ...) in, 64 bits out.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): a stream is a 64-bit state,
its n-th number a mix of state + (n + 1) * gamma. Nothing is kept, any number can be asked for first, and no library's
new version changes them, as those of numpy's distributions may. Numbers of one stream are all different, so sorting
them shuffles without ties.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def stream(*words: int) -> int:
    """Return the state of the stream named by words, each taken modulo 2**64; their order matters."""
    state = 0
    for word in words:
        state = (state + (word + 1) * _GAMMA) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def draws(state: int | Words, numbers: npt.ArrayLike) -> Words:
    """Return numbers of a stream, or of as many streams as there are states: `stream(*words, n)` for each.

    Args:
        state: From `stream`, or an array of what this function returned, which broadcasts with `numbers`.
        numbers: Which; (N,), taken modulo 2**64.
    """
    counters = np.atleast_1d(np.asarray(numbers)).astype(np.uint64)  # single numbers would warn that they wrap
    mixed: Words = (counters + np.uint64(1)) * np.uint64(_GAMMA) + np.asarray(state, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(bits: Words) -> npt.NDArray[np.float64]:
    """Return numbers from 0 to below 1, of the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
