"""Caption tables, read file by file: what `caption` wrote, and any Parquet or JSONL with captions in a column."""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import COMMITS, MANIFEST, Record, file_sha256
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.storage import exists, is_remote, local_copy, location, read_bytes, remote_fingerprint, write_atomic
from pixart_data.units import encode_name, storable

FORMAT = "pixart-captions"
FORMAT_VERSION = 1
ROWS_PER_UNIT = 50_000
"""Files with more rows than this are cut into units."""

TABLES = (".parquet", ".jsonl")

_ROWS_PER_READ = 4096
_KEY = re.compile(r"[A-Za-z0-9_%~-]+(/[A-Za-z0-9_%~-]+)*")


@dataclass(frozen=True)
class CaptionFile:
    """A unit of work: a file of captions, or a slice of a large one.

    Attributes:
        fingerprint: Changes when the file's content does, and when it is cut differently.
        start: First row of the slice (for JSONL: line).
        stop: One past the last; -1 for all.
        first_byte: For JSONL: where the slice begins.
    """

    id: str
    path: str
    fingerprint: str
    start: int = 0
    stop: int = -1
    first_byte: int = 0


@dataclass(frozen=True)
class CaptionRow:
    """One row: `error` says why a row has no caption to use."""

    key: str
    caption: str | None
    error: Reason | None = None
    detail: str = ""


Cut = Callable[[str, Path, int], list[CaptionFile]]
"""Cuts the file at a path into units of a name, of so many rows."""


def seal_captions(root: Path, records: Sequence[Record]) -> None:
    """Write the manifest of a finished table of captions: which parts make it up."""
    parts = [{"unit": record.unit, **asdict(file)} for record in records for file in record.files]
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "parts": parts}
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1).encode())


def caption_files(
    path: Path, setting: str, suffixes: Sequence[str] = TABLES, cut: Cut | None = None
) -> list[CaptionFile]:
    """Return the units at `path` (a file, a folder, or the output directory of `caption`), in the order of their names.

    Args:
        setting: What holds the path, for messages: a job file's key, or words.
        suffixes: Of the files to read.
        cut: Cuts a file into units; `slices` if None.

    Raises:
        ConfigError: If there is nothing to read.
        DataError: If the output of `caption` is not finished.
    """
    if path.is_dir() and ((path / COMMITS).is_dir() or exists(path / MANIFEST)):
        parts = _sealed_parts(path)
        return [CaptionFile(part["unit"], str(path / part["path"]), part["sha256"]) for part in parts]
    if path.is_dir():
        files = named_files(sorted(p for p in path.rglob("*") if p.suffix in suffixes), path)
    elif exists(path) and path.suffix in suffixes:
        files = [(encode_name(path.stem), path)]
    elif path.exists():
        raise ConfigError(
            f"{setting}: expected {', '.join(suffixes)} or a folder of them, found {path}; {converted([path])}"
        )
    else:
        raise ConfigError(f"{setting}: no such file or folder: {path}; check the path, or run `pixart caption` first")
    if not files:
        remedy = converted(sorted(path.iterdir()))
        raise ConfigError(f"{setting}: {path} holds no {' or '.join(suffixes)} file; {remedy}")
    return [unit for name, p in files for unit in (cut or slices)(name, p, ROWS_PER_UNIT)]


def converted(paths: Sequence[Path]) -> str:
    """Say how captions that cannot be read where they are can be: by the first of the files that is of a known kind."""
    for path in paths:
        if path.suffix in (".csv", ".tsv"):
            options = ", parse_options=csv.ParseOptions(delimiter='\\t')" if path.suffix == ".tsv" else ""
            return (
                'convert it to Parquet first: python -c "from pyarrow import csv, parquet; '
                f"parquet.write_table(csv.read_csv('{path}'{options}), '{path.with_suffix('.parquet')}')\""
            )
        if path.suffix == ".tar":
            return (
                "of tars of images, name the table of their captions: a .parquet file that came beside each, or what "
                "`pixart caption` writes"
            )
    return "check the path, or run `pixart caption` first"


def named_files(paths: Sequence[Path], root: Path) -> list[tuple[str, Path]]:
    """Return files with names for units, by their paths below `root`; hidden files are left out."""
    found = [p for p in paths if not p.name.startswith(".")]
    relative = [PurePosixPath(str(p)[len(str(root)) :].lstrip("/")) for p in found]  # those of a store have no `name`
    stems = Counter(p.with_suffix("") for p in relative)
    names = [p if stems[p.with_suffix("")] > 1 else p.with_suffix("") for p in relative]
    return [(encode_name(name.as_posix()), p) for name, p in zip(names, found, strict=True)]


def _sealed_parts(root: Path) -> list[dict[str, Any]]:
    try:
        manifest = json.loads(read_bytes(root / MANIFEST))
    except FileNotFoundError:
        raise DataError(f"{root}: its captions are not finished; run `pixart caption` on it to the end") from None
    except ValueError as error:
        raise DataError(f"{root / MANIFEST}: not valid JSON ({error}); run `pixart caption` again") from error
    kind = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else ("something", "?")
    if kind != (FORMAT, FORMAT_VERSION):
        found = f"{kind[0]} version {kind[1]}"
        raise DataError(f"{root / MANIFEST}: expected {FORMAT} version {FORMAT_VERSION}, found {found}")
    parts: list[dict[str, Any]] = manifest["parts"]
    return parts


def slices(name: str, path: Path, rows_per_unit: int) -> list[CaptionFile]:
    """Cut a large Parquet or JSONL file, so that several workers share it and a kill does not lose it all.

    `~` numbers the slices: no encoded file name holds one, so that slices and files cannot share a name.

    Raises:
        DataError: If the file cannot be read.
    """
    base = fingerprint(path)
    cuts = (_parquet_cuts if path.suffix == ".parquet" else _jsonl_cuts)(path, rows_per_unit)
    if len(cuts) <= 1:
        return [CaptionFile(name, str(path), base)]
    return [
        CaptionFile(f"{name}~{i:05d}", str(path), f"{base}:{start}:{stop}", start, stop, first_byte)
        for i, (start, stop, first_byte) in enumerate(cuts)
    ]


def _parquet_cuts(path: Path, rows_per_unit: int) -> list[tuple[int, int, int]]:
    with open_parquet(path) as table:
        num_rows = table.metadata.num_rows
    return [(start, min(start + rows_per_unit, num_rows), 0) for start in range(0, num_rows, rows_per_unit)]


def _jsonl_cuts(path: Path, rows_per_unit: int) -> list[tuple[int, int, int]]:
    starts = []
    place = number = 0
    with local_copy(path) as copy, copy.open("rb") as file:
        for number, line in enumerate(file):
            if number % rows_per_unit == 0:
                starts.append((number, place))
            place += len(line)
    if not starts:
        return []
    stops = [*(number for number, _ in starts[1:]), number + 1]
    return [(start, stop, first_byte) for (start, first_byte), stop in zip(starts, stops, strict=True)]


def read_captions(file: CaptionFile, column: str, need_key: bool) -> Iterator[CaptionRow]:
    """Yield every row of a file or slice.

    With `need_key`, rows without a usable key, or with one that came up before, are rejected; else keys may be empty.
    `require_columns` checks the columns beforehand.

    Raises:
        DataError: If the file cannot be read.
    """
    path = location(file.path)
    seen: set[str] = set()
    for number, row in read_rows(file, ("key", column, "error")):
        place = f"{'row' if path.suffix == '.parquet' else 'line'}-{number:06d}"
        if not isinstance(row, dict):
            yield CaptionRow(f"{path.stem}/{place}", None, Reason.BAD_ROW, row)
            continue
        key = "" if row.get("key") is None else str(row["key"])
        caption = row.get(column)
        if need_key and not _KEY.fullmatch(key):
            detail = f"key {key[:80]!r}: expected the key of an image, of A-Z a-z 0-9 _ / % ~ - only"
            yield CaptionRow(f"{path.stem}/{place}", None, Reason.BAD_ROW, storable(detail))
        elif need_key and key in seen:
            yield CaptionRow(f"{path.stem}/{place}", None, Reason.DUPLICATE_KEY, f"key {key} came up before")
        elif caption is None:
            upstream = storable(str(row.get("error") or ""))
            yield CaptionRow(key, None, Reason.NO_CAPTION, upstream or f"column {column} is null")
        elif not isinstance(caption, str):
            yield CaptionRow(key, None, Reason.BAD_ROW, f"column {column} holds {type(caption).__name__}, not text")
        elif need_key and not caption.strip():
            yield CaptionRow(key, None, Reason.NO_CAPTION, f"column {column} is blank")
        else:
            yield CaptionRow(key, storable(caption))
        seen.add(key)


def read_rows(file: CaptionFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the rows of a file or slice with their numbers in the file, from 0; blank lines of JSONL are left out.

    A row comes with those of the columns that there are (of JSONL with all); a line that is no object is a text that
    says what is wrong with it.

    Raises:
        DataError: If the file cannot be read.
    """
    yield from _parquet_rows(file, columns) if Path(file.path).suffix == ".parquet" else _jsonl_rows(file)


def count_captions(file: CaptionFile) -> int:
    """Return the number of rows of a file or slice, for JSONL blank lines included.

    Raises:
        DataError: If the file cannot be read.
    """
    if file.stop >= 0:
        return file.stop - file.start
    if file.path.endswith(".parquet"):
        with open_parquet(location(file.path)) as table:
            return int(table.metadata.num_rows)
    with local_copy(location(file.path)) as copy, copy.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Give a Parquet file of any storage; what goes wrong within is a DataError that names it."""
    try:
        with local_copy(path) as copy, pq.ParquetFile(copy) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of Parquet
            raise DataError(f"{path}: cannot be read: {reason}; check its place and who may read it") from error
        raise DataError(
            f"{path}: cannot be read as Parquet: {reason}; it is damaged, cut off or something else: write or copy it "
            "again, or leave it out"
        ) from error


def _parquet_rows(part: CaptionFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_parquet(location(part.path)) as file:
        names = file.schema_arrow.names
        stop = part.stop if part.stop >= 0 else file.metadata.num_rows
        groups, number = row_groups(file.metadata, part.start, stop)
        wanted = [name for name in columns if name in names]
        for batch in file.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=wanted):
            skipped = min(max(part.start - number, 0), batch.num_rows)  # of a row group that holds several slices
            number += skipped
            for row in batch.slice(skipped, max(stop - number, 0)).to_pylist():
                yield number, row
                number += 1


def row_groups(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that hold the rows from start to stop, and the number of their first row."""
    ends = list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    begins = [0, *ends[:-1]] if ends else []
    groups = [i for i, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < stop and end > start]
    return groups, begins[groups[0]] if groups else start


def _jsonl_rows(part: CaptionFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    path = location(part.path)
    with local_copy(path) as copy, copy.open("rb") as file:
        file.seek(part.first_byte)
        lines = file if part.stop < 0 else itertools.islice(file, part.stop - part.start)
        for number, line in enumerate(lines, part.start):
            row = _parse(line)
            if row is None:
                continue
            yield number, row


def _parse(line: bytes) -> dict[str, Any] | str | None:
    """Return a line's object, what is wrong with the line, or None for a blank one."""
    text = line.decode("utf-8-sig", errors="replace").strip()
    if not text:
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def require_columns(files: Sequence[CaptionFile], setting: str, column: str, need_key: bool) -> None:
    """Check the columns of files by their first row, before any work is planned on them.

    Raises:
        ConfigError: If one is missing, naming the file and what it holds.
        DataError: If a file cannot be read.
    """
    paths = list(dict.fromkeys(file.path for file in files))
    for path in map(location, paths[:1] if "://" in "".join(paths[:1]) else paths):  # of a store, one has to do
        names = _first_names(path)
        for name in (column, "key") if need_key else (column,):
            if names is not None and name not in names:
                remedy = f"set {setting}" if name == column else "add one with the keys of the images"
                raise ConfigError(f"{path}: expected a column '{name}', found {', '.join(names)}; {remedy}")


def _first_names(path: Path) -> list[str] | None:
    if path.suffix == ".parquet":
        with open_parquet(path) as table:
            return list(table.schema_arrow.names)
    with local_copy(path) as copy, copy.open("rb") as lines:
        rows = (_parse(line) for line in lines)
        first = next((row for row in rows if isinstance(row, dict)), None)
    return None if first is None else list(first)


def fingerprint(path: Path) -> str:
    """Return what changes when the content of a file does."""
    if is_remote(path):
        return remote_fingerprint(path)
    size_bytes = path.stat().st_size
    if size_bytes < 1 << 26:
        return file_sha256(path)
    with path.open("rb") as file:  # large: the ends decide, and a Parquet file ends in its own statistics
        head = file.read(1 << 20)
        file.seek(-(1 << 20), 2)
        return hashlib.sha256(head + file.read() + str(size_bytes).encode()).hexdigest()
