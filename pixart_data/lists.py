"""Lists of image paths: JSONL, Parquet, and one JSON list such as the reference's `data_info.json`.

A row names its image by a path, absolute or relative to the list's folder, or by the URL of an object store, with an
optional caption and an optional `key` to be named by. The file is read once in full to find the slices and the paths
that repeat; a slice then reads only its own part.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import ConfigError, DataError
from pixart_data.places import Place
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.stores import OBJECT_STORES, is_url, join, open_file, patiently, read_ahead, unreadable
from pixart_data.units import (
    Sample,
    Unit,
    encode_path,
    is_image,
    load_sample,
    rejected,
    split_extension,
    storable,
)

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class _Row(NamedTuple):
    """A row, its number in the file from 1, and where it lies; `content` is a str where it cannot be read."""

    number: int
    begin: int
    end: int
    content: Mapping[str, Any] | str


class _Entry(NamedTuple):
    name: str
    path: str
    caption: str | None
    problem: str


@dataclass
class _Survey:
    """What one pass over the file finds: where each row lies, what it is called, which columns there are."""

    numbers: "array[int]" = field(default_factory=lambda: array("Q"))
    begins: "array[int]" = field(default_factory=lambda: array("Q"))
    ends: "array[int]" = field(default_factory=lambda: array("Q"))
    names: "array[int]" = field(default_factory=lambda: array("Q"))
    columns: dict[str, None] = field(default_factory=dict)


def find_list(path: str, name: str, source: Source, place: Place) -> list[Unit]:
    """Cut a list into units.

    Raises:
        ConfigError: If it is empty, or has no column `source.path_column`.
        DataError: If it is not the JSON list or the Parquet file that its name says.
    """
    survey = _survey(path, source)
    _check_columns(path, survey.columns, source)
    num_rows = len(survey.numbers)
    if not num_rows:
        raise ConfigError(f"source.paths: expected rows in {path}, found none; remove it from the job")
    content, repeats = place.fingerprint(path), _repeats(survey.names)
    units = []
    for number, start in enumerate(range(0, num_rows, source.rows_per_unit)):
        stop = min(start + source.rows_per_unit, num_rows)
        cut = f"{content} {start} {stop} {source.path_column} {source.caption_column}"
        units.append(
            Unit(
                id=f"{name}-{number:05d}",
                kind="list",
                path=path,
                start=start,
                stop=stop,
                num_rows=stop - start,
                fingerprint=hashlib.sha256(cut.encode("utf-8", "surrogatepass")).hexdigest(),
                name=name,
                first_line=survey.numbers[start],
                byte_range=(survey.begins[start], survey.ends[stop - 1]),
                repeats=tuple((i - start, repeats[i]) for i in range(start, stop) if i in repeats),
            )
        )
    return units


def read_list(unit: Unit, source: Source, with_images: bool, keys: Set[str] | None = None) -> Iterator[Sample]:
    """Yield the rows of a slice in order.

    Args:
        keys: Only the samples with these.

    Raises:
        DataError: If the list is no longer what `find_list` saw.
    """
    entries = [_entry(row, source, _row_word(unit.path)) for row in _slice(unit, source)]
    if len(entries) != unit.num_rows:
        found = len(entries)
        raise DataError(f"{unit.path}: expected {unit.num_rows} rows, found {found}; it changed: run the job again")
    repeats = dict(unit.repeats)
    folder = os.path.dirname(unit.path)

    def load(named: tuple[str, _Entry]) -> Sample:
        key, entry = named
        if entry.problem:
            return rejected(key, Reason.BAD_ROW, entry.problem, entry.caption)
        return load_sample(key, join(folder, entry.path), entry.caption, with_images)

    remote = is_url(unit.path) or any(is_url(entry.path) for entry in entries)
    suffixes = (f"~{repeats[index]}" if index in repeats else "" for index in range(len(entries)))
    named = ((f"{unit.name}/{entry.name}{end}", entry) for entry, end in zip(entries, suffixes, strict=True))
    wanted = (pair for pair in named if keys is None or pair[0] in keys)
    yield from read_ahead(load, wanted, remote and with_images)


def read_rows(unit: Unit, source: Source) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Yield the key and the content of the rows of a slice, in order; the content is a str where it is no object.

    Raises:
        DataError: If the list is no longer what `find_list` saw.
    """
    repeats = dict(unit.repeats)
    for index, row in enumerate(_slice(unit, source)):
        name = _entry(row, source, _row_word(unit.path)).name
        yield f"{unit.name}/{name}" + (f"~{repeats[index]}" if index in repeats else ""), row.content


def _row_word(path: str) -> str:
    return "line" if path.lower().endswith(".jsonl") else "row"


def _entry(row: _Row, source: Source, row_word: str) -> _Entry:
    """Tell what a row means; its name is encoded, but not yet unique."""
    where = f"{row_word} {row.number}"
    fallback = f"{row_word}-{row.number:06d}"
    if isinstance(row.content, str):
        return _Entry(fallback, "", None, f"{where}: {row.content}")
    path, caption, key = (row.content.get(name) for name in (source.path_column, source.caption_column, "key"))
    name = ""
    if isinstance(key, int) or (isinstance(key, str) and key):
        name = encode_path(str(key))
    elif isinstance(path, str) and path:
        inside = _inside(path)
        name = encode_path(split_extension(inside)[0] if is_image(inside) else inside)
    text = storable(caption).strip() if isinstance(caption, str) else None
    problem = ""
    if not isinstance(path, str) or not path:
        problem = f"{where}: {source.path_column}: expected a path, found {path!r:.80}"
    elif is_url(path) and not _is_object(path):
        problem = f"{where}: {path:.200}: a remote address; download the images first, with `pixart fetch`"
    elif caption is not None and text is None:
        problem = f"{where}: {source.caption_column}: expected a text, found {caption!r:.80}"
    return _Entry(name or fallback, path if isinstance(path, str) else "", text, problem)


def _is_object(path: str) -> bool:
    return path.partition("://")[0] in OBJECT_STORES


def _inside(path: str) -> str:
    """Drop protocol and bucket: images are called the same wherever they are kept."""
    return path.partition("://")[2].partition("/")[2] if _is_object(path) else path


# Finding


def _survey(path: str, source: Source) -> _Survey:
    try:
        return patiently(partial(_look_through, path, source), path)
    except OSError as error:
        raise unreadable(path, error) from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: expected a Parquet file: {error}; write it again") from error


def _look_through(path: str, source: Source) -> _Survey:
    survey = _Survey()
    row_word = _row_word(path)
    for row in _all_rows(path, source):
        survey.numbers.append(row.number)
        survey.begins.append(row.begin)
        survey.ends.append(row.end)
        name = _entry(row, source, row_word).name
        survey.names.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big"))
        if not isinstance(row.content, str):
            survey.columns.update(dict.fromkeys(row.content))
    if path.lower().endswith(".parquet"):
        with open_file(path) as file, pq.ParquetFile(file) as table:
            survey.columns = dict.fromkeys(table.schema_arrow.names)
    return survey


def _check_columns(path: str, columns: Mapping[str, None], source: Source) -> None:
    wanted = [("path_column", source.path_column)]
    if source.caption_column != type(source).model_fields["caption_column"].default:
        wanted.append(("caption_column", source.caption_column))
    for setting, column in wanted:
        if columns and column not in columns:
            found = ", ".join(list(columns)[:40])
            raise ConfigError(f"source.{setting}: {path} has no column {column!r}; set it to one of: {found}")


def _repeats(names: "array[int]") -> dict[int, int]:
    """Return, for each row whose name came up before, for which time it comes up."""
    hashes = np.frombuffer(names, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    fresh = np.ones(len(hashes), dtype=bool)
    fresh[1:] = hashes[order][1:] != hashes[order][:-1]
    nth = np.arange(len(hashes)) - np.flatnonzero(fresh)[np.cumsum(fresh) - 1] + 1
    return dict(zip(order[~fresh].tolist(), nth[~fresh].tolist(), strict=True))


def _all_rows(path: str, source: Source) -> Iterator[_Row]:
    lower = path.lower()
    if lower.endswith(".parquet"):
        return _parquet_rows(path, source, 0, None)
    return _jsonl_rows(path, 0, None, 1) if lower.endswith(".jsonl") else _json_rows(path)


def _slice(unit: Unit, source: Source) -> list[_Row]:
    """Return the rows of a unit; reads nothing but its part of the file."""
    try:
        return patiently(lambda: list(_slice_rows(unit, source)), unit.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{unit.path}: cannot be read any more: {error}; it changed: run the job again") from error


def _slice_rows(unit: Unit, source: Source) -> Iterator[_Row]:
    lower = unit.path.lower()
    begin, end = unit.byte_range
    if lower.endswith(".parquet"):
        yield from _parquet_rows(unit.path, source, unit.start, unit.stop)
    elif lower.endswith(".jsonl"):
        yield from _jsonl_rows(unit.path, begin, end, unit.first_line)
    else:
        with open_file(unit.path) as file:
            file.seek(begin)
            values = json.loads(b"[" + file.read(end - begin) + b"]")
        yield from (_row(unit.first_line + i, 0, 0, value) for i, value in enumerate(values))


# Formats


def _row(number: int, begin: int, end: int, value: Any) -> _Row:
    content = value if isinstance(value, dict) else f"expected an object, found {value!r:.80}"
    return _Row(number, begin, end, content)


def _jsonl_rows(path: str, begin: int, end: int | None, first_line: int) -> Iterator[_Row]:
    with open_file(path) as file:
        file.seek(begin)
        position = begin
        for number, line in enumerate(file, first_line):
            if end is not None and position >= end:
                return
            after = position + len(line)
            text = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
            if text:
                yield _jsonl_row(number, position, after, text)
            position = after


def _jsonl_row(number: int, begin: int, end: int, text: bytes) -> _Row:
    try:
        return _row(number, begin, end, json.loads(text))
    except (ValueError, RecursionError) as error:
        return _Row(number, begin, end, f"not JSON: {error}")


def _json_rows(path: str) -> Iterator[_Row]:
    """Parse one element at a time to learn where each begins and ends, in bytes."""
    with open_file(path) as file:
        data = file.read()
    decoder = json.JSONDecoder()
    try:
        text = data.removeprefix(_BOM).decode()
        at = _expect(text, _skip(text, 0), "[")
        counted, offset, number = 0, len(data) - len(text.encode()), 0
        while text[at : at + 1] != "]":
            value, stop = decoder.raw_decode(text, at)
            begin = offset + len(text[counted:at].encode())
            offset, counted, number = begin + len(text[at:stop].encode()), stop, number + 1
            yield _row(number, begin, offset, value)
            at = _skip(text, stop)
            if text[at : at + 1] != "]":
                at = _expect(text, at, ",")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of objects: {error}; mend it, or use JSONL") from error


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, sign: str) -> int:
    if text[at : at + 1] != sign:
        raise ValueError(f"expected {sign!r} at character {at}, found {text[at : at + 20]!r}")
    return _skip(text, at + 1)


def _parquet_rows(path: str, source: Source, start: int, stop: int | None) -> Iterator[_Row]:
    with open_file(path) as file, pq.ParquetFile(file) as table:
        wanted = (source.path_column, source.caption_column, "key")
        columns = [name for name in wanted if name in table.schema_arrow.names]
        before = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if before + num_rows > start and (stop is None or before < stop):
                for batch in table.iter_batches(row_groups=[group], columns=columns, batch_size=8192):
                    yield from _batch_rows(batch, before, start, stop)
                    before += batch.num_rows
            else:
                before += num_rows


def _batch_rows(batch: Any, before: int, start: int, stop: int | None) -> Iterator[_Row]:
    low = max(0, start - before)
    high = batch.num_rows if stop is None else min(batch.num_rows, stop - before)
    if low < high:
        for i, content in enumerate(batch.slice(low, high - low).to_pylist()):
            yield _Row(before + low + i + 1, 0, 0, content)
