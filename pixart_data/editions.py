"""New editions of feature sets: the same samples in other shards, or some of them, or those of several sets.

Members of shards are copied or linked elsewhere; here are the tables that go with them. An index is read and written
in pieces, so that captions need not fit into memory; what is known of every row at once is numbers, some 170 bytes.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.advice import command
from pixart_data.agreement import wrong_numbers
from pixart_data.commits import COMMITS, MANIFEST, file_sha256
from pixart_data.entries import ENTRIES, Entries, entry_type, map_entries
from pixart_data.errors import DataError
from pixart_data.owners import MARKER
from pixart_data.records import IMAGE_INDEX, REJECTED, TEXT_INDEX
from pixart_data.seals import EntryFile, TableFile, publish_seal, without
from pixart_data.shards import INDEX, REJECTED_FILE, Manifest, read_manifest
from pixart_data.storage import exists, is_remote, local_copy, matching, read_bytes, write_atomic
from pixart_data.tables import readable

Numbers = npt.NDArray[np.int64]

_REPORT = "stats.json"  # finishes the output of `stats`, which may lie beside feature sets
_BEGUN = (ENTRIES, INDEX, MARKER)
_ROWS_AT_ONCE = 1 << 16
_RECORDS_AT_ONCE = 1 << 21


class Original:
    """A sealed feature set on any storage, whose rows are looked at, but not its shards.

    Attributes:
        entries: Its records, which are those that were sealed; of a set on an object store, in memory.

    Raises:
        DataError: If it is not sealed, or its records are damaged or not those that the manifest names.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = read_manifest(root)
        self.entries = _read_entries(root, self.manifest.kind)
        self._require_whole()
        self._is_index_checked = False

    def __len__(self) -> int:
        return len(self.entries)

    def _require_whole(self) -> None:
        counted = self.manifest.counts.get("rows_out", len(self))
        # What is mapped is hashed, and not the file of that name, which may be another by now.
        if hashlib.sha256(self.entries.view(np.uint8).data).hexdigest() != self.manifest.entries_sha256:
            problem = f"damaged, or not the one that {MANIFEST} names"
        elif counted != len(self):
            problem = f"holds {len(self):,} samples, {MANIFEST} counts {counted:,}"
        else:
            problem = wrong_numbers(self.entries, self.manifest)
        if problem:
            raise DataError(f"{self.root / ENTRIES}: {problem}; `pixart verify {self.root}` says what to do")

    @property
    def schema(self) -> pa.Schema:
        """The columns of its index."""
        return without(IMAGE_INDEX if self.manifest.kind == "image" else TEXT_INDEX, "error", "detail")

    @cached_property
    def places(self) -> Numbers:
        """Where in the entries the record of each row is; (N,), by row of the index."""
        places = np.empty(len(self), np.int64)
        places[self.entries["row"]] = np.arange(len(self))
        return places

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a field of the entries by row of the index; (N,)."""
        column: npt.NDArray[Any] = self.entries[name][self.places]
        return column

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield pieces of the index in order, each with the number of its first row.

        Raises:
            DataError: If the index is missing, damaged or not that of the manifest.
        """
        with self._opened(INDEX) as copy:
            if columns is None or not self._is_index_checked:  # what is written on is read with care
                self._require_same(INDEX, copy, self.manifest.index_sha256)
                self._is_index_checked = True
            num_rows = pq.read_metadata(copy).num_rows
            if num_rows != len(self):
                more = f"`pixart verify {self.root}` says more"
                raise DataError(f"{self.root}: {INDEX} has {num_rows} rows, {ENTRIES} {len(self)}; {more}")
            first = 0
            for piece in _pieces(copy, columns):
                yield first, piece
                first += piece.num_rows

    def rejected(self) -> Iterator[pa.Table]:
        """Yield pieces of the table of rejected rows.

        Raises:
            DataError: If it is missing, damaged or not that of the manifest.
        """
        with self._opened(REJECTED_FILE) as copy:
            self._require_same(REJECTED_FILE, copy, self.manifest.rejected_sha256)
            yield from _pieces(copy, REJECTED.names)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of a few rows."""
        wanted, found = np.array(sorted(set(rows)), np.int64), dict[int, str]()
        for first, table in self.tables(["key"]) if len(wanted) else ():
            inside = wanted[(wanted >= first) & (wanted < first + table.num_rows)]
            found |= zip(inside.tolist(), table["key"].take(pa.array(inside - first)).to_pylist(), strict=True)
        return [found[int(row)] for row in rows]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Path]:
        with readable(self.root / name), local_copy(self.root / name) as copy:
            yield copy

    def _require_same(self, name: str, copy: Path, sha256: str) -> None:
        if file_sha256(copy) != sha256:
            raise DataError(
                f"{self.root / name}: damaged, or is not the one that {MANIFEST} names; wait for the run that writes "
                f"there, or see what `pixart verify {self.root}` says"
            )


class Lookup:
    """Finds keys in a list of them, which is sorted once."""

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        self._order = np.argsort(keys)
        self._keys = np.asarray(keys[self._order])

    def __call__(self, wanted: npt.NDArray[np.uint64]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
        """Return where in the list each of `wanted` is, and whether it is there at all; both (len(wanted),)."""
        at, found = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
        if len(self._keys):
            order = np.argsort(wanted)  # in order, the search stays in the cache: six times as fast
            ordered = wanted[order]
            place = np.minimum(np.searchsorted(self._keys, ordered), len(self._keys) - 1)
            at[order], found[order] = self._order[place], self._keys[place] == ordered
        return at, found


def find(keys: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Return where in `keys` each of `wanted` is, and whether it is there at all."""
    return Lookup(keys)(wanted)


@dataclass(frozen=True)
class Excerpt:
    """Rows of a set that go into a new one, and where their members lie there; arrays are (N,), by row of its index.

    Attributes:
        kept: Which rows.
        shard: Numbers in the new manifest.
        flipped_offset: 0 where there is no mirrored image.
        keeps_rejected: Tells of a table of rejected rows which go into the new set; None keeps them all.
    """

    original: Original
    kept: npt.NDArray[np.bool_]
    shard: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.uint64]
    flipped_offset: npt.NDArray[np.uint64]
    keeps_rejected: Callable[[pa.Table], npt.NDArray[np.bool_]] | None = None

    def index(self, shards: pa.Array) -> Iterator[pa.Table]:
        """Yield pieces of the index as it is to be.

        Raises:
            DataError: If the index is damaged, or names other shards than the entries do.
        """
        manifest = self.original.manifest
        before = pa.array([shard["path"] for shard in manifest.shards], pa.string())
        numbers = self.original.column("shard")
        for first, whole in self.original.tables():
            if not whole["shard"].combine_chunks().equals(before.take(pa.array(numbers[first : first + len(whole)]))):
                root = self.original.root
                what = f"{INDEX} and {ENTRIES} name different shards, going by {MANIFEST}"
                raise DataError(f"{root}: {what}; `pixart verify {root}` says what to do")
            rows = np.flatnonzero(self.kept[first : first + whole.num_rows])
            table = whole if len(rows) == whole.num_rows else whole.take(pa.array(rows))
            at = first + rows
            table = _replaced(table, "shard", shards.take(pa.array(self.shard[at])))
            table = _replaced(table, "offset_bytes", pa.array(self.offset[at].astype(np.int64)))
            if "flipped_offset_bytes" in table.schema.names:
                flipped = self.flipped_offset[at].astype(np.int64)
                table = _replaced(table, "flipped_offset_bytes", pa.array(flipped, mask=flipped == 0))
            yield table

    def rejected(self) -> Iterator[pa.Table]:
        """Yield pieces of the table of rejected rows as it is to be."""
        for table in self.original.rejected():
            yield table if self.keeps_rejected is None else table.filter(pa.array(self.keeps_rejected(table)))

    def records(self, first_row: int) -> Iterator[Entries]:
        """Yield the records of the rows as they are to be, without their checks, in the order of the index."""
        rows = np.flatnonzero(self.kept)
        for start in range(0, len(rows), _RECORDS_AT_ONCE):
            some = rows[start : start + _RECORDS_AT_ONCE]
            records = np.array(self.original.entries[self.original.places[some]])
            records["row"] = np.arange(first_row + start, first_row + start + len(some))
            records["shard"], records["offset"] = self.shard[some], self.offset[some]
            if self.original.manifest.kind == "image":
                records["flipped_offset"] = self.flipped_offset[some]
            yield records


def write_edition(root: Path, manifest: Manifest, excerpts: Sequence[Excerpt]) -> Manifest:
    """Write index, entries and table of rejected rows of a set whose shards are there already, then its manifest.

    Args:
        manifest: Complete but for the rows in its shards and buckets, and the checksums of the tables.
        excerpts: The rows, in the order that the index is to have; all of sets with the columns and buckets of this.
    """
    schema = excerpts[0].original.schema
    shards = pa.array([shard["path"] for shard in manifest.shards], pa.string())
    index = TableFile(root / INDEX, schema)
    rejected = TableFile(root / REJECTED_FILE, REJECTED)
    try:
        with EntryFile(root / ENTRIES, manifest) as entries:
            first_row = 0
            for excerpt in excerpts:
                for table in excerpt.index(shards):
                    index.write(table.select(schema.names).cast(schema))
                for table in excerpt.rejected():
                    rejected.write(table.cast(REJECTED))
                for records in excerpt.records(first_row):
                    entries.add_records(records)
                first_row += int(excerpt.kept.sum())
            return publish_seal(root, manifest, index, rejected, entries)
    finally:
        index.discard()
        rejected.discard()


def copy_calibration(original: Original, root: Path) -> None:
    """Copy what a text codec was calibrated to, if it was.

    Raises:
        DataError: If it is damaged or missing.
    """
    calibration = original.manifest.codec.get("calibration")
    if not calibration:
        return
    path = original.root / calibration["path"]
    data = read_bytes(path) if exists(path) else b""
    if hashlib.sha256(data).hexdigest() != calibration["sha256"]:
        raise DataError(f"{path}: missing or damaged; `pixart verify {original.root}` says what to do")
    write_atomic(root / calibration["path"], data)


def unfinished_sets(root: Path) -> list[Path]:
    """Return the feature sets of a dataset that were begun and have no manifest; `root` may also be a single set."""
    if exists(root / MANIFEST):
        return []
    begun = {path.parent for name in (COMMITS, *_BEGUN) for path in matching(root, f"*/{name}")}
    begun |= {root for name in _BEGUN if exists(root / name)}
    begun |= {root} if (root / COMMITS).is_dir() else set()
    return sorted(path for path in begun if not any(exists(path / name) for name in (MANIFEST, _REPORT)))


def require_finished(root: Path) -> None:
    """Check that a dataset has no set that was begun and not finished, which would be left out in silence.

    Raises:
        DataError: Naming each such set.
    """
    unfinished = unfinished_sets(root)
    if unfinished:
        names = ", ".join(map(str, unfinished))
        advice = f"run {command(unfinished[0])} to its end first, or move what is not finished out of {root}"
        raise DataError(f"{names}: not finished: expected a {MANIFEST}, found none; {advice}")


def manifest_sha256(original: Original) -> str:
    """Return the sha256 of a set's manifest, which names all that is in it."""
    return hashlib.sha256(read_bytes(original.root / MANIFEST)).hexdigest()


def identity(manifest: Manifest, *but: str) -> dict[str, Any]:
    """Return what two sets must have in common for their features to be of one kind, `but` some of it.

    Where the empty caption lies, and how exact a codec was measured to be, differ between such sets.
    """
    model, codec = dict(manifest.model), dict(manifest.codec)
    if "null" in model:
        model["null"] = {name: value for name, value in model["null"].items() if name not in ("path", "offset_bytes")}
    if "calibration" in codec:
        codec["calibration"] = codec["calibration"]["sha256"]
    codec.pop("measured", None)
    buckets = [{name: bucket[name] for name in ("ratio", "height_px", "width_px")} for bucket in manifest.buckets]
    facts = {
        "kind": manifest.kind,
        "tensor": manifest.tensor,
        "dtype": manifest.dtype,
        "model": model,
        "policy": manifest.policy,
        "codec": codec,
        "buckets": buckets,
    }
    return {name: value for name, value in facts.items() if name not in but}


def unlike(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of everything that differs between two trees; None is what is not there."""
    for name in sorted({*left, *right}):
        one, other = left.get(name), right.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from unlike(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name}", one, other


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)


def _pieces(path: Path, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield pa.Table.from_batches([batch])


def _read_entries(root: Path, kind: str) -> Entries:
    path = root / ENTRIES
    if not is_remote(path):
        return map_entries(path, kind)
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run {command(root)} again: the index is rewritten") from None
    if len(data) % entry_type(kind).itemsize:
        raise DataError(f"{path}: cut off; `pixart verify {root}` says what to do")
    return np.frombuffer(data, entry_type(kind))
