"""The stage of `compact`: members of a feature set into large shards, one pack after another."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.worker import Report
from pixart_data.commits import PublishedFile, Record, publish, publish_table
from pixart_data.config import digest
from pixart_data.editions import Lookup, Original
from pixart_data.errors import DataError
from pixart_data.packs import TEXT_FOLDER, Pack, read_members
from pixart_data.ranges import Place, Ranges
from pixart_data.shards import (
    DTYPES,
    FLIPPED_MEMBER,
    MEMBER,
    MOMENTS,
    FeatureSet,
    ShardWriter,
    TensorPlace,
    Tensors,
    member_tensors,
)
from pixart_data.storage import is_remote, staging_path
from pixart_data.threads import ahead

PLACES = "places"
NULL_UNIT = "null-caption"

_READ_THREADS = 8
_READ_BYTES = 2 << 20  # by one thread, before it looks for other work
_FETCH_THREADS = 2
_FETCH_BYTES = 64 << 20  # from an object store, which reads them by many connections at once
_PLACES = pa.schema(
    [
        ("hash", pa.uint64()),  # of the key that names the member
        ("offset_bytes", pa.uint64()),
        ("flipped_offset_bytes", pa.uint64()),  # 0: none
    ]
)


@dataclass(frozen=True)
class NullCaption:
    """The unit that copies the features of the empty caption."""

    place: Place
    num_tokens: int
    id: str = NULL_UNIT
    num_members: int = 0

    @property
    def digest(self) -> str:
        """Of what it copies."""
        return digest([self.place.size_bytes, self.place.crc32, self.num_tokens])


@dataclass(frozen=True)
class _Member:
    """A member to be copied.

    Attributes:
        sizes: What the shapes of its tensors follow from, as in a row of the index.
        places: In the source, of it and, if there is one, of its mirrored image.
    """

    key: str
    hash: int
    sizes: tuple[tuple[str, int], ...]
    places: tuple[Place, ...]

    @property
    def size_bytes(self) -> int:
        return sum(place.size_bytes for place in self.places)


class PackStage:
    """Copies the members of one pack after another from a sealed set, on any storage, into shards of another."""

    def __init__(self, root: Path, source: Path) -> None:
        from pixart_data.codecs import from_manifest

        self.root = root
        self.original = Original(source)
        manifest = self.manifest = self.original.manifest
        self._lookup = Lookup(self.original.entries["key"])
        self._store = Ranges(source) if is_remote(source) else None
        self._disk = None if is_remote(source) else FeatureSet(source)
        self._types: Sequence[tuple[str, str]] = MOMENTS
        if manifest.kind == "text":
            self._types = from_manifest(manifest.codec, manifest.model["width"], {}).tensors
        self._tensors = lru_cache(maxsize=1 << 14)(partial(_tensors, manifest))

    def __call__(self, unit: Pack | NullCaption, report: Report) -> Record:
        """Write the unit's shard and the table of where its members lie, and return its record.

        Raises:
            DataError: Naming a member that is damaged, or is not what was planned any more.
        """
        if isinstance(unit, NullCaption):
            return self._null(unit)
        rows: list[tuple[int, int, int]] = []
        writer = self._writer(unit)
        try:
            for member, found in self._read(self._members(unit)):
                pieces = zip(member.places, found, (MEMBER, FLIPPED_MEMBER), strict=False)
                places = [self._add(writer, member, place, data, kind) for place, data, kind in pieces]
                rows.append((member.hash, places[0].offset_bytes, places[1].offset_bytes if places[1:] else 0))
                report(len(rows), 0)
            shard = self._publish(writer, unit)
        finally:
            writer.discard()
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _PLACES, strict=True)]
        table = publish_table(pa.table(columns, schema=_PLACES), self.root, self.root / PLACES, unit.id)
        return Record(unit.id, "", {}, len(rows), len(rows), {}, [shard, table])

    def damaged(self, unit: Pack | NullCaption) -> list[str]:
        """Return what is wrong with the members of a unit, a line for each."""
        found: list[str] = []
        try:
            members = [self._null_member(unit)] if isinstance(unit, NullCaption) else self._members(unit)
        except DataError as error:
            return [str(error)]
        for member, pieces in self._read(members):
            found += (
                self._complaint(member, place)
                for place, data in zip(member.places, pieces, strict=True)
                if isinstance(data, DataError) or not _is_whole(data, place)
            )
        return found

    def _null(self, unit: NullCaption) -> Record:
        writer = self._writer(unit)
        try:
            [(member, [data])] = self._read([self._null_member(unit)])
            place = self._add(writer, member, unit.place, data, MEMBER)
            file = self._publish(writer, unit)
        finally:
            writer.discard()
        null = {"path": file.path, **asdict(place), "num_tokens": unit.num_tokens}
        return Record(unit.id, "", {}, 0, 0, {}, [file], facts={"null": null})

    def _null_member(self, unit: NullCaption) -> _Member:
        sizes = (("num_tokens", unit.num_tokens), ("size_bytes", unit.place.size_bytes))
        return _Member(NULL_UNIT, 0, sizes, (unit.place,))

    def _members(self, pack: Pack) -> list[_Member]:
        """Return the members of a pack and where they lie now.

        Raises:
            DataError: If one is not there any more.
        """
        planned = read_members(self.root, pack)
        hashes = planned["hash"].to_numpy()
        at, found = self._lookup(hashes)
        records = self.original.entries[at]
        same = found & (records["crc"] == planned["crc32"].to_numpy())
        keys = planned["key"].to_pylist()
        if not same.all():
            key = keys[int(np.flatnonzero(~same)[0])]
            raise DataError(f"{self.original.root}: sample {key} changed while it was compacted; run this again")
        return [
            _Member(key, int(record["key"]), self._sizes(record), self._places(record))
            for key, record in zip(keys, records, strict=True)
        ]

    def _sizes(self, record: Any) -> tuple[tuple[str, int], ...]:
        if self.manifest.kind == "image":
            bucket = self.manifest.buckets[record["bucket"]]
            return (("height_px", bucket["height_px"]), ("width_px", bucket["width_px"]))
        return (("num_tokens", int(record["num_tokens"])), ("size_bytes", int(record["size"])))

    def _places(self, record: Any) -> tuple[Place, ...]:
        shard, size = str(self.manifest.shards[record["shard"]]["path"]), int(record["size"])
        place = Place(shard, int(record["offset"]), size, int(record["crc"]))
        if self.manifest.kind == "text" or not record["flipped_offset"]:
            return (place,)
        return (place, Place(shard, int(record["flipped_offset"]), size, int(record["flipped_crc"])))

    def _read(self, members: Sequence[_Member]) -> Iterator[tuple[_Member, list[bytes | DataError]]]:
        """Yield members in order with their bytes, which may be wrong, those of the mirrored image second."""
        num_threads, at_once = (_READ_THREADS, _READ_BYTES) if self._disk else (_FETCH_THREADS, _FETCH_BYTES)
        for some, found in ahead(self._fetch, _portions(members, at_once), num_threads, 2 * num_threads):
            pieces = iter(found)
            for member in some:
                yield member, [next(pieces) for _ in member.places]

    def _fetch(self, some: list[_Member]) -> tuple[list[_Member], list[bytes | DataError]]:
        places = [place for member in some for place in member.places]
        if self._store is not None:
            return some, self._store.read(places)
        return some, [self._from_disk(place) for place in places]

    def _from_disk(self, place: Place) -> bytes | DataError:
        data = bytearray(place.size_bytes)
        try:
            if self._disk is not None:
                self._disk.read_into(place.shard, place.offset_bytes, memoryview(data))
        except DataError as error:
            return error
        return bytes(data)

    def _add(
        self, writer: ShardWriter, member: _Member, place: Place, data: bytes | DataError, extension: str
    ) -> TensorPlace:
        if isinstance(data, DataError):
            raise DataError(self._complaint(member, place)) from data
        arrays, start = [], 0
        values = np.frombuffer(data, np.uint8)
        for _, dtype, shape in self._tensors(member.sizes):
            size = int(np.dtype(DTYPES[dtype]).itemsize * np.prod(shape, dtype=np.int64))
            arrays.append(values[start : start + size].view(DTYPES[dtype]).reshape(shape))
            start += size
        written = writer.add(member.key, *arrays, extension=extension)
        if written.crc32 != place.crc32:
            raise DataError(self._complaint(member, place))
        return written

    def _complaint(self, member: _Member, place: Place) -> str:
        return (
            f"{self.original.root / place.shard}: sample {member.key}: damaged or missing: its bytes do not fit the "
            f"checksum in the index; `pixart verify {self.original.root}` says what to do"
        )

    def _writer(self, unit: Pack | NullCaption) -> ShardWriter:
        return ShardWriter(staging_path(self.root / _folder(unit), f"{unit.id}.tar"), self._types)

    def _publish(self, writer: ShardWriter, unit: Pack | NullCaption) -> PublishedFile:
        writer.close()
        return publish(writer.path, self.root, self.root / _folder(unit), unit.id, ".tar")


def _folder(unit: Pack | NullCaption) -> str:
    return unit.folder if isinstance(unit, Pack) else TEXT_FOLDER


def _tensors(manifest: Any, sizes: tuple[tuple[str, int], ...]) -> Tensors:
    return member_tensors(dict(sizes), manifest)


def _is_whole(data: bytes, place: Place) -> bool:
    from zlib_ng.zlib_ng import crc32

    return len(data) == place.size_bytes and crc32(data) == place.crc32


def _portions(members: Sequence[_Member], size_bytes: int) -> Iterator[list[_Member]]:
    """Cut members into lists of about `size_bytes`."""
    held: list[_Member] = []
    num_bytes = 0
    for member in members:
        held.append(member)
        num_bytes += member.size_bytes
        if num_bytes >= size_bytes:
            yield held
            held, num_bytes = [], 0
    if held:
        yield held
