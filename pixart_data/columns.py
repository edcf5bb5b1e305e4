"""Captions as Arrow columns, for what counts millions of them: of Parquet and JSONL tables, and of plain text files.

`captions` reads rows with keys, which is what features are made from; here a key is a convenience, and a caption needs
none. Of Parquet, batches go from the file to the engine as they are; a text file holds one caption a line.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.captions import CaptionFile, open_parquet, read_rows, row_groups
from pixart_data.errors import DataError
from pixart_data.storage import local_copy, location
from pixart_data.units import storable

TEXT = ".txt"
"""Ending of files with a caption a line."""

_ROWS_PER_READ = 4096
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Rows:
    """Some rows of a file, one after another.

    Attributes:
        first: Number of the first in the file, from 0; blank lines of JSONL are numbered, too.
        keys: The column `key`; where there is none, the file's stem and the number of the row or line, as in
            `captions/row-000012`. Type string, (N,).
        captions: Type string or large_string, well-formed UTF-8, (N,); null where a row has none.
        more: Those of the further columns that the file has, by the name that they were asked for: texts as string,
            numbers as float64. (N,) each.
        num_bad: Rows that hold no caption because they are damaged: lines that are no JSON object, captions of JSONL
            that are no text.
        problem: What is wrong with the first of these.
    """

    first: int
    keys: pa.Array
    captions: pa.Array
    more: Mapping[str, pa.Array]
    num_bad: int = 0
    problem: str = ""


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column of a type holds text, or bytes that may be."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks) or _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def read_columns(
    file: CaptionFile, column: str, texts: Mapping[str, str] | None = None, numbers: Sequence[Sequence[str]] = ()
) -> Iterator[Rows]:
    """Yield the rows of a file or slice, some thousand at a time; memory is that of one such batch.

    Args:
        column: The captions; of a text file, its lines.
        texts: Further columns of text, by the name that they are to have in `Rows.more`.
        numbers: Further columns of numbers; each by several names, of which the first that is there is taken, and
            the very first is its name in `Rows.more`.

    Raises:
        DataError: If the file cannot be read.
    """
    path = location(file.path)
    wanted = _Wanted(column, dict(texts or {}), numbers)
    stem = f"{storable(path.stem)}/{'row' if path.suffix == '.parquet' else 'line'}-"
    reader = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, TEXT: _text_rows}[path.suffix]
    yield from reader(file, wanted, stem)


@dataclass(frozen=True)
class _Wanted:
    column: str
    texts: dict[str, str]
    numbers: Sequence[Sequence[str]]

    @property
    def names(self) -> list[str]:
        every = ["key", self.column, *self.texts.values(), *itertools.chain.from_iterable(self.numbers)]
        return list(dict.fromkeys(every))

    def of(self, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """Return the further columns that there are, under the names that they are to have."""
        more = {}
        for name, column in self.texts.items():
            if column in columns and is_text(columns[column].type):
                more[name] = as_text(columns[column])
        for names in self.numbers:
            found = next((columns[name] for name in names if name in columns and _is_number(columns[name].type)), None)
            if found is not None:
                more[names[0]] = pc.cast(found, pa.float64(), safe=False)
        return more


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def as_text(column: pa.Array) -> pa.Array:
    """Return texts as type string, large_string where they are that already; what is no UTF-8 becomes U+FFFD."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        target, raw = pa.large_string(), pa.large_binary()
    else:
        target, raw = pa.string(), pa.binary()
    try:
        text = column.cast(target)  # of bytes, this checks that they are UTF-8
        if not _is_bytes(kind):
            text.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(raw).to_pylist()
        text = pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], target)
    return text


def _keys(column: pa.Array | None, stem: str, numbers: pa.Array) -> pa.Array:
    if column is not None and is_text(column.type):
        return as_text(column).cast(pa.string())
    if column is not None and pa.types.is_integer(column.type):
        return column.cast(pa.string())
    digits = pc.utf8_lpad(numbers.cast(pa.string()), 6, "0")
    return pc.binary_join_element_wise(pa.scalar(stem), digits, pa.scalar(""))


def _parquet_rows(part: CaptionFile, wanted: _Wanted, stem: str) -> Iterator[Rows]:
    with open_parquet(location(part.path)) as file:
        stop = part.stop if part.stop >= 0 else file.metadata.num_rows
        groups, number = row_groups(file.metadata, part.start, stop)
        names = [name for name in wanted.names if name in file.schema_arrow.names]
        if wanted.column not in names:
            raise DataError(
                f"{part.path}: expected a column '{wanted.column}', found {', '.join(file.schema_arrow.names)}; run "
                "the job again: the file has changed since it was planned"
            )
        for batch in file.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=names):
            skipped = min(max(part.start - number, 0), batch.num_rows)  # of a row group that is cut
            rows = batch.slice(skipped, max(stop - number - skipped, 0))
            number += batch.num_rows
            if rows.num_rows:
                columns = dict(zip(rows.schema.names, rows.columns, strict=True))
                first = number - batch.num_rows + skipped
                numbers = pa.array(np.arange(first, first + rows.num_rows))
                keys = _keys(columns.get("key"), stem, numbers)
                yield Rows(first, keys, as_text(columns[wanted.column]), wanted.of(columns))


def _jsonl_rows(part: CaptionFile, wanted: _Wanted, stem: str) -> Iterator[Rows]:
    rows = read_rows(part, ())
    while held := list(itertools.islice(rows, _ROWS_PER_READ)):
        objects = [row if isinstance(row, dict) else {} for _, row in held]
        captions = [row.get(wanted.column) for row in objects]
        problems = [row for _, row in held if isinstance(row, str)]
        others = [type(value).__name__ for value in captions if not isinstance(value, str | None)]
        problems += [f"column {wanted.column} holds {name}, not text" for name in others]
        columns = {name: _column([row.get(name) for row in objects]) for name in wanted.names if name != wanted.column}
        keys = [_key(row.get("key"), stem, number) for (number, _), row in zip(held, objects, strict=True)]
        more = wanted.of({name: column for name, column in columns.items() if column is not None})
        problem = storable(next(iter(problems), ""))
        yield Rows(held[0][0], _strings(keys), _strings(captions), more, len(problems), problem)


def _key(value: Any, stem: str, number: int) -> str:
    return value if isinstance(value, str) and value else f"{stem}{number:06d}" if value is None else str(value)


def _column(values: list[Any]) -> pa.Array | None:
    """Return a column of JSON values, of numbers if the first one is; values of other types are null."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, int | float) and not isinstance(first, bool):
        good = (float(v) if isinstance(v, int | float) and abs(v) < 1 << 53 else None for v in values)
        return pa.array(list(good), pa.float64())
    return _strings(values) if isinstance(first, str) else None


def _strings(values: list[Any]) -> pa.Array:
    return pa.array([storable(value) if isinstance(value, str) else None for value in values], pa.string())


def _text_rows(part: CaptionFile, wanted: _Wanted, stem: str) -> Iterator[Rows]:
    path = location(part.path)
    with local_copy(path) as copy, copy.open("rb") as file:
        file.seek(part.first_byte)
        lines = file if part.stop < 0 else itertools.islice(file, part.stop - part.start)
        number = part.start
        while held := list(itertools.islice(lines, _ROWS_PER_READ)):
            if number == 0:
                held[0] = held[0].removeprefix(_BOM)
            texts = pa.array([line.removesuffix(b"\n").removesuffix(b"\r") for line in held], pa.binary())
            numbers = pa.array(np.arange(number, number + len(held)))
            yield Rows(number, _keys(None, stem, numbers), as_text(texts), wanted.of({}))
            number += len(held)
