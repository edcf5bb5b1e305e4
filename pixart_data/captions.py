"""Caption tables, read file by file: what `caption` wrote, and any Parquet or JSONL with captions in a column."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import COMMITS, file_sha256, read_records
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.units import encode_name, storable

_SUFFIXES = (".parquet", ".jsonl")
_ROWS_PER_READ = 4096
_KEY = re.compile(r"[A-Za-z0-9_%~-]+(/[A-Za-z0-9_%~-]+)*")


@dataclass(frozen=True)
class CaptionFile:
    """A unit of work: one file of captions. `fingerprint` changes when its content does."""

    id: str
    path: str
    fingerprint: str


@dataclass(frozen=True)
class CaptionRow:
    """One row: `error` says why a row has no caption to use."""

    key: str
    caption: str | None
    error: Reason | None = None
    detail: str = ""


def caption_files(path: Path, setting: str) -> list[CaptionFile]:
    """Return the files at `path` (a file, a folder, or the output directory of `caption`), in the order of their names.

    Args:
        setting: The job file's key that holds the path, for messages.

    Raises:
        ConfigError: If there is nothing to read.
    """
    if path.is_dir() and (path / COMMITS).is_dir():
        records = read_records(path).values()
        files = [(record.unit, path / file.path, file.sha256) for record in records for file in record.files]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and not p.name.startswith("."))
        relative = [p.relative_to(path) for p in found]
        stems = Counter(p.with_suffix("") for p in relative)
        units = [p if stems[p.with_suffix("")] > 1 else p.with_suffix("") for p in relative]
        files = [(encode_name(unit.as_posix()), p, "") for unit, p in zip(units, found, strict=True)]
    elif path.is_file() and path.suffix in _SUFFIXES:
        files = [(encode_name(path.stem), path, "")]
    elif path.exists():
        raise ConfigError(f"{setting}: expected .parquet, .jsonl or a folder of them, found {path}")
    else:
        raise ConfigError(f"{setting}: no such file or folder: {path}; run `pixart caption` first, or check the path")
    if not files:
        raise ConfigError(f"{setting}: {path} holds no .parquet or .jsonl file; run `pixart caption` first")
    return [CaptionFile(unit, str(p), sha256 or _fingerprint(p)) for unit, p, sha256 in files]


def read_captions(path: Path, column: str, need_key: bool) -> Iterator[CaptionRow]:
    """Yield every row of a file; without `need_key`, rows without a key get an empty one.

    Raises:
        ConfigError: If the column, or the key column where it is needed, is missing.
        DataError: If the file cannot be read.
    """
    rows = _parquet_rows(path, column, need_key) if path.suffix == ".parquet" else _jsonl_rows(path, column, need_key)
    for place, row in rows:
        if not isinstance(row, dict):
            yield CaptionRow(f"{path.stem}/{place}", None, Reason.BAD_ROW, row)
            continue
        key = "" if row.get("key") is None else str(row["key"])
        caption = row.get(column)
        if need_key and not _KEY.fullmatch(key):
            detail = f"key {key[:80]!r}: expected the key of an image, of A-Z a-z 0-9 _ / % ~ - only"
            yield CaptionRow(f"{path.stem}/{place}", None, Reason.BAD_ROW, storable(detail))
        elif caption is None:
            upstream = storable(str(row.get("error") or ""))
            yield CaptionRow(key, None, Reason.NO_CAPTION, upstream or f"column {column} is null")
        elif not isinstance(caption, str):
            yield CaptionRow(key, None, Reason.BAD_ROW, f"column {column} holds {type(caption).__name__}, not text")
        else:
            yield CaptionRow(key, storable(caption))


def count_captions(file: CaptionFile) -> int:
    """Return the number of rows of a file.

    Raises:
        DataError: If the file cannot be read.
    """
    if file.path.endswith(".parquet"):
        with _parquet(Path(file.path)) as table:
            return int(table.metadata.num_rows)
    with Path(file.path).open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _parquet_rows(path: Path, column: str, need_key: bool) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with _parquet(path) as file:
        names = file.schema_arrow.names
        _require(path, column, need_key, names)
        wanted = [name for name in ("key", column, "error") if name in names]
        batches = file.iter_batches(_ROWS_PER_READ, columns=wanted)
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"row-{number:06d}", row


def _jsonl_rows(path: Path, column: str, need_key: bool) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield each line with its place: the row, or what is wrong with it."""
    checked = False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line-{number:06d}", f"not JSON: {error}"
                continue
            if not isinstance(row, dict):
                yield f"line-{number:06d}", "not a JSON object"
                continue
            if not checked:
                _require(path, column, need_key, list(row))
                checked = True
            yield f"line-{number:06d}", row


def _require(path: Path, column: str, need_key: bool, names: list[str]) -> None:
    for name in (column, "key") if need_key else (column,):
        if name not in names:
            raise ConfigError(f"{path}: no column '{name}', found {', '.join(names)}; name another column")


def _fingerprint(path: Path) -> str:
    size_bytes = path.stat().st_size
    if size_bytes < 1 << 26:
        return file_sha256(path)
    with path.open("rb") as file:  # large: the ends decide, and a Parquet file ends in its own statistics
        head = file.read(1 << 20)
        file.seek(-(1 << 20), 2)
        return hashlib.sha256(head + file.read() + str(size_bytes).encode()).hexdigest()
