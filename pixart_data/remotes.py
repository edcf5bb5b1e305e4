"""Feature sets in an object store, read for training through ranges of bytes and a cache on a local disk."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from pixart_data.caches import Cache
from pixart_data.commits import file_sha256
from pixart_data.entries import ENTRIES, map_entries
from pixart_data.errors import DataError, JobError
from pixart_data.ranges import Place, Ranges
from pixart_data.retries import retrying
from pixart_data.shards import INDEX, BatchBuffer, FeatureSet, MemberPlaces, read_manifest
from pixart_data.storage import TEMPORARY, discard, is_remote, location, make_dir, replace_file, staging

SETS, MEMBERS = "sets", "members"  # folders of a cache: indexes, and members of shards
MAX_COPIES = 32
"""Copies of indexes that a cache keeps: those used last. A set has one, and a second where captions are asked for."""

_IN_USE_S = 3_600  # since it was opened a copy stays, however many there are: a dataset may be made of many sets
_ABANDONED_S = 86_400  # a copy that nobody has written to for so long is a killed process's
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EFBIG}


def open_set(root: Path, cache_dir: Path, cache_bytes: int) -> FeatureSet:
    """Open a feature set where it is, on a disk or in an object store.

    Args:
        root: The set, as `storage.location` gives it.
        cache_dir: A local folder for what is fetched; processes, sets and runs may share it.
        cache_bytes: What the members in it may take in all; with 0 none are kept.

    Raises:
        DataError: If the set is not finished, or its index is damaged.
        JobError: If the storage fails.
    """
    return RemoteSet(root, cache_dir, cache_bytes) if is_remote(root) else FeatureSet(root)


class RemoteSet(FeatureSet):
    """A feature set in an object store. Its index is copied to the cache once; members are fetched as they are read."""

    def __init__(self, root: Path, cache_dir: Path, cache_bytes: int) -> None:
        self.root, self._cache_dir, self._cache_bytes = root, cache_dir, cache_bytes
        self.manifest = read_manifest(root)
        self.entries_path = self._copy(ENTRIES, self.manifest.entries_sha256)
        self.entries = map_entries(self.entries_path, self.manifest.kind)
        self.shards = [str(shard["path"]) for shard in self.manifest.shards]
        self._keys = None
        cache = Cache(cache_dir / MEMBERS, cache_bytes) if cache_bytes else None
        self.ranges = Ranges(root, cache, self.manifest.entries_sha256[:16])

    def __reduce__(self) -> tuple[Callable[[], FeatureSet], tuple[()]]:
        return partial(_open_again, str(self.root), self._cache_dir, self._cache_bytes), ()

    @property
    def index_path(self) -> Path:  # type: ignore[override]
        """A local copy of `index.parquet`; captions make it large, and training seldom needs it."""
        return self._copy(INDEX, self.manifest.index_sha256)

    def read_into(self, shard: str, offset_bytes: int, *buffers: memoryview) -> None:
        """Fill `buffers`, whose items are single bytes, from a shard.

        Raises:
            DataError: If the shard is missing or too short.
            JobError: If the storage fails.
        """
        data = self.ranges.fetch(shard, offset_bytes, sum(map(len, buffers)))
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)

    def read_batch(self, places: MemberPlaces, buffers: Sequence[BatchBuffer]) -> dict[int, DataError]:
        """Fill buffers with the tensors of members, as `FeatureSet.read_batch` does; neighbours share a request."""
        wanted = []
        for i, (shard, offset_bytes, checksum) in enumerate(zip(*places, strict=True)):
            size_bytes = sum(bounds[i + 1] - bounds[i] for _, bounds in buffers)
            wanted.append(Place(self.shards[shard], int(offset_bytes), int(size_bytes), int(checksum)))
        wrong = {}
        for i, data in enumerate(self.ranges.read(wanted)):
            if isinstance(data, DataError):
                wrong[i] = data
                continue
            start = 0
            for memory, bounds in buffers:
                end = start + bounds[i + 1] - bounds[i]
                memory[bounds[i] : bounds[i + 1]] = data[start:end]
                start = end
        return wrong

    def expect(self, places: MemberPlaces, sizes_bytes: Sequence[int]) -> None:
        """Do nothing: batches are fetched ahead by the threads that read them."""

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _copy(self, name: str, sha256: str) -> Path:
        """Return a file of the set in the cache; it is checked as it comes.

        Raises:
            DataError: If it is missing, or not the file that the manifest speaks of.
            JobError: If the store or the cache's disk fails.
        """
        sets = self._cache_dir / SETS
        copy = sets / sha256 / name
        if _is_kept(copy):
            return copy
        advice = "run `pixart extract` again: it is rewritten from its parts"
        with _caching(self._cache_dir):
            make_dir(sets)
            _sweep(sets, MAX_COPIES - 1)
            make_dir(copy.parent)
            with staging(copy.parent, name) as staged:
                try:
                    self._fetch(name, staged)
                except FileNotFoundError:
                    raise DataError(f"{self.root / name}: missing; {advice}") from None
                if file_sha256(staged) != sha256:
                    raise DataError(f"{self.root / name}: damaged: it is not what the manifest speaks of; {advice}")
                replace_file(staged, copy)
        return copy

    def _fetch(self, name: str, staged: Path) -> None:
        source = cast(Any, self.root / name)
        retrying(lambda: source.fs.get_file(source.path, str(staged)), source, "read")


def _open_again(root: str, cache_dir: Path, cache_bytes: int) -> FeatureSet:
    return RemoteSet(location(root), cache_dir, cache_bytes)


# The folder of copies


@contextlib.contextmanager
def _caching(folder: Path) -> Iterator[None]:
    """Let what goes wrong with the cache's disk name the cache, and what moves it.

    Raises:
        JobError: If the disk is full, or may not be written to.
    """
    try:
        yield
    except JobError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _DISK_ERRORS:  # a store's have other numbers, or none
            raise
        raise JobError(
            f"{folder}: expected room for copies from an object store, found: {os.strerror(cause.errno)}; free space "
            "there, or choose a folder on another local disk: data.cache_dir in a job file of `pixart train`, "
            "otherwise TMPDIR"
        ) from cause


@contextlib.contextmanager
def _locked(sets: Path) -> Iterator[None]:
    """Hold the folder's lock, which a folder that may only be read has, too."""
    handle = os.open(sets, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_kept(copy: Path) -> bool:
    """Tell whether a copy is there, and note that it is used: in its folder's time, for its own names the plan."""
    with contextlib.suppress(OSError), _locked(copy.parent.parent):  # making it says what is wrong
        with contextlib.suppress(OSError):
            os.utime(copy.parent)
        return copy.is_file()
    return False


def _sweep(sets: Path, max_copies: int) -> None:
    """Delete the copies used longest ago, and what killed processes left; one that is mapped stays readable."""
    with _locked(sets):
        now_s = time.time()
        folders = sorted((path.stat().st_mtime, path) for path in sets.iterdir() if path.is_dir())
        for used_s, folder in folders[: max(len(folders) - max_copies, 0)]:
            if used_s < now_s - _IN_USE_S:
                shutil.rmtree(folder, ignore_errors=True)
        for path in sets.glob(f"*/{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < now_s - _ABANDONED_S:
                    used_s = path.parent.stat().st_mtime
                    discard(path)
                    os.utime(path.parent, (used_s, used_s))  # to be swept is no use
