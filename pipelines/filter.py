"""`pixart filter`: source shards to measurements, one part for each, and then to lists of the images that are kept.

Workers measure; that is all that decodes images. What is kept is decided at the end, in the driver, from the
measurements of all shards together: thresholds can be changed without measuring again, and a duplicate is told by the
order of the source, not by who was first.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import Filter
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.pictures import Picture, read_pictures
from pipelines.worker import Report
from pixart_data.commits import PublishedFile, Record, publish, publish_table, read_table
from pixart_data.duplicates import Indices, exact_duplicates, index_type, near_duplicates
from pixart_data.errors import ConfigError
from pixart_data.filters import (
    CODES,
    JUDGED,
    KEPT,
    MEASURED_SIDE_PX,
    UNREADABLE,
    check_languages,
    content_digest,
    describe,
    judge,
    language,
    measure,
    measuring,
)
from pixart_data.records import KEPT as KEPT_SCHEMA
from pixart_data.records import MEASURES, REJECTED, SCHEMA_VERSION, Reason
from pixart_data.retries import storage
from pixart_data.scores import Scores, read_scores
from pixart_data.sections import Filters
from pixart_data.selection import Part, Selection, read_selection, seal_selection
from pixart_data.sources import Unit, count_rows, find_units
from pixart_data.storage import delete, list_files, location, staging_path
from pixart_data.threads import ahead

STAGE = "filter"
PARTS = "measures"
KEPT_FILES = "kept"
REJECTED_FILES = "rejected"
_BATCH = 16
_IO_THREADS = 8
_UNITS_LOOKED_AT = 8
Search = Callable[[NDArray[np.uint64]], Indices]
_REASONS = {code: reason for reason, code in CODES.items()}


class FilterStage:
    """Measures the images and raw captions of one unit after another."""

    def __init__(self, job: Filter) -> None:
        self.job = job

    def __call__(self, unit: Unit, report: Report) -> Record:
        """Write the unit's table of measurements and return its record."""
        root = location(self.job.output)
        column = self.job.filters.watermark_column
        scores = read_scores(unit, column) if column else Scores(unit)
        rows: list[dict[str, Any]] = []
        rejected: Counter[str] = Counter()
        pictures = read_pictures(unit, self.job.source, _BATCH, MEASURED_SIDE_PX, then=measure)
        for number, picture in enumerate(pictures):
            rows.append(_row(picture, scores.of(number, picture.sample.key)))
            rejected.update(() if picture.error is None else (str(picture.error),))
            report(len(rows), rejected.total())
        file = publish_table(pa.Table.from_pylist(rows, schema=MEASURES), root, root / PARTS, unit.id)
        return Record(unit.id, "", {}, len(rows), len(rows) - rejected.total(), dict(rejected), [file])


def _row(picture: Picture, watermark: float | None) -> dict[str, Any]:
    row = {"key": picture.sample.key, "watermark": watermark}
    if picture.error is not None or picture.sample.data is None:
        return row | {"error": str(picture.error), "detail": picture.detail or None}
    code, probability = language(picture.sample.caption)
    return row | {
        **asdict(picture.placed),
        "sha256": content_digest(picture.sample.data),
        "language": code,
        "language_probability": probability,
    }


def prepare(job: Filter) -> Run:
    """Find the units of a job and what decides their measurements, which the thresholds do not."""
    units = find_units(job.source)
    if job.filters.languages:
        check_languages(job.filters.languages)
    if job.filters.watermark_column:
        _check_column(units, job.filters.watermark_column)
    source = job.source.model_dump(include={"layout", "path_column", "caption_column", "max_image_pixels"})
    measures = {**measuring(), "watermark_column": job.filters.watermark_column}
    root = location(job.output)
    return Run(
        stage=STAGE,
        root=root,
        units=units,
        settings=lambda unit: {
            "schema": SCHEMA_VERSION,
            "measures": measures,
            "source": source,
            "shard": unit.fingerprint,
        },
        build=partial(FilterStage, job),
        cluster=job.cluster,
        swept=[root / PARTS],
        count=count_rows,
        per_cpu=True,
        needs_gpu=False,
    )


def _check_column(units: Sequence[Unit], column: str) -> None:
    """Look for a score in the first units: a column that is misspelt would be found missing after days."""
    looked_at = units[:_UNITS_LOOKED_AT]
    if not any(read_scores(unit, column) for unit in looked_at):
        raise ConfigError(
            f"filters.watermark_column: expected numbers in {column!r} of the images' metadata, found none in "
            f"{looked_at[0].path} and {len(looked_at) - 1} other shards; name a column of the Parquet or JSON beside "
            "the images, or of the list"
        )


def plan(job: Filter) -> list[tuple[Run, Plan]]:
    """Return what the job would do."""
    run = prepare(job)
    return [(run, make_plan(run))]


def run(job: Filter) -> list[tuple[Run, Account]]:
    """Do the job; the account is that of all filters, while `cluster.max_rejected` is held to unreadable images."""
    prepared = prepare(job)
    execute(prepared, job, partial(decide, prepared.root, job.filters))
    selection = read_selection(prepared.root)
    return [(prepared, Account(selection.rows_in, selection.rows_out, selection.rejected))]


def decide(root: Path, filters: Filters, records: Sequence[Record]) -> None:
    """Decide from all measurements what is kept, write it, the manifest last, and delete what an earlier run kept."""
    verdicts = _Verdicts(root, filters, records)
    verdicts.judge()
    if filters.exact_duplicates:
        verdicts.reject_repeats(Reason.DUPLICATE, "sha256", exact_duplicates)
    if filters.near_duplicates_bits is not None:
        search = partial(near_duplicates, max_distance_bits=filters.near_duplicates_bits)
        verdicts.reject_repeats(Reason.NEAR_DUPLICATE, "phash", search)
    staged = staging_path(root / REJECTED_FILES, "rejected.parquet")
    with storage(staged), pq.ParquetWriter(staged, REJECTED, compression="zstd") as writer:
        parts = list(ahead(partial(_publish_kept, root), verdicts.outcomes(writer), _IO_THREADS, 2 * _IO_THREADS))
    rejected_file = publish(staged, root, root / REJECTED_FILES, "rejected", ".parquet")
    rows_out = sum(part.rows_out for part in parts)
    rejected = dict(sorted(verdicts.rejected.items()))
    rows_in = sum(record.rows_in for record in records)
    seal_selection(root, Selection(filters.model_dump(), rows_in, rows_out, rejected, parts, rejected_file))
    named = {root / file.path for file in (rejected_file, *(part.file for part in parts))}
    for folder in (KEPT_FILES, REJECTED_FILES):
        delete(path for path in list_files(root / folder) if path not in named)


def _publish_kept(root: Path, outcome: tuple[Record, pa.Table]) -> Part:
    record, kept = outcome
    file = publish_table(kept, root, root / KEPT_FILES, record.unit)
    keys = hashlib.sha256("\n".join(kept["key"].to_pylist()).encode()).hexdigest()
    return Part(record.unit, record.settings["shard"], record.rows_in, kept.num_rows, keys, file)


class _Verdicts:
    """A verdict for each row of all units, in the order of the source: a few bytes for each, for there are millions."""

    def __init__(self, root: Path, filters: Filters, records: Sequence[Record]) -> None:
        self.root, self.filters, self.records = root, filters, records
        num_rows = sum(record.rows_in for record in records)
        self.codes = np.full(num_rows, KEPT, dtype=np.int8)
        self.earlier: Indices = np.full(num_rows, -1, dtype=index_type(num_rows))  # of the row that one repeats
        self.rejected: Counter[str] = Counter()

    def judge(self) -> None:
        for start, table in self._tables(JUDGED):
            self.codes[start : start + table.num_rows] = judge(table, self.filters)

    def reject_repeats(self, reason: Reason, column: str, search: Search) -> None:
        """Reject, of the rows that are kept so far, those that repeat an earlier one by what is in a column."""
        rows = np.flatnonzero(self.codes == KEPT)
        values = np.zeros((len(rows), 2) if column == "sha256" else len(rows), dtype=np.uint64)
        known = np.zeros(len(self.codes), dtype=bool)
        filled = 0
        for start, table in self._tables([column]):
            wanted = table[column].is_valid().to_numpy() & (self.codes[start : start + table.num_rows] == KEPT)
            words = _words(table[column].filter(wanted))
            values[filled : filled + len(words)] = words
            known[start : start + table.num_rows] = wanted
            filled += len(words)
        rows = rows[known[rows]]
        found = search(values[:filled])
        hit = found >= 0
        self.codes[rows[hit]] = CODES[reason]
        self.earlier[rows[hit]] = rows[found[hit]]

    def outcomes(self, writer: pq.ParquetWriter) -> Iterator[tuple[Record, pa.Table]]:
        """Yield the kept keys of each unit, and write and count the rejected rows on the way."""
        cited = set(self.earlier[self.earlier >= 0].tolist())
        keys: dict[int, str] = {}  # of rows that are repeated; they come before those that repeat them
        for record, (start, table) in zip(self.records, self._tables(("key", *JUDGED, "detail")), strict=True):
            codes = self.codes[start : start + table.num_rows]
            column = table["key"].to_pylist()
            keys |= {start + i: key for i, key in enumerate(column) if start + i in cited}
            rejected = [self._rejected(row, start, keys) for row in _rows(table, np.flatnonzero(codes != KEPT))]
            self.rejected.update(row["error"] for row in rejected)
            if rejected:
                writer.write_table(pa.Table.from_pylist(rejected, schema=REJECTED))
            yield record, table.select(["key"]).filter(codes == KEPT).cast(KEPT_SCHEMA)

    def _rejected(self, place: tuple[int, dict[str, Any]], start: int, keys: dict[int, str]) -> dict[str, Any]:
        number, row = place
        code = self.codes[start + number]
        if code == UNREADABLE:
            return {name: row[name] for name in REJECTED.names}
        reason = _REASONS[code]
        detail = describe(reason, row, self.filters, keys.get(int(self.earlier[start + number]), ""))
        return {"key": row["key"], "error": str(reason), "detail": detail}

    def _tables(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yield the measurements of each unit with the number of its first row."""
        files: list[PublishedFile] = [file for record in self.records for file in record.files]
        start = 0
        read = partial(_read, self.root, list(columns))
        for table in ahead(read, files, _IO_THREADS, 2 * _IO_THREADS):
            yield start, table
            start += table.num_rows


def _read(root: Path, columns: list[str], file: PublishedFile) -> pa.Table:
    return read_table(root / file.path, columns=columns)


def _rows(table: pa.Table, numbers: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from zip(numbers.tolist(), table.take(pa.array(numbers)).to_pylist(), strict=True)


def _words(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return hashes as they are, and of digests the first 128 bits, (N, 2)."""
    if pa.types.is_uint64(column.type):
        hashes: NDArray[np.uint64] = column.to_numpy()
        return hashes
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint64).reshape(-1, 4)[:, :2]
