"""Storage that fails: what may pass is waited out, what does not becomes one clear line.

A busy store, a stale mount or a broken connection are well a minute later; a full disk or a missing permission is not.
"""

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pixart_data import events
from pixart_data.errors import JobError, TransientError

T = TypeVar("T")

_ATTEMPTS = 8
_FIRST_WAIT_S = 0.2  # doubled each time: 25 s in all
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EAGAIN", "EBUSY", "ETIMEDOUT", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "EPIPE", "ENOLINK"),
    )
    if hasattr(errno, name)
}
_REASONS = {
    errno.ENOSPC: "the disk is full; free space or choose another output, then run the same command again",
    errno.EDQUOT: "the quota is used up; free space, then run the same command again",
    errno.EACCES: "permission denied; choose an output you may write to",
    errno.EPERM: "permission denied; choose an output you may write to",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EEXIST: "it is a file; choose another output",
    errno.ENOENT: "there is no such place; make the bucket or the folder, or check the name",
    errno.ENOTDIR: "a part of the path is a file; choose another output",
}
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


@contextlib.contextmanager
def storage(path: Path | str) -> Iterator[None]:
    """Turn a failure to write `path` into one clear line.

    Raises:
        JobError: For a full disk, missing permission, a read-only file system.
        TransientError: For a failure that may pass.
    """
    try:
        yield
    except OSError as error:
        raise _job_error(path, error) from error


def _job_error(path: Path | str, error: Exception, verb: str = "write") -> JobError:
    number = error.errno if isinstance(error, OSError) else None
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError):  # those of object stores have no number
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES
    what = _REASONS.get(number or 0)
    if what:
        return JobError(f"{path}: cannot {verb}: {what}")
    kind = TransientError if is_transient(error) else JobError
    return kind(f"{path}: cannot {verb}: {text}; check the storage, then run again")


def is_transient(error: Exception) -> bool:
    """Tell a failure of storage that may pass from one that will not."""
    if isinstance(
        error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT or isinstance(error, TimeoutError | ConnectionError)
    package = type(error).__module__.split(".")[0]
    return package in ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec") and not _is_configuration(error)


def _is_configuration(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError")


def retrying(what: Callable[[], T], path: Path | str, verb: str = "write") -> T:
    """Call `what`, again with growing pauses while it fails in ways that may pass; the rest is for the message.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError: As they are.
        JobError: For what no retry mends.
        TransientError: When the attempts are used up.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return what()
        except _FINAL:
            raise
        except Exception as error:  # noqa: BLE001  what clients of object stores raise has no common root
            if not is_transient(error) or attempt == _ATTEMPTS - 1:
                if isinstance(error, OSError) or is_transient(error) or _is_configuration(error):
                    raise _job_error(path, error, verb) from error
                raise
        events.note("storage_retry")
        time.sleep(_FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")
