"""Reading members of shards that lie in an object store: ranges of bytes, joined, checked and cached.

Neighbours in a shard are fetched by one request; a batch's requests run at the same time. What arrives is checked
against its CRC before it is used or cached: an answer that was damaged on the way is asked for once more.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from zlib_ng.zlib_ng import crc32

from pixart_data.caches import Cache
from pixart_data.errors import DataError, JobError, TransientError
from pixart_data.retries import retrying
from pixart_data.storage import location

MAX_GAP_BYTES = 128 << 10  # read and thrown away, where that spares a request: some 2 ms of one connection
MAX_RANGE_BYTES = 16 << 20  # more than this in one request keeps one connection busy while others idle


class Place(NamedTuple):
    """Where a member's tensors lie: the shard's path relative to the set, and their checksum."""

    shard: str
    offset_bytes: int
    size_bytes: int
    crc32: int

    @property
    def end_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True)
class _Range:
    """Bytes of a shard that one request fetches, and the members in them."""

    shard: str
    start: int
    end: int
    places: list[Place]


class Ranges:
    """The shards of a feature set in an object store. Thread-safe; may be used after a fork.

    Args:
        root: The feature set.
        cache: Where members are kept; None keeps none.
        name: Of the set in the cache: what changes when its shards do.
        num_connections: Requests of one call of `read` that run at the same time.
    """

    def __init__(self, root: Path, cache: Cache | None = None, name: str = "", num_connections: int = 16) -> None:
        self.root, self.cache, self.name, self.num_connections = root, cache, name, num_connections
        self.num_requests = 0
        self._process = os.getpid()

    def read(self, places: Sequence[Place]) -> list[bytes | DataError]:
        """Return the bytes of members, in order; for one that is damaged or missing, what to tell of it.

        Raises:
            JobError: If the store fails for longer than retries last.
        """
        found: dict[Place, bytes | DataError] = {}
        for place in dict.fromkeys(places):
            cached = self._cached(place)
            if cached is not None:
                found[place] = cached
        missing = [place for place in dict.fromkeys(places) if place not in found]
        found |= self._fetch(missing)
        damaged = [place for place in missing if _is_damaged(found[place], place)]
        found |= self._fetch(damaged)  # once more: perhaps it was the way
        good: dict[str, bytes] = {}
        for place in missing:
            data = found[place]
            if isinstance(data, bytes):
                if _is_damaged(data, place):
                    found[place] = self._damage(data, place)
                else:
                    good[self._key(place)] = data
        if self.cache is not None and good:
            self.cache.put_many(good)
        return [found[place] for place in places]

    def fetch(self, shard: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Return bytes of a shard, which the caller checks.

        Raises:
            DataError: If the shard is missing or too short.
            JobError: If the store fails for longer than retries last.
        """
        data = self._again(_Range(shard, offset_bytes, offset_bytes + size_bytes, []))
        if isinstance(data, DataError):
            raise data
        if len(data) != size_bytes:
            raise self._too_short(shard)
        return data

    def _damage(self, data: bytes, place: Place) -> DataError:
        if len(data) < place.size_bytes:
            return self._too_short(place.shard)
        return DataError(
            f"{self.root / place.shard}: damaged at byte {place.offset_bytes:,}: its checksum differs from the "
            f"index; `pixart verify {self.root}` names the sample"
        )

    def _too_short(self, shard: str) -> DataError:
        return DataError(f"{self.root / shard}: ends early; `pixart verify {self.root}` names the samples lost")

    def _cached(self, place: Place) -> bytes | None:
        if self.cache is None:
            return None
        data = self.cache.get(self._key(place))
        if data is not None and _is_damaged(data, place):
            self.cache.drop(self._key(place))
            return None
        return data

    def _key(self, place: Place) -> str:
        return f"{self.name}/{place.shard.replace('/', '_')}/{place.offset_bytes}"

    def _fetch(self, places: Sequence[Place]) -> dict[Place, bytes | DataError]:
        ranges = list(join(places))
        if not ranges:
            return {}
        self.num_requests += len(ranges)
        store = self._store()
        answers: list[Any] = store.cat_ranges(
            [self._path(one.shard) for one in ranges],
            [one.start for one in ranges],
            [one.end for one in ranges],
            on_error="return",
            batch_size=self.num_connections,
        )
        found: dict[Place, bytes | DataError] = {}
        for one, answer in zip(ranges, answers, strict=True):
            data = answer if _is_whole(answer, one) else self._again(one)
            for place in one.places:
                if isinstance(data, DataError):
                    found[place] = data
                else:
                    found[place] = data[place.offset_bytes - one.start : place.end_bytes - one.start]
        return found

    def _again(self, one: _Range) -> bytes | DataError:
        """Fetch one range with the patience that storage gets everywhere; one past the end of its shard is empty."""
        path = self.root / one.shard
        name = self._path(one.shard)
        try:
            try:
                return retrying(
                    lambda: cast(bytes, self._store().cat_file(name, start=one.start, end=one.end)), path, "read"
                )
            except TransientError:
                raise
            except JobError:  # 416 of S3 among others, by different names: the size tells
                if one.start < retrying(lambda: int(self._store().info(name)["size"]), path, "read"):
                    raise
                return b""
        except FileNotFoundError:
            return DataError(f"{path}: missing; `pixart verify {self.root}` names what it held")

    def _path(self, shard: str) -> str:
        return str(cast(Any, self.root / shard).path)

    def _store(self) -> Any:
        if os.getpid() != self._process:  # clients of a store do not outlive a fork
            self.root, self._process = location(str(self.root)), os.getpid()
        return cast(Any, self.root).fs


def join(places: Sequence[Place]) -> Iterator[_Range]:
    """Yield ranges that hold all places: those of near neighbours in a shard are one."""
    for shard, group in itertools.groupby(sorted(places), key=lambda place: place.shard):
        held: list[Place] = []
        end = 0
        for place in group:
            far = place.offset_bytes > end + MAX_GAP_BYTES
            if held and (far or place.end_bytes - held[0].offset_bytes > MAX_RANGE_BYTES):
                yield _Range(shard, held[0].offset_bytes, end, held)
                held = []
            held = [*held, place]
            end = max(end, place.end_bytes) if len(held) > 1 else place.end_bytes
        yield _Range(shard, held[0].offset_bytes, end, held)


def _is_whole(answer: Any, one: _Range) -> bool:
    return isinstance(answer, bytes) and len(answer) == one.end - one.start


def _is_damaged(data: bytes | DataError, place: Place) -> bool:
    return not isinstance(data, DataError) and (len(data) != place.size_bytes or crc32(data) != place.crc32)
