"""Where captions to count come from: files, folders, tables of `caption` and patterns, cut into units of work."""

import difflib
import glob
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data import captions
from pixart_data.captions import (
    TABLES,
    CaptionFile,
    caption_files,
    converted,
    count_captions,
    fingerprint,
    named_files,
    open_parquet,
    read_rows,
    slices,
)
from pixart_data.columns import TEXT, is_text
from pixart_data.errors import ConfigError, DataError
from pixart_data.storage import is_remote, local_copy, location, matching
from pixart_data.units import encode_name

SUFFIXES = (*TABLES, TEXT)
_UNCUT_GROUPS = 5  # a row group of more than so many units' rows is cut: each piece decodes those before it, too

Kinds = Mapping[str, str]
"""The columns of a table, each with `text` or the type of what it holds else."""


def find_captions(path: str, place: str) -> list[CaptionFile]:
    """Return the units at a path in the order of their names: a file, a folder, a table that `caption` made, or a glob.

    Of a folder, tables are read; text files only if it has no tables. Parquet is cut between row groups, so that none
    is decoded twice.

    Args:
        place: What the path was given for, for messages.

    Raises:
        ConfigError: If there is nothing to read.
        DataError: If a file cannot be read, a text file is not UTF-8, or a table of `caption` is not finished.
    """
    whole = location(path)
    if glob.has_magic(path) and not whole.exists():
        return list(_matching(path, place))
    return _files(whole, place)


def _files(path: Path, place: str) -> list[CaptionFile]:
    has_tables = path.is_dir() and any(p.suffix in TABLES for p in path.rglob("*"))
    return caption_files(path, place, TABLES if has_tables else SUFFIXES, _cut)


def _matching(path: str, place: str) -> Iterator[CaptionFile]:
    """Yield the units of what matches a pattern, each under a name of its own."""
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = location("/".join(parts[:fixed]) or "/")
    every = list(matching(root, "/".join(parts[fixed:])))
    found = [p for p in every if p.is_dir() or p.suffix in SUFFIXES]
    if root in found:  # `**` alone
        yield from _files(root, place)
        return
    folders = {p for p in found if p.is_dir()}
    found = [p for p in found if not folders.intersection(p.parents)]
    if not found:
        if every:
            raise ConfigError(
                f"{place}: expected {', '.join(SUFFIXES)} or folders of them, found {every[0]}; {converted(every)}"
            )
        raise ConfigError(f"{place}: nothing matches {path}; check the pattern, and that no shell has changed it")
    for name, p in named_files(found, root):
        if p in folders:
            for file in _files(p, place):
                yield CaptionFile(encode_name(f"{name}/{file.id}"), *_rest(file))
        else:
            yield from _cut(name, p, captions.ROWS_PER_UNIT)


def _rest(file: CaptionFile) -> tuple[str, str, int, int, int]:
    return file.path, file.fingerprint, file.start, file.stop, file.first_byte


def _cut(name: str, path: Path, rows_per_unit: int) -> list[CaptionFile]:
    """Cut a file; JSONL as `captions.slices` does."""
    if path.suffix == ".jsonl":
        return slices(name, path, rows_per_unit)
    cuts = list(_text_cuts(path, rows_per_unit) if path.suffix == TEXT else _parquet_cuts(path, rows_per_unit))
    base = fingerprint(path)
    if len(cuts) <= 1:
        return [CaptionFile(name, str(path), base)]
    return [
        CaptionFile(f"{name}~{i:05d}", str(path), f"{base}:{start}:{stop}", start, stop, first_byte)
        for i, (start, stop, first_byte) in enumerate(cuts)
    ]


def _parquet_cuts(path: Path, rows_per_unit: int) -> Iterator[tuple[int, int, int]]:
    """Yield stretches of whole row groups, and pieces of those that are very large."""
    with open_parquet(path) as table:
        metadata = table.metadata
    start = stop = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if num_rows > _UNCUT_GROUPS * rows_per_unit:
            if stop > start:
                yield start, stop, 0
            ends = np.linspace(stop, stop + num_rows, -(-num_rows // (_UNCUT_GROUPS * rows_per_unit)) + 1).astype(int)
            yield from ((int(first), int(last), 0) for first, last in itertools.pairwise(ends))
            start = stop = stop + num_rows
            continue
        stop += num_rows
        if stop - start >= rows_per_unit:
            yield start, stop, 0
            start = stop
    if stop > start:
        yield start, stop, 0


def _text_cuts(path: Path, rows_per_unit: int) -> Iterator[tuple[int, int, int]]:
    """Yield stretches of lines with the byte that each begins at; raises DataError where one is not UTF-8."""
    start = first_byte = place = number = 0
    with local_copy(path) as copy, copy.open("rb") as file:
        for number, line in enumerate(file, 1):
            _check_utf8(line, path, number)
            place += len(line)
            if number - start == rows_per_unit:
                yield start, number, first_byte
                start, first_byte = number, place
    if number > start:
        yield start, number, first_byte


def _check_utf8(line: bytes, path: Path, number: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, found the byte 0x{line[error.start]:02x} in line {number}; convert it "
            f"first, e.g. iconv -f LATIN1 -t UTF-8 {path.name} > captions.txt (UTF-16 for text of Windows)"
        ) from error


def look_at(files: Sequence[CaptionFile]) -> dict[str, Kinds]:
    """Return the columns of tables by path, of JSONL those of the first row; of tables on a store one has to do.

    Text files, and tables of JSONL without a row, have none to tell of.

    Raises:
        DataError: If a file cannot be read.
    """
    paths = list(dict.fromkeys(file.path for file in files))
    found = {path: _kinds(path) for path in (paths[:1] if "://" in "".join(paths[:1]) else paths)}
    return {path: kinds for path, kinds in found.items() if kinds is not None}


def require_text(tables: Mapping[str, Kinds], name: str, column: str) -> None:
    """Check that every table has the column, and that it holds text.

    Args:
        tables: What `look_at` found.
        name: Of the set that the tables are, for messages.

    Raises:
        ConfigError: If it is missing, naming the columns that there are, or holds something else.
    """
    remedy = f"name another one with --column, in a job file as `column` of the set '{name}'"
    for path, kinds in tables.items():
        if column not in kinds:
            close = difflib.get_close_matches(column, kinds, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'? " if close else ""
            found = ", ".join(kinds) or "none"
            raise ConfigError(f"{path}: expected a column '{column}', found {found}; {hint}{remedy}")
        if kinds[column] != "text":
            texts = ", ".join(name for name, kind in kinds.items() if kind == "text") or "none"
            raise ConfigError(
                f"{path}: expected text in the column '{column}', found {kinds[column]}; columns of text: {texts}; "
                f"{remedy}"
            )


def _kinds(path: str) -> Kinds | None:
    place = location(path)
    if place.suffix == ".parquet":
        with open_parquet(place) as table:
            return {field.name: "text" if is_text(field.type) else str(field.type) for field in table.schema_arrow}
    if place.suffix == TEXT:
        return None
    rows = (row for _, row in read_rows(CaptionFile("", path, ""), ()))
    first = next((row for row in rows if isinstance(row, dict)), None)
    if first is None:
        return None
    return {name: "text" if isinstance(v, str | None) else type(v).__name__ for name, v in first.items()}


def holds_none(files: Sequence[CaptionFile], column: str) -> bool:
    """Tell whether a column is null in every row, as far as the statistics of Parquet files on disks say so."""
    for path in dict.fromkeys(file.path for file in files):
        if is_remote(location(path)) or not path.endswith(".parquet"):
            return False
        with open_parquet(location(path)) as table:
            groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
            if not all(_is_null(group, column) for group in groups):
                return False
    return True


def _is_null(group: Any, column: str) -> bool:
    leaves = (group.column(number) for number in range(group.num_columns))  # of nested columns there are several
    leaf = next((leaf for leaf in leaves if leaf.path_in_schema == column), None)
    statistics = leaf.statistics if leaf is not None else None
    return statistics is not None and statistics.has_null_count and statistics.null_count == group.num_rows


def num_rows(file: CaptionFile) -> int:
    """Return the number of rows of a file or slice; of a text file lines, blank ones included.

    Raises:
        DataError: If the file cannot be read.
    """
    if file.stop >= 0 or not file.path.endswith(TEXT):
        return count_captions(file)
    with local_copy(location(file.path)) as copy, copy.open("rb") as lines:
        return sum(1 for _ in lines)
