"""Durable files and commit records: how a unit of work becomes done, once.

A unit writes its files under temporary names, flushes them, and publishes them under names that carry a digest of
their content, so that two attempts at one unit either write the same file or two different ones, never half of each.
The record `commits/<unit>.json` is written last, by the one driver that holds the output's lock. What no record names
is a leftover of a kill and is swept. Readers start from records and never from a directory listing.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError, JobError

COMMITS = "commits"
MANIFEST = "manifest.json"  # of a finished output: says which files make it up
_TEMPORARY = ".tmp-"
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
    seconds: float = 0.0

    def __post_init__(self) -> None:
        lost = self.rows_in - self.rows_out - sum(self.rejected.values())
        if lost:
            raise DataError(f"unit {self.unit}: {lost} of {self.rows_in} rows unaccounted for; please report this")


@contextlib.contextmanager
def storage(path: Path | str) -> Iterator[None]:
    """Turn an operating-system failure to write `path` into one clear line.

    Raises:
        JobError: For a full disk, missing permission, a read-only or failing file system.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free space or choose another output, then run the same command again",
            errno.EDQUOT: "the quota is used up; free space, then run the same command again",
            errno.EACCES: "permission denied; choose an output you may write to",
            errno.EPERM: "permission denied; choose an output you may write to",
            errno.EROFS: "the file system is read-only; choose another output",
            errno.EEXIST: "it is a file; choose another output",
            errno.ENOTDIR: "a part of the path is a file; choose another output",
        }
        what = reasons.get(error.errno or 0, f"{error.strerror or error}; check the storage, then run again")
        raise JobError(f"{path}: cannot write: {what}") from error


def make_dir(path: Path) -> Path:
    """Create a directory with its parents and return it; raises JobError where that is impossible."""
    with storage(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old or the new content, never a part."""
    make_dir(path.parent)
    with storage(path):
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_dir(path.parent)


def staging_path(directory: Path, name: str) -> Path:
    """Return a fresh temporary path in `directory` for a file that `publish` will rename."""
    make_dir(directory)
    with storage(directory):
        handle, path = tempfile.mkstemp(prefix=_TEMPORARY, suffix=f"-{name[-80:]}", dir=directory)
        os.close(handle)
        os.chmod(path, 0o644)
    return Path(path)


def publish(staged: Path, root: Path, directory: Path, unit: str, suffix: str) -> PublishedFile:
    """Flush a staged file and rename it to `<unit>-<first 8 hex of its sha256><suffix>` in `directory`.

    Same content, same name: publishing twice is harmless. Returns the file as a record names it, relative to `root`.
    """
    with storage(directory):
        sha256 = file_sha256(staged)
        size_bytes = staged.stat().st_size
    path = directory / f"{unit}-{sha256[:8]}{suffix}"
    replace_file(staged, path)
    return PublishedFile(path.relative_to(root).as_posix(), size_bytes, sha256)


def replace_file(staged: Path, path: Path) -> None:
    """Flush a staged file and rename it to `path`, replacing what is there."""
    with storage(path):
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
        sync_dir(path.parent)


def publish_table(table: pa.Table, root: Path, directory: Path, unit: str) -> PublishedFile:
    """Write a table as Parquet and publish it."""
    staged = staging_path(directory, f"{unit}.parquet")
    with storage(staged):
        pq.write_table(table, staged, compression="zstd")
    return publish(staged, root, directory, unit, ".parquet")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(root: Path, record: Record) -> None:
    """Make a unit done: write its record, replacing an earlier one."""
    text = json.dumps(asdict(record), indent=1, sort_keys=True)
    write_atomic(root / COMMITS / f"{record.unit}.json", text.encode())


def read_records(root: Path) -> dict[str, Record]:
    """Return the records under `root` by unit, in the order of unit names; empty if there are none.

    Raises:
        DataError: If a record cannot be read, naming its file.
    """
    records = {}
    for path in sorted((root / COMMITS).glob("*.json")):
        if path.name.startswith("."):
            continue
        try:
            fields = json.loads(path.read_text())
            fields["files"] = [PublishedFile(**file) for file in fields["files"]]
            record = Record(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            raise DataError(f"{path}: not a commit record ({error}); delete it to have its unit redone") from error
        records[record.unit] = record
    return records


def sweep(root: Path, directories: Iterable[Path]) -> int:
    """Delete what no record names: temporary files, and published files of attempts that never committed.

    Only temporary files are deleted in `root` itself and beside the records. In `directories`, which hold nothing but
    published files, so are files that are named as `publish` names them. Only call this while holding
    `output_lock(root)`.

    Returns:
        The number of files deleted.
    """
    named = {root / file.path for record in read_records(root).values() for file in record.files}
    leftovers = [path for directory in (root, root / COMMITS) for path in directory.glob(f"{_TEMPORARY}*")]
    for directory in directories:
        leftovers += directory.glob(f"{_TEMPORARY}*")
        leftovers += (p for p in directory.glob("*") if _PUBLISHED.fullmatch(p.name) and p not in named)
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextlib.contextmanager
def output_lock(root: Path) -> Iterator[None]:
    """Hold an output directory for one run; the operating system lets go of it when the process dies.

    Raises:
        JobError: If another run holds it.
    """
    make_dir(root)
    path = root / ".lock"
    with storage(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise JobError(f"{path}: cannot be locked: {error.strerror}") from error
            raise JobError(f"{root}: another run is writing here; wait for it, or choose another output") from None
        yield
    finally:
        os.close(descriptor)


def sync_dir(directory: Path) -> None:
    """Flush a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
