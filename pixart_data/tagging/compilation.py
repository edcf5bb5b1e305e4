"""Compiled code: functions over arrays, made fast by numba and kept on the disk between runs."""

import contextlib
import functools
import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import config, njit
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)

# What comes of reading damaged bytes as pickles and as compiled code is anyone's guess; LLVM raises RuntimeError.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def kernel(function: F) -> F:
    """Compile a function at its first call, or load what an earlier run compiled.

    Where numba finds no folder to keep it in (a read-only installation without a home; NUMBA_CACHE_DIR names one), it
    is compiled in every process. With NUMBA_DISABLE_JIT=1 it stays in Python.
    """
    return _compiled(function)


def lean_kernel(function: F) -> F:
    """Compile a function that makes no arrays, copies no slices and gives none back to Python.

    It does not count who holds the arrays it is given, as `kernel` has it done at every step: in small kernels that
    pass each other many arrays, that takes ten times as long as their work.
    """
    return _compiled(function, _nrt=False)


def folder() -> str | None:
    """Return where compiled code is kept on this machine, None where no such folder can be written."""
    try:
        return str(_Cache(folder).cache_path)
    except RuntimeError:
        return None


class _Cache(FunctionCache):  # type: ignore[no-any-unimported, misc, unused-ignore]
    """That of numba, but what is damaged in it is compiled anew and replaced, where numba would end every run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # Kernels hold copies of those they call, but numba looks at the file of the outer one alone.
        self._cache_file._source_stamp = (*self._cache_file._source_stamp, _sources())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGE as error:
            _warn(self.cache_path, f"{type(error).__name__}: {error}")
        try:
            self.flush()
        except OSError:
            self.disable()  # neither read nor written: each run compiles this kernel, and says so
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(self.cache_path, str(error))


_warned: set[str] = set()


def _warn(path: str, found: str) -> None:
    """Say once for each folder that its contents cannot be used."""
    if path not in _warned:
        _warned.add(path)
        _log.warning(
            "compiled code: expected to keep it in %s, found files that cannot be read or written (%s); it is compiled "
            "anew; if this line comes again, delete *.nbi and *.nbc there, or set NUMBA_CACHE_DIR to another folder",
            path,
            " ".join(found.split())[:200],
        )


def _compiled(function: F, **options: Any) -> F:
    if config.DISABLE_JIT:
        # Hashes overflow, on which NumPy remarks outside of compiled code.
        return np.errstate(over="ignore")(function)
    compiled = njit(nogil=True, **options)(function)
    with contextlib.suppress(RuntimeError):  # `folder` has none, which `engines` says at start
        compiled._cache = _Cache(function)
    return cast(F, compiled)


@functools.cache
def _sources() -> str:
    """Return a digest of all modules here: those without kernels have constants that are compiled into some."""
    contents = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(contents)).hexdigest()
