"""Numbers that came with the images, by the name of their column: LAION's `pwatermark`, for instance.

img2dataset keeps the columns of the list it downloaded, in the Parquet beside a tar and in the JSON beside each image;
lists of images have columns of their own.
"""

import json
import math
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError
from pixart_data.stores import is_url, join, open_file, read_object
from pixart_data.units import Unit, encode_path, split_extension

_MAX_JSON_BYTES = 1 << 20  # SA-1B's masks are larger, and hold no scores
_BOM = b"\xef\xbb\xbf"
# What tarfile raises on damaged headers.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, EOFError, RecursionError)


@dataclass
class Scores:
    """The scores of a unit: of lists by row, of the rest by the path in their key."""

    unit: Unit
    by_row: list[float | None] = field(default_factory=list)
    by_path: dict[str, float | None] = field(default_factory=dict)

    def of(self, row: int, key: str) -> float | None:
        """Return the score of a unit's sample, by its number in the unit and its key; None if it has none."""
        if self.unit.kind == "list":
            return self.by_row[row] if row < len(self.by_row) else None
        path = key.removeprefix(f"{self.unit.name}/")
        return self.by_path.get(path, self.by_path.get(path.split("~")[0]))  # `~png`: its JSON is that of the stem

    def __bool__(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in (*self.by_row, *self.by_path.values()))


def read_scores(unit: Unit, column: str) -> Scores:
    """Read one column of the metadata of a unit's samples; what is no finite number is no score.

    Raises:
        DataError: If a file cannot be read.
    """
    scores = Scores(unit)
    try:
        if unit.kind == "list":
            scores.by_row = [_number(row, column) for row in _list_rows(unit, column)]
        elif unit.kind == "folder":
            scores.by_path = {_stem(file): _folder_score(unit, file, column) for file in unit.files}
        else:
            scores.by_path = _sidecar_scores(unit, column)
            if not scores:
                scores.by_path = dict(_tar_scores(unit, column))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{unit.path}: its {column} cannot be read: {error}; check the storage, then run again"
        ) from error
    return scores


def _number(row: Any, column: str) -> float | None:
    value = row.get(column) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _stem(path: str) -> str:
    return encode_path(split_extension(path)[0])


def _sidecar_scores(unit: Unit, column: str) -> dict[str, float | None]:
    if not unit.sidecar:
        return {}
    try:
        with open_file(unit.sidecar) as file, pq.ParquetFile(file) as table:
            if not {"key", column} <= set(table.schema_arrow.names):
                return {}
            rows = table.read(columns=["key", column]).to_pylist()
    except pa.ArrowInvalid:  # no Parquet; the readers of tars pass it over, too
        return {}
    return {encode_path(row["key"]): _number(row, column) for row in rows if isinstance(row["key"], str)}


def _tar_scores(unit: Unit, column: str) -> Iterator[tuple[str, float | None]]:
    """Read the JSON members; of a damaged tar those before the damage."""
    with open_file(unit.path) as file:
        try:
            with tarfile.open(fileobj=file, encoding="utf-8") as tar:
                for member in tar:
                    if member.name.endswith(".json") and member.isreg() and member.size <= _MAX_JSON_BYTES:
                        content = tar.extractfile(member)
                        yield _stem(member.name), _number(_parse(content.read() if content else b""), column)
        except _DAMAGED:
            return


def _folder_score(unit: Unit, file: str, column: str) -> float | None:
    path = join(unit.path, f"{split_extension(file)[0]}.json")
    try:
        data = read_object(path, _MAX_JSON_BYTES) if is_url(path) else Path(path).read_bytes()
    except FileNotFoundError:
        return None
    return _number(_parse(data), column)


def _list_rows(unit: Unit, column: str) -> Iterator[Any]:
    """Yield the rows of a list's slice, in the order of its samples."""
    with open_file(unit.path) as file:
        if unit.path.lower().endswith(".parquet"):
            with pq.ParquetFile(file) as table:
                if column in table.schema_arrow.names:
                    yield from _parquet_rows(table, column, unit.start, unit.stop)
            return
        begin, end = unit.byte_range
        file.seek(begin)
        data = file.read(end - begin)
    if unit.path.lower().endswith(".jsonl"):
        lines = (line.removeprefix(_BOM).strip() for line in data.split(b"\n"))
        yield from (_parse(line) for line in lines if line)
    else:
        yield from _parse(b"[" + data + b"]") or ()


def _parquet_rows(table: pq.ParquetFile, column: str, start: int, stop: int) -> Iterator[Any]:
    before = 0
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if before < stop and before + num_rows > start:
            low, high = max(0, start - before), min(num_rows, stop - before)
            yield from table.read_row_group(group, columns=[column]).slice(low, high - low).to_pylist()
        before += num_rows
