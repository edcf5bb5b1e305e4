"""Sealing: a feature set's index, its entries and its manifest, made from the index parts of its units.

Everything is written part by part: an index need not fit into memory.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import COMMITS, MANIFEST, Record, file_sha256, read_table
from pixart_data.config import digest
from pixart_data.entries import ENTRIES, Entries, checks, entry_type, key_hashes
from pixart_data.errors import DataError
from pixart_data.records import REJECTED
from pixart_data.retries import storage
from pixart_data.shards import INDEX, INDEX_PARTS, REJECTED_FILE, Manifest, manifest_bytes
from pixart_data.storage import discard, exists, replace_file, scratch_file, staging_path, write_atomic


def seal(root: Path, records: Sequence[Record], schema: pa.Schema, manifest: Manifest) -> Manifest:
    """Merge the units' index parts into one index and one table of rejected rows, then write the manifest.

    Args:
        records: The commit records of every unit of the set, in the order the index is to have.
        schema: `records.IMAGE_INDEX` or `records.TEXT_INDEX`.
        manifest: Complete but for the shards, their number and rows in each bucket, and the checksums.

    Raises:
        DataError: If a key occurs twice.
    """
    files = [file for record in records for file in record.files]
    parts = [file.path for file in files if file.path.startswith(f"{INDEX_PARTS}/")]
    shards = [asdict(file) for file in files if file.path.endswith(".tar")]
    manifest = replace(manifest, shards=shards, records=_digests(root, records))
    index = TableFile(root / INDEX, without(schema, "error", "detail"))
    rejected = TableFile(root / REJECTED_FILE, REJECTED)
    try:
        with EntryFile(root / ENTRIES, manifest) as entries:
            for part in parts:
                table = read_table(root / part, schema=schema)
                good = table.filter(table["error"].is_null()).select(index.schema.names)
                index.write(good)
                rejected.write(table.filter(table["error"].is_valid()).select(REJECTED.names))
                entries.add(good)
            require_distinct(root, entries.keys(), (root / part for part in parts))
            return publish_seal(root, manifest, index, rejected, entries)
    finally:
        index.discard()
        rejected.discard()


class TableFile:
    """A Parquet file that is written part by part under a temporary name."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._staged = staging_path(path.parent, path.name)
        self._writer = pq.ParquetWriter(self._staged, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Append rows, as a row group of their own."""
        with storage(self.path):
            self._writer.write_table(table)

    def publish(self) -> str:
        """Put the file in its place and return its sha256."""
        with storage(self.path):
            self._writer.close()
            sha256 = file_sha256(self._staged)
            replace_file(self._staged, self.path)
        return sha256

    def discard(self) -> None:
        """Delete what was not published."""
        self._writer.close()
        discard(self._staged)


class EntryFile:
    """`entries.bin` in the making: parts come in the order of the index, records leave in that of the shards.

    To be used in a `with`: what was not published does not outlast it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.dtype = entry_type(manifest.kind)
        self.shard_of = {shard["path"]: number for number, shard in enumerate(manifest.shards)}
        self.bucket_of = {bucket["ratio"]: number for number, bucket in enumerate(manifest.buckets)}
        self.rows_of = np.zeros(len(manifest.shards), np.int64)
        self._bucket_of_shard = np.zeros(len(manifest.shards), np.int64)
        self._lengths: list[int] = []
        self._num_rows = 0
        self._scratch = scratch_file(path.name)

    def __enter__(self) -> "EntryFile":
        return self

    def __exit__(self, *_: object) -> None:
        discard(self._scratch)

    def add(self, table: pa.Table) -> None:
        """Append the rows of an index part."""
        self.add_records(entries_of(table, self.shard_of, self.bucket_of, self._num_rows))

    def add_records(self, records: Entries) -> None:
        """Append the records of the rows that follow; they need no order among themselves, and no checks yet."""
        records = records[np.lexsort((records["row"], records["offset"], records["shard"]))]
        records["check"] = checks(records)
        if self.manifest.kind == "image":
            self._bucket_of_shard[records["shard"]] = records["bucket"]
        self.rows_of += np.bincount(records["shard"], minlength=len(self.rows_of))
        self._lengths.append(len(records))
        self._num_rows += len(records)
        with storage(self._scratch), self._scratch.open("ab") as file:
            records.tofile(file)

    def keys(self) -> npt.NDArray[np.uint64]:
        """Return the hashes of all keys."""
        keys, end = np.empty(self._num_rows, np.uint64), 0
        for part in self._parts():
            start, end = end, end + len(part)
            keys[start:end] = part["key"]
        return keys

    def held(self, bucket: int) -> dict[str, int]:
        """Return how many rows and shards a bucket has."""
        own = self.rows_of[(self._bucket_of_shard == bucket) & (self.rows_of > 0)]
        return {"rows": int(own.sum()), "shards": len(own)}

    def publish(self) -> str:
        """Put the records in order and the file in its place; return its sha256."""
        staged = staging_path(self.path.parent, self.path.name)
        try:
            with storage(self.path):
                self._write(staged)
                sha256 = file_sha256(staged)
            replace_file(staged, self.path)
        finally:
            discard(staged)
        return sha256

    def _write(self, staged: Path) -> None:
        if not self._num_rows:
            return
        with staged.open("r+b") as file:  # a full disk is to be an error here, and not a signal at some store below
            os.posix_fallocate(file.fileno(), 0, self._num_rows * self.dtype.itemsize)
        records = np.memmap(staged, self.dtype, "r+", shape=(self._num_rows,))
        order = np.lexsort((np.arange(len(self.rows_of)), self._bucket_of_shard))
        starts = np.zeros(len(order), np.int64)
        starts[order] = np.cumsum(self.rows_of[order]) - self.rows_of[order]
        filled, num_parts = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
        for part in self._parts():
            shards, firsts, counts = np.unique(part["shard"], return_index=True, return_counts=True)
            for shard, first, count in zip(shards, firsts, counts, strict=True):
                end = starts[shard] + filled[shard]
                records[end : end + count] = part[first : first + count]
            filled[shards] += counts
            num_parts[shards] += 1
        for shard in np.flatnonzero(num_parts > 1):
            own = records[starts[shard] : starts[shard] + filled[shard]]
            own[:] = own[np.lexsort((own["row"], own["offset"]))]
        records.flush()

    def _parts(self) -> Iterator[Entries]:
        with self._scratch.open("rb") as file:
            for length in self._lengths:
                yield np.fromfile(file, self.dtype, length)


def entries_of(table: pa.Table, shard_of: dict[str, int], bucket_of: dict[str, int], first_row: int) -> Entries:
    """Return the records of index rows, the first of which is row `first_row`, without their checks."""
    kind = "image" if "bucket" in table.schema.names else "text"
    records = np.zeros(table.num_rows, entry_type(kind))
    records["key"] = key_hashes(table["key"].to_pylist())
    records["row"] = np.arange(first_row, first_row + table.num_rows)
    records["shard"] = _numbers(table["shard"], shard_of)
    columns = {"offset": "offset_bytes", "size": "size_bytes", "crc": "crc32"}
    if kind == "image":
        columns |= {"height": "original_height_px", "width": "original_width_px"}
        columns |= {"flipped_offset": "flipped_offset_bytes", "flipped_crc": "flipped_crc32"}
        records["bucket"] = _numbers(table["bucket"], bucket_of)
    else:
        columns["num_tokens"] = "num_tokens"
    for field, column in columns.items():
        records[field] = table[column].fill_null(0).to_numpy()
    return records


def publish_seal(root: Path, manifest: Manifest, index: TableFile, rejected: TableFile, entries: EntryFile) -> Manifest:
    """Put the tables in their places, then the manifest that names them."""
    sealed = replace(
        manifest,
        shards=[{**shard, "rows": int(n)} for shard, n in zip(manifest.shards, entries.rows_of, strict=True)],
        buckets=[{**bucket, **entries.held(number)} for number, bucket in enumerate(manifest.buckets)],
        rejected_sha256=rejected.publish(),
        entries_sha256=entries.publish(),
        index_sha256=index.publish(),
    )
    write_atomic(root / MANIFEST, manifest_bytes(sealed))
    return sealed


def _digests(root: Path, records: Sequence[Record]) -> dict[str, str]:
    """Return the digests of records that lie beside the set; what is sealed from others' shards has none there."""
    if not records or not exists(root / COMMITS / f"{records[0].unit}.json"):
        return {}
    return {record.unit: digest(asdict(record)) for record in records}


def without(schema: pa.Schema, *names: str) -> pa.Schema:
    """Return a schema less some of its columns."""
    return pa.schema([column for column in schema if column.name not in names])


def require_distinct(root: Path, hashes: npt.NDArray[np.uint64], tables: Iterator[Path]) -> None:
    """Check that no two keys have one hash; `tables` have the keys, to name them.

    Raises:
        DataError: If a key occurs twice, or two keys cannot be told apart by their hashes.
    """
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return
    found: list[str] = []
    for path in tables:
        keys: list[str] = read_table(path, columns=["key"])["key"].to_pylist()
        found += (keys[row] for row in np.flatnonzero(key_hashes(keys) == twice[0]))
    others = f" and {len(twice) - 1} others" if len(twice) > 1 else ""
    if len(set(found)) > 1:
        raise DataError(
            f"{root}: the keys {' and '.join(sorted(set(found)))} differ, but have the same 64-bit hash, by which "
            "training finds them; leave one of these rows out, or rename its key"
        )
    raise DataError(
        f"{root}: key {' and '.join(sorted(set(found)))}{others} occur more than once; a feature set holds one row for "
        "each image: name sources apart with source.root, or keep one caption for each key"
    )


def _numbers(column: pa.ChunkedArray, number_of: dict[str, int]) -> npt.NDArray[Any]:
    encoded = column.combine_chunks().dictionary_encode()
    if not len(encoded):
        return np.empty(0, np.int64)
    numbers = np.array([number_of[name] for name in encoded.dictionary.to_pylist()], np.int64)
    numbered: npt.NDArray[np.int64] = numbers[encoded.indices.to_numpy(zero_copy_only=False)]
    return numbered
