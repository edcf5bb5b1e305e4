"""Whether the tables of a feature set say the same: index.parquet, entries.bin and the manifest.

Each may be whole and yet not belong to the others: a copy of an older index, a manifest of another run. Memory: about
20 bytes for each sample, besides a block of rows.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_data.codecs import from_manifest
from pixart_data.entries import Entries, checks, entry_type
from pixart_data.errors import DataError
from pixart_data.seals import entries_of
from pixart_data.shards import Manifest, tensor_shape

_ROWS_READ = 1 << 16
_CHECKED_ROWS = 1 << 18


class Block:
    """Rows of the index, one after another, as a table and as the entries that they must have.

    Attributes:
        first_row: The number of the first.
        records: Entries in the order of the rows.
    """

    def __init__(self, table: pa.Table, first_row: int, manifest: Manifest) -> None:
        self.table, self.first_row = table, first_row
        shards = {shard["path"]: number for number, shard in enumerate(manifest.shards)}
        buckets = {bucket["ratio"]: number for number, bucket in enumerate(manifest.buckets)}
        names = [("shard", shards)] + ([("bucket", buckets)] if manifest.kind == "image" else [])
        for column, known in names:
            strange = set(pc.unique(table[column]).to_pylist()) - known.keys()
            if strange:
                key = table.filter(pc.equal(table[column], sorted(strange, key=str)[0]))["key"][0].as_py()
                raise DataError(f"sample {key}: its {column} {sorted(strange, key=str)[0]} is not in the manifest")
        self.records = entries_of(table, shards, buckets, first_row)
        self.records["check"] = checks(self.records)


def blocks(index: Path, manifest: Manifest) -> Iterator[Block]:
    """Read an index block by block.

    Raises:
        DataError: If a row names a shard or bucket that the manifest does not; the message is without the path.
    """
    columns = ["key", "shard", "offset_bytes", "size_bytes", "crc32"]
    if manifest.kind == "image":
        columns += ["flipped_offset_bytes", "flipped_crc32", "bucket", "height_px", "width_px"]
        columns += ["original_height_px", "original_width_px"]
    else:
        columns.append("num_tokens")
    with pq.ParquetFile(index) as file:
        first_row = 0
        for batch in file.iter_batches(_ROWS_READ, columns=columns):
            yield Block(pa.Table.from_batches([batch]), first_row, manifest)
            first_row += batch.num_rows


def from_index(index: Path, manifest: Manifest) -> Entries:
    """Return the entries that an index must have, ordered by shard and offset.

    Raises:
        DataError: As `blocks`.
    """
    found = [np.empty(0, entry_type(manifest.kind)), *(block.records for block in blocks(index, manifest))]
    records = np.concatenate(found)
    return records[np.lexsort((records["row"], records["offset"], records["shard"]))]


def disagreements(index: Path, rejected: Path, entries: Entries, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with three tables, each of which is the one the manifest names.

    Args:
        index: A local copy of index.parquet.
        rejected: A local copy of rejected.parquet.
        entries: Those of entries.bin.
    """
    num_rows, num_rejected = (pq.read_metadata(path).num_rows for path in (index, rejected))
    if num_rows != len(entries):
        yield f"holds {num_rows} rows, entries.bin {len(entries)}"
        return
    counts = manifest.counts
    if counts and counts.get("rows_out") != num_rows:
        yield f"holds {num_rows} rows, the manifest counts {counts.get('rows_out')}"
    if counts and sum(counts.get("rejected", {}).values()) != num_rejected:
        yield f"rejected.parquet holds {num_rejected} rows, the manifest counts {counts.get('rejected')}"
    for problem_of in (_damaged_record, _wrong_row, _wrong_number, _wrong_order, _same_key) if num_rows else ():
        problem = problem_of(entries, manifest)
        if problem:  # what follows takes this for granted
            yield problem
            return
    yield from _wrong_counts(entries, manifest)
    try:
        yield from _wrong_rows(index, entries, manifest)
    except DataError as error:
        yield str(error)


def wrong_numbers(entries: Entries, manifest: Manifest) -> str:
    """Say which number in the entries is that of no row, shard or bucket of their set; empty if there is none."""
    return (_wrong_row(entries, manifest) or _wrong_number(entries, manifest)) if len(entries) else ""


def _damaged_record(entries: Entries, manifest: Manifest) -> str:
    for start in range(0, len(entries), _CHECKED_ROWS):
        some = entries[start : start + _CHECKED_ROWS]
        wrong = np.flatnonzero(some["check"] != checks(some))
        if len(wrong):
            return f"record {start + int(wrong[0])} of entries.bin does not fit its check"
    return ""


def _wrong_row(entries: Entries, manifest: Manifest) -> str:
    seen = np.zeros(len(entries), np.bool_)
    rows = np.asarray(entries["row"])
    if int(rows.max()) >= len(entries):
        return f"entries.bin has row {rows.max()}, of {len(entries)}"
    seen[rows] = True
    if not seen.all():
        return f"row {int(np.flatnonzero(~seen)[0])} is not in entries.bin, and another is there twice"
    return ""


def _wrong_number(entries: Entries, manifest: Manifest) -> str:
    for name, number in (("shard", len(manifest.shards)), ("bucket", len(manifest.buckets))):
        if name in (entries.dtype.names or ()) and int(entries[name].max()) >= number:
            return f"entries.bin has {name} {entries[name].max()}, the manifest {number} of them"
    return ""


def _wrong_order(entries: Entries, manifest: Manifest) -> str:
    return "" if _is_sorted(entries) else "entries.bin is not in the order of the shards"


def _same_key(entries: Entries, manifest: Manifest) -> str:
    keys = np.sort(entries["key"])
    return "a key occurs twice" if np.any(keys[1:] == keys[:-1]) else ""


def _is_sorted(entries: Entries) -> bool:
    names = [name for name in ("bucket", "shard", "offset", "row") if name in (entries.dtype.names or ())]
    ahead = np.zeros(len(entries) - 1, np.bool_)  # later than the record before, by the columns so far
    for name in names:
        column = np.asarray(entries[name])
        if np.any(~ahead & (column[1:] < column[:-1])):
            return False
        ahead |= column[1:] > column[:-1]
    return bool(ahead.all())


def _wrong_counts(entries: Entries, manifest: Manifest) -> Iterator[str]:
    found = np.bincount(entries["shard"], minlength=len(manifest.shards)).tolist()
    for shard, rows in zip(manifest.shards, found, strict=True):
        if shard.get("rows") != rows:
            yield f"holds {rows} rows of {shard['path']}, the manifest counts {shard.get('rows')}"
    if manifest.kind != "image":
        return
    for number, bucket in enumerate(manifest.buckets):
        own = np.asarray(entries["shard"][entries["bucket"] == number])
        held = (len(own), len(np.unique(own)))
        if (bucket.get("rows"), bucket.get("shards")) != held:
            told = f"{bucket.get('rows')} in {bucket.get('shards')}"
            yield f"holds {held[0]} rows in {held[1]} shards of bucket {bucket['ratio']}, the manifest counts {told}"


def _wrong_rows(index: Path, entries: Entries, manifest: Manifest) -> Iterator[str]:
    place = np.empty(len(entries), np.uint32)  # of each row, where its record is
    place[entries["row"]] = np.arange(len(entries), dtype=np.uint32)
    for block in blocks(index, manifest):
        found = entries[place[block.first_row : block.first_row + len(block.records)]]
        wrong = np.flatnonzero(_bytes(found) != _bytes(block.records))
        if len(wrong):
            key = block.table["key"][int(wrong[0])].as_py()
            names = [name for name in found.dtype.names or () if found[name][wrong[0]] != block.records[name][wrong[0]]]
            different = ", ".join(name for name in names if name != "check")
            also = f", and {len(wrong) - 1} rows near it" if len(wrong) > 1 else ""
            yield f"sample {key}: entries.bin has another {different}{also}"
            return
        problem = _wrong_size(block, manifest)
        if problem:
            yield problem
            return


def _bytes(records: Entries) -> npt.NDArray[np.void]:
    """Return records as values that compare byte by byte."""
    return np.ascontiguousarray(records).view(f"V{records.dtype.itemsize}")


def _wrong_size(block: Block, manifest: Manifest) -> str:
    """Say which sample is of another size than its bucket or its number of tokens."""
    expected = _sizes(block, manifest)
    wrong = np.zeros(len(block.records), np.bool_)
    if expected is not None:
        wrong |= block.records["size"] != expected
    if manifest.kind == "image":
        for side in ("height_px", "width_px"):
            of_bucket = np.array([bucket[side] for bucket in manifest.buckets])
            wrong |= block.table[side].to_numpy() != of_bucket[block.records["bucket"]]
    if not wrong.any():
        return ""
    key = block.table["key"][int(np.flatnonzero(wrong)[0])].as_py()
    return f"sample {key}: its size is not that of its {'bucket' if manifest.kind == 'image' else 'tokens'}"


def _sizes(block: Block, manifest: Manifest) -> npt.NDArray[np.int64] | None:
    """Return the bytes of each sample; None where they depend on its values."""
    if manifest.kind == "image":
        shapes = [tensor_shape(bucket, manifest) for bucket in manifest.buckets]
        of_bucket = 2 * np.array([np.prod(shape) for shape in shapes], np.int64)
        sizes: npt.NDArray[np.int64] = of_bucket[block.records["bucket"]]
        return sizes
    codec = from_manifest(manifest.codec, manifest.model["width"], {})
    num_tokens, inverse = np.unique(block.records["num_tokens"], return_inverse=True)
    of_tokens = [codec.size_bytes(int(number)) for number in num_tokens]
    if None in of_tokens:
        return None
    return np.array(of_tokens, np.int64)[inverse]
