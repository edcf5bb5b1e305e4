"""The index of a feature set as fixed-size binary records, to be memory-mapped: `entries.bin`.

`index.parquet` is what people and databases read; training reads this. Records lie in the order of the shards, so that
neighbours in the file are neighbours on the disk: image sets by bucket, shard and offset, text sets by shard and
offset. Little-endian. Each record carries a check of its own, so that a bit that flips is noticed where it is read.

    image  64 bytes  key, offset, flipped_offset, crc, flipped_crc, size, shard, row, height, width, bucket
    text   40 bytes  key, offset, crc, size, shard, row, num_tokens

`key` is `key_hash` of the sample's key; offsets and sizes are in bytes, sides those of the original image in pixels;
`shard` and `bucket` number the lists in the manifest; `row` is the sample's row in index.parquet.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_data.advice import command
from pixart_data.errors import DataError
from pixart_data.tables import parquet

ENTRIES = "entries.bin"

IMAGE_ENTRY = np.dtype(
    [
        ("key", "<u8"), ("offset", "<u8"), ("flipped_offset", "<u8"), ("crc", "<u4"), ("flipped_crc", "<u4"),
        ("size", "<u4"), ("shard", "<u4"), ("row", "<u4"), ("height", "<u4"), ("width", "<u4"), ("bucket", "<u4"),
        ("reserved", "<u4"), ("check", "<u4"),
    ]
)  # fmt: skip
"""`flipped_offset` is 0 where there is no mirrored image."""

TEXT_ENTRY = np.dtype(
    [
        ("key", "<u8"), ("offset", "<u8"), ("crc", "<u4"), ("size", "<u4"), ("shard", "<u4"), ("row", "<u4"),
        ("num_tokens", "<u4"), ("check", "<u4"),
    ]
)  # fmt: skip

Entries = npt.NDArray[np.void]
"""Records of one of the two types; (N,)."""

_BESIDE_CHECK = np.uint64(0xFFFFFFFF)  # in the last word of a record, whose upper half is the check
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64: odd, and its bits look random


def entry_type(kind: str) -> np.dtype[np.void]:
    """Return the type of the records of a set of this kind, "image" or "text"."""
    return IMAGE_ENTRY if kind == "image" else TEXT_ENTRY


def key_hash(key: str) -> int:
    """Return the first 8 bytes of the BLAKE2b digest of a key, as a little-endian number."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def key_hashes(keys: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return the hashes of many keys."""
    return np.fromiter(map(key_hash, keys), np.uint64)


def checks(records: Entries) -> npt.NDArray[np.uint32]:
    """Return what the `check` of each record must be: a mix of all its other bytes."""
    columns = (
        np.ascontiguousarray(records).view("<u8").reshape(len(records), records.dtype.itemsize // 8).T
    )  # (words, N)
    mixed = np.full(len(records), _MULTIPLIER)  # not zero: a hole in the file must not fit
    for column in (*columns[:-1], columns[-1] & _BESIDE_CHECK):
        mixed = (mixed ^ column) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def require_whole(records: Entries, where: Path) -> None:
    """Check records that were read.

    Raises:
        DataError: If one is damaged.
    """
    if not np.array_equal(records["check"], checks(records)):
        raise DataError(
            f"{where}: damaged: a record does not fit its check; run {command(where.parent)} again: the index is "
            "rewritten"
        )


def map_entries(path: Path, kind: str) -> Entries:
    """Memory-map a file of records; they are not checked.

    Raises:
        DataError: If there is no such file, or it does not hold whole records.
    """
    dtype = entry_type(kind)
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run {command(path.parent)} again: the index is rewritten") from None
    if size_bytes % dtype.itemsize:
        raise DataError(
            f"{path}: expected records of {dtype.itemsize} bytes, found {size_bytes} bytes; run "
            f"{command(path.parent)} again: the index is rewritten"
        )
    if not size_bytes:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def read_keys(index: Path, rows: Sequence[int]) -> list[str]:
    """Return the keys of rows of an index.parquet; only the row groups that hold them are read.

    Raises:
        DataError: If it is missing or damaged.
    """
    numbers = np.asarray(rows, np.int64)
    found: dict[int, str] = {}
    with parquet(index) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(counts)
        groups = np.searchsorted(ends, numbers, side="right")
        for group in np.unique(groups).tolist():
            keys = file.read_row_group(group, columns=["key"])["key"]
            first = int(ends[group]) - counts[group]
            found |= {int(row): keys[int(row) - first].as_py() for row in numbers[groups == group]}
    return [found[int(row)] for row in rows]
