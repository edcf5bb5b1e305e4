"""Compiled code: functions over arrays, made fast by numba and kept on the disk between runs."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function at its first call, or load what an earlier run compiled.

    Where numba finds no folder to keep it in (a read-only installation without a home; NUMBA_CACHE_DIR names one), it
    is compiled in every process.
    """
    try:
        compiled = njit(cache=True, nogil=True)(function)
    except RuntimeError:
        compiled = njit(nogil=True)(function)
    return cast(F, compiled)
