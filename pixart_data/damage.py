"""Which samples a shard has lost: every byte of it read and, where it is not whole, the damaged members named."""

import hashlib
import itertools
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from zlib_ng.zlib_ng import crc32

from pixart_data.entries import Entries
from pixart_data.shards import FLIPPED_MEMBER, MEMBER, Manifest, member_prefix, member_tensors
from pixart_data.storage import exists, local_copy, size_bytes

NULL_KEY = "null-caption"

_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Finding:
    """What one file turned out to be. `problem` is empty where it is whole; `sample` names a damaged sample."""

    path: Path
    size_bytes: int = 0
    num_samples: int = 0
    sample: str = ""
    problem: str = ""


class Keys:
    """The keys of an index by row, which are read when the first one is asked for: only damage has a name."""

    def __init__(self, index: Path | None) -> None:
        self.index = index
        self._column: Any = None

    def __call__(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of rows; where there is no whole index, what stands for them."""
        if self.index is None:
            return [f"of row {row} of the index" for row in rows]
        if self._column is None:
            self._column = pq.read_table(self.index, columns=["key"])["key"]
        return [self._column[row].as_py() for row in rows]


class Member(NamedTuple):
    """A member of a shard, and the rows of the index that address it; it is named by the key of one of them.

    Attributes:
        rows: Of the index; none for the empty caption.
        sizes: What its tensors' shapes follow from: `height_px` and `width_px`, or `num_tokens`, and `size_bytes`.
        extension: `shards.MEMBER`, or `shards.FLIPPED_MEMBER` for a mirrored image.
    """

    rows: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    crc32: int
    sizes: dict[str, Any]
    extension: str = MEMBER


def members(shard: str, records: Entries, manifest: Manifest) -> list[Member]:
    """Return the members of a shard in the order of their offsets; `records` are its entries."""
    found = []
    for offset, group in itertools.groupby(records, key=lambda record: int(record["offset"])):
        same = list(group)
        first = same[0]
        size = int(first["size"])
        rows = tuple(int(record["row"]) for record in same)
        if manifest.kind == "image":
            bucket = manifest.buckets[int(first["bucket"])]
            sizes = {"height_px": bucket["height_px"], "width_px": bucket["width_px"], "size_bytes": size}
        else:
            sizes = {"num_tokens": int(first["num_tokens"]), "size_bytes": size}
        found.append(Member(rows, offset, size, int(first["crc"]), sizes))
        if manifest.kind == "image" and first["flipped_offset"]:
            place = int(first["flipped_offset"]), size, int(first["flipped_crc"])
            found.append(Member(rows, *place, sizes, FLIPPED_MEMBER))
    null = manifest.model.get("null")
    if null and null["path"] == shard:
        found.append(Member((), null["offset_bytes"], null["size_bytes"], null["crc32"], dict(null)))
    return sorted(found, key=lambda member: member.offset_bytes)


def check_shard(
    root: Path, shard: dict[str, Any], records: Entries | None, manifest: Manifest, keys: Keys
) -> Iterator[Finding]:
    """Read every byte of a shard; yield a finding for it, or one for each damaged member.

    Args:
        shard: Its line in the manifest.
        records: Its entries; None where neither index nor entries are whole: then no sample can be named.
        keys: Names the rows.
    """
    path = root / shard["path"]
    if not exists(path):
        yield Finding(path, problem=_missing(shard, records, keys))
        return
    with local_copy(path) as copy, copy.open("rb") as file:
        if not copy.stat().st_size:
            yield Finding(path, problem=f"empty, expected {shard['size_bytes']} bytes")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            held = None if records is None else members(shard["path"], records, manifest)
            yield from _check_bytes(path, data, shard["sha256"], held, manifest, keys)


def check_size(root: Path, shard: dict[str, Any], records: Entries | None, keys: Keys) -> Finding:
    """Look at the size of a shard only."""
    path = root / shard["path"]
    if not exists(path):
        return Finding(path, problem=_missing(shard, records, keys))
    found = size_bytes(path)
    if found != shard["size_bytes"]:
        return Finding(path, problem=f"expected {shard['size_bytes']} bytes, found {found}; it is damaged")
    return Finding(path, found, shard.get("rows", 0))


def _missing(shard: dict[str, Any], records: Entries | None, keys: Keys) -> str:
    if records is None:
        return f"missing, with {shard.get('rows', '?')} samples"
    if not len(records):
        return "missing, with no samples of the index"
    return f"missing, with {len(records)} samples from {keys([int(records['row'].min())])[0]} on"


def _check_bytes(
    path: Path, data: mmap.mmap, sha256: str, held: list[Member] | None, manifest: Manifest, keys: Keys
) -> Iterator[Finding]:
    whole = hashlib.sha256(data).hexdigest() == sha256
    num_samples = sum(max(1, len(m.rows)) for m in held or () if m.extension == MEMBER)
    if held is None:
        problem = "" if whole else "damaged; its samples cannot be named, as the index is not whole"
        yield Finding(path, len(data), 0, "", problem)
        return
    damaged = [member for member in held if crc32(_tensors(data, member)) != member.crc32]
    if not whole and not damaged:
        damaged = [member for member in held if not _prefix_is_whole(data, member, manifest, keys)]
    for member in damaged:
        yield Finding(path, len(data), num_samples, *_named(member, keys))
    if not damaged and not whole:
        last = _named(held[-1], keys)[0] if held else "?"
        yield Finding(path, len(data), num_samples, last, "damaged between samples or after this, the last one")
    elif not damaged:
        yield Finding(path, len(data), num_samples)


def _tensors(data: mmap.mmap, member: Member) -> bytes:
    return data[member.offset_bytes : member.offset_bytes + member.size_bytes]


def _named(member: Member, keys: Keys) -> tuple[str, str]:
    """Return the name of a damaged sample and what is damaged."""
    if not member.rows:
        return NULL_KEY, "damaged"
    what = "its mirrored image is damaged" if member.extension == FLIPPED_MEMBER else "damaged"
    others = len(member.rows) - 1
    shared = f", with {others} other sample(s) of the same caption" if others else ""
    return keys(member.rows[:1])[0], what + shared


def _prefix_is_whole(data: mmap.mmap, member: Member, manifest: Manifest, keys: Keys) -> bool:
    """Tell whether a member's headers are as they were written.

    Where rows share a member, it has the name of the first that was written; of a part of a dataset, the row of that
    one may be in another part, so that the name can only be read, and the tar's own checksum speaks for it.
    """
    tensors = member_tensors(member.sizes, manifest)
    names = keys(member.rows) if member.rows else [NULL_KEY]
    for name in names:
        prefix = member_prefix(name, tensors, member.extension)
        if data[max(0, member.offset_bytes - len(prefix)) : member.offset_bytes] == prefix:
            return True
    if manifest.kind == "image":
        return False
    fixed = member_prefix("", tensors, member.extension)
    header = data[max(0, member.offset_bytes - len(fixed)) : member.offset_bytes]
    try:
        found = tarfile.TarInfo.frombuf(header[:_TAR_BLOCK_BYTES], tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    stored = found.name.removesuffix(f".{member.extension}")
    return stored not in names and header[_TAR_BLOCK_BYTES:] == fixed[_TAR_BLOCK_BYTES:]


def by_shard(records: Entries, num_shards: int) -> list[tuple[int, int]]:
    """Return where in `records` the entries of each shard begin and end; those of a shard lie side by side."""
    bounds = [(0, 0)] * num_shards
    if len(records):
        numbers = np.asarray(records["shard"])
        starts = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1, [len(numbers)]]).tolist()
        for start, end in itertools.pairwise(starts):
            bounds[int(numbers[start])] = (start, end)
    return bounds
