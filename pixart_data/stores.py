"""Object stores as sources: what is in them, whole objects, parts of objects, and copies of tars on the local disk.

Credentials and the endpoint come from the environment, as `pixart_data.storage.location` says. Everything is tried
again while it fails in ways that may pass; what then still fails is an OSError, as it is with a local file.
"""

import contextlib
import errno
import io
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pixart_data import events
from pixart_data.errors import DataError, JobError
from pixart_data.retries import retrying
from pixart_data.storage import location, scratch_file
from pixart_data.threads import ahead

T = TypeVar("T")
R = TypeVar("R")

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf", "memory"})
"""Protocols that rows of a list may name; `fetch` is for what is on the web."""

_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 8
_READERS = 16
_LEAST_READ_BYTES = 1 << 16
_MOST_READ_BYTES = 4 << 20
_LARGEST_READ_BYTES = 64 << 20  # a damaged header may ask for anything
# Errors of botocore that are none of the storage's: who asks, and for what, is wrong.
_NUMBERS = {"NoCredentialsError": errno.EACCES, "ProfileNotFound": errno.EACCES, "ParamValidationError": errno.EINVAL}
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "checksum", "LastModified", "last_modified", "mtime", "created")


class Entry(NamedTuple):
    """What a store says of an object or folder; `version` changes when the content does."""

    url: str
    is_folder: bool
    size_bytes: int
    version: str


def is_url(path: str) -> bool:
    """Tell an object store's path from a local one."""
    return "://" in path


def patiently(what: Callable[[], T], path: str) -> T:
    """Call `what`, again with growing pauses while it fails in ways that may pass.

    Raises:
        OSError: What the last attempt raised; errors of a store's client that are none become one.
    """
    try:
        return retrying(what, path, "read")
    except JobError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            raise cause from None
        number = _NUMBERS.get(type(cause).__name__, errno.EIO)
        raise OSError(number, " ".join(str(cause).split())) from cause


def words(error: OSError) -> str:
    """Say what failed; errors of object stores have no `strerror`."""
    return error.strerror or str(error) or type(error).__name__


def join(folder: str, path: str) -> str:
    """Join as `os.path.join` does; below a URL, `..` is resolved, because keys of objects know no `..`."""
    if not is_url(folder) or is_url(path):
        return path if is_url(path) else os.path.join(folder, path)
    protocol, _, rest = folder.partition("://")
    bucket = rest.split("/")[0]
    key = posixpath.normpath(posixpath.join("/", rest[len(bucket) :], path))
    return f"{protocol}://{bucket}/{key.lstrip('/')}"


# Listing


def find_entry(url: str) -> Entry:
    """Ask for one object or folder.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If the store fails or refuses.
        ConfigError: If the package that opens the URL is not installed.
    """
    store, path = _open_store(url)
    return _entry(url, patiently(lambda: store.info(path), url))


def list_folder(url: str) -> list[Entry]:
    """Return what is directly in a folder, in the order of the names.

    Raises:
        FileNotFoundError: If there is no such folder or bucket.
        OSError: If the store fails or refuses.
        ConfigError: If the package that opens the URL is not installed.
    """
    store, path = _open_store(url)
    found = patiently(lambda: store.ls(path, detail=True), url)
    entries = [_entry(f"{url.rstrip('/')}/{_name(info)}", info) for info in found if _lies_in(info, path)]
    return sorted(entries, key=lambda entry: entry.url)


def _open_store(url: str) -> tuple[Any, str]:
    """Return the file system and the path in it; the `.` and `..` of a URL are resolved nowhere."""
    protocol, _, rest = url.partition("://")
    store = _store(f"{protocol}://{rest.split('/')[0]}", os.getpid())
    return store, store._strip_protocol(url)


@cache
def _store(root: str, pid: int) -> Any:
    """Keep one client for each bucket and process; fsspec would make, and never close, one for each thread."""
    return cast(Any, location(root)).fs


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rsplit("/", 1)[-1]


def _lies_in(info: dict[str, Any], folder: str) -> bool:
    """Leave out the empty object that stands for the folder itself, and a file that was asked for as a folder."""
    return str(info["name"]).rstrip("/") != folder.rstrip("/")


def _entry(url: str, info: dict[str, Any]) -> Entry:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Entry(url, info["type"] == "directory", int(info.get("size") or 0), version.strip('"'))


# Reading


def read_object(url: str, limit_bytes: int) -> bytes:
    """Return the first bytes of an object, in one read.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If the store fails or refuses.
    """
    entry = find_entry(url)
    if entry.is_folder:
        raise IsADirectoryError(errno.EISDIR, "a folder", url)
    return read_range(url, 0, min(entry.size_bytes, limit_bytes))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` of an object, which must be there; one request.

    Raises:
        OSError: If the store fails or refuses, or the object is shorter.
    """
    store, path = _open_store(url)

    def read() -> bytes:
        data: bytes = store.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} of {stop - start} bytes came")
        return data

    return patiently(read, url) if stop > start else b""


class ObjectFile(io.RawIOBase):
    """An object as a read-only file; what is read in order is fetched in ever larger parts, up to 4 MiB.

    Wrap it in an `io.BufferedReader`.

    Raises:
        DataError: If it cannot be read; reads raise no OSError, so that nobody takes it for a fault of the format, or
            tries again what has been tried again.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            self.url, self.size_bytes = url, find_entry(url).size_bytes
        except OSError as error:
            raise unreadable(url, error) from error
        self._position = self._begin = 0
        self._data = b""
        self._ahead_bytes = _LEAST_READ_BYTES

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move without reading; positions past the end are allowed."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"{self.url}: seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as is at hand, or can be had in one read; 0 at the end."""
        view = memoryview(buffer).cast("B")
        at = self._position - self._begin
        if not 0 <= at < len(self._data):
            self._fetch(len(view))
            at = 0
        part = self._data[at : at + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self, wanted_bytes: int) -> None:
        skipped = self._position - self._begin - len(self._data)
        in_order = 0 <= skipped <= self._ahead_bytes
        self._ahead_bytes = min(2 * self._ahead_bytes, _MOST_READ_BYTES) if in_order else _LEAST_READ_BYTES
        stop = min(self.size_bytes, self._position + min(max(wanted_bytes, self._ahead_bytes), _LARGEST_READ_BYTES))
        try:
            data = read_range(self.url, self._position, stop)
        except OSError as error:
            raise unreadable(self.url, error) from error
        self._begin, self._data = self._position, data


def open_file(path: str) -> io.BufferedReader:
    """Open a local file or an object for reading."""
    return io.BufferedReader(ObjectFile(path)) if is_url(path) else open(path, "rb")  # noqa: SIM115


def unreadable(path: str, error: OSError) -> DataError:
    """Return the error that says so."""
    denied = isinstance(error, PermissionError)
    remedy = "check the credentials in the environment" if is_url(path) and denied else "check the storage"
    return DataError(f"{path}: cannot be read: {words(error)}; {remedy}, then run again")


@contextlib.contextmanager
def scratch_copy(url: str) -> Iterator[str]:
    """Give a local copy for as long as it is needed, fetched in parts of 8 MiB, eight at a time.

    Raises:
        DataError: If the store fails, or the object changes meanwhile.
        JobError: If the scratch disk has no room for it.
    """
    entry = find_entry(url)
    path = scratch_file("source")
    try:
        _download(entry, path)
        if find_entry(url)[1:] != entry[1:]:
            raise DataError(f"{url}: changed while it was read; run the job again when it is finished")
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _download(entry: Entry, path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if entry.size_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, entry.size_bytes)  # no room is noticed at once, not after an hour

        def fetch(start: int) -> None:
            data = read_range(entry.url, start, min(start + _PART_BYTES, entry.size_bytes))
            if os.pwrite(descriptor, data, start) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            events.beat()  # a large tar has no rows to show for a long time

        for _ in ahead(fetch, range(0, entry.size_bytes, _PART_BYTES), _PARTS_AT_ONCE, _PARTS_AT_ONCE):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise JobError(  # no fault of the source's: every unit would meet it
            f"{path.parent}: expected room for a copy of {entry.url}, {entry.size_bytes} bytes: {words(error)}; "
            "free space, or set TMPDIR to a folder on a larger disk, then run again"
        ) from error
    finally:
        os.close(descriptor)


def read_ahead(function: Callable[[T], R], items: Iterable[T], remote: bool) -> Iterator[R]:
    """Yield `function(item)` in the order of `items`; of remote ones 16 are under way, since each waits for a store."""
    return ahead(function, items, _READERS, 2 * _READERS) if remote else map(function, items)
