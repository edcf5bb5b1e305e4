"""Compiled code: functions over arrays, made fast by numba and kept on the disk between runs."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function at its first call, or load what an earlier run compiled.

    Where numba finds no folder to keep it in (a read-only installation without a home; NUMBA_CACHE_DIR names one), it
    is compiled in every process.
    """
    return _compiled(function)


def lean_kernel(function: F) -> F:
    """Compile a function that makes no arrays, copies no slices and gives none back to Python.

    It does not count who holds the arrays it is given, as `kernel` has it done at every step: in small kernels that
    pass each other many arrays, that takes ten times as long as their work.
    """
    return _compiled(function, _nrt=False)


def _compiled(function: F, **options: Any) -> F:
    try:
        compiled = njit(cache=True, nogil=True, **options)(function)
        # Kernels hold copies of those they call, but numba looks at the file of the outer one alone.
        file = compiled._cache._cache_file
        file._source_stamp = (*file._source_stamp, _sources())
    except RuntimeError:
        compiled = njit(nogil=True, **options)(function)
    return cast(F, compiled)


@functools.cache
def _sources() -> str:
    """Return a digest of all modules here that have kernels."""
    contents = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(content for content in contents if b"@kernel" in content)).hexdigest()
