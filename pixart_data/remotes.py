"""Feature sets in an object store, read for training through ranges of bytes and a cache on a local disk."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pixart_data.caches import Cache
from pixart_data.commits import file_sha256
from pixart_data.entries import ENTRIES, map_entries
from pixart_data.errors import DataError
from pixart_data.ranges import Place, Ranges
from pixart_data.shards import INDEX, BatchBuffer, FeatureSet, MemberPlaces, read_manifest
from pixart_data.storage import is_remote, local_copy, location, make_dir, replace_file, staging

SETS, MEMBERS = "sets", "members"  # folders of a cache: indexes, which stay; members, which make room for others


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

    def __reduce__(self) -> tuple[Callable[[], FeatureSet], tuple[()]]:  # type: ignore[override]
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
        """Return a file of the set in the cache, where it stays; it is checked as it comes.

        Raises:
            DataError: If it is missing, or not the file that the manifest speaks of.
        """
        copy = self._cache_dir / SETS / sha256 / name
        if copy.is_file():
            return copy
        make_dir(copy.parent)
        advice = "run `pixart extract` again: it is rewritten from its parts"
        with staging(copy.parent, name) as staged:
            try:
                with local_copy(self.root / name) as fetched:
                    shutil.copyfile(fetched, staged)
            except FileNotFoundError:
                raise DataError(f"{self.root / name}: missing; {advice}") from None
            if file_sha256(staged) != sha256:
                raise DataError(f"{self.root / name}: damaged: it is not what the manifest speaks of; {advice}")
            replace_file(staged, copy)
        return copy


def _open_again(root: str, cache_dir: Path, cache_bytes: int) -> FeatureSet:
    return RemoteSet(location(root), cache_dir, cache_bytes)
