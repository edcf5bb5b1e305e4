"""Durable files and commit records: how a unit of work becomes done, once.

A unit writes its files under temporary names, flushes them, and publishes them under names that carry a digest of
their content, so that two attempts at one unit either write the same file or two different ones, never half of each.
The record `commits/<unit>.json` is written last, by the one driver that holds the output's lease, and only if there is
none. What no record names is a leftover of a kill and is swept. Readers start from records and never from a directory
listing. Records hold nothing that another run of the same job would not write again: no times, no names of machines.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError, JobError
from pixart_data.retries import storage
from pixart_data.storage import (
    TEMPORARY,
    delete,
    discard,
    list_files,
    local_copy,
    read_bytes,
    read_many,
    replace_file,
    staging,
    write_atomic,
    write_new,
)
from pixart_data.uploads import abort_uploads

COMMITS = "commits"
MANIFEST = "manifest.json"  # of a finished output: says which files make it up
_PUBLISHED = re.compile(r".+-[0-9a-f]{8}\.(tar|parquet)")


@dataclass(frozen=True)
class PublishedFile:
    """A finished file: its path relative to the output directory, its size and its sha256."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """The commit record of one unit.

    Attributes:
        digest: Of everything that decided the result; a unit whose digest has changed is redone.
        settings: What went into the digest, kept to say what changed.
        rejected: Rows rejected, by reason; `rows_in == rows_out + sum(rejected)` always.
        facts: What the worker learnt from its model (revision, scaling factor, width ...).
    """

    unit: str
    digest: str
    settings: dict[str, Any]
    rows_in: int
    rows_out: int
    rejected: dict[str, int]
    files: list[PublishedFile]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lost = self.rows_in - self.rows_out - sum(self.rejected.values())
        if lost:
            raise DataError(f"unit {self.unit}: {lost} of {self.rows_in} rows unaccounted for; please report this")


def publish(staged: Path, root: Path, directory: Path, unit: str, suffix: str) -> PublishedFile:
    """Put a staged file in place as `<unit>-<first 8 hex of its sha256><suffix>` in `directory`, flushed.

    Same content, same name: publishing twice is harmless. Returns the file as a record names it, relative to `root`.
    The staged file is gone then, after a failure, too.
    """
    try:
        with storage(directory):
            sha256 = file_sha256(staged)
            size_bytes = staged.stat().st_size
        path = directory / f"{unit}-{sha256[:8]}{suffix}"
        replace_file(staged, path)
    finally:
        discard(staged)
    return PublishedFile(path.relative_to(root).as_posix(), size_bytes, sha256)


def publish_table(table: pa.Table, root: Path, directory: Path, unit: str) -> PublishedFile:
    """Write a table as Parquet and publish it."""
    with staging(directory, f"{unit}.parquet") as staged:
        with storage(staged):
            pq.write_table(table, staged, compression="zstd")
        return publish(staged, root, directory, unit, ".parquet")


def read_table(path: Path, **options: Any) -> pa.Table:
    """Return a Parquet table from any storage; `options` are those of `pyarrow.parquet.read_table`."""
    with local_copy(path) as copy:
        return pq.read_table(copy, **options)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(root: Path, record: Record, replaces: bool = True) -> None:
    """Make a unit done: write its record.

    Args:
        replaces: Whether an earlier record may be there. Without, the store itself makes sure that only one run
            commits a unit.

    Raises:
        JobError: If another run has committed the unit meanwhile.
    """
    path = root / COMMITS / f"{record.unit}.json"
    data = json.dumps(asdict(record), indent=1, sort_keys=True).encode()
    if replaces:
        write_atomic(path, data)
    elif not write_new(path, data) and read_bytes(path) != data:
        raise JobError(f"{path}: another run has committed this unit; let one run at a time write to {root}")


def read_records(root: Path) -> dict[str, Record]:
    """Return the records under `root` by unit, in the order of unit names; empty if there are none.

    Raises:
        DataError: If a record cannot be read, naming its file.
    """
    records = {}
    paths = [path for path in list_files(root / COMMITS) if path.suffix == ".json" and not path.name.startswith(".")]
    for path, text in zip(paths, read_many(paths), strict=True):
        try:
            fields = json.loads(text)
            fields.pop("seconds", None)  # of records before they were made the same for every run
            fields["files"] = [PublishedFile(**file) for file in fields["files"]]
            record = Record(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            raise DataError(f"{path}: not a commit record ({error}); delete it to have its unit redone") from error
        records[record.unit] = record
    return records


def sweep(root: Path, directories: Iterable[Path], records: Iterable[Record]) -> int:
    """Delete what no record names: temporary files, and published files of attempts that never committed.

    Only temporary files are deleted in `root` itself and beside the records. In `directories`, which hold nothing but
    published files, so are files that are named as `publish` names them. Uploads that were cut off are aborted in all
    of these, and nowhere below: another run may write there. Only call this while holding `leases.output_lock(root)`,
    with all records that are there.

    Returns:
        The number of files deleted and of uploads aborted.
    """
    named = {file.path for record in records for file in record.files}
    leftovers = [path for directory in (root, root / COMMITS) for path in list_files(directory) if _is_temporary(path)]
    directories = list(directories)
    for directory in directories:
        found = list_files(directory)
        leftovers += (p for p in found if _is_temporary(p))
        leftovers += (p for p in found if _PUBLISHED.fullmatch(p.name) and p.relative_to(root).as_posix() not in named)
    return delete(leftovers) + abort_uploads(root, [root, root / COMMITS, *directories])


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY)
