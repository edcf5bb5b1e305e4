"""`pixart stats`: caption tables to noun counts, one part for each file, then one report beside the paper's Table 1."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import CaptionSet, Stats
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.worker import Report
from pixart_data.captions import CaptionFile, caption_files, count_captions, read_captions, require_columns
from pixart_data.commits import Record, publish_table, read_table
from pixart_data.nouns import NounCounts, NounStats, build_tagger, count_nouns, find_tagger, summarise
from pixart_data.records import SCHEMA_VERSION
from pixart_data.reports import from_json, html_page, to_json
from pixart_data.storage import location, read_bytes, write_atomic
from pixart_data.units import encode_name
from pixart_data.verification import REPORT

STAGE = "stats"
JSON_FILE = REPORT
HTML_FILE = "report.html"
_COUNTS = "counts"


@dataclass(frozen=True)
class CountUnit:
    """A unit: one file of one set."""

    id: str
    set_name: str
    file: CaptionFile
    column: str

    @property
    def fingerprint(self) -> str:
        """Changes when the file does."""
        return self.file.fingerprint


class StatsStage:
    """Counts the nouns of one file after another."""

    def __init__(self, root: Path, kind: Any) -> None:
        self.root = root
        self.tagger = build_tagger(kind)

    def __call__(self, unit: CountUnit, report: Report) -> Record:
        """Write the file's table of counts and return its record."""
        rejected: Counter[str] = Counter()
        num_rows = 0

        def captions() -> Iterator[str | None]:
            nonlocal num_rows
            for row in read_captions(unit.file, unit.column, need_key=False):
                num_rows += 1
                if row.error is not None:
                    rejected[str(row.error)] += 1
                report(num_rows, rejected.total())
                yield row.caption

        counts = count_nouns(captions(), self.tagger)
        file = publish_table(counts.to_table(), self.root, self.root / _COUNTS, unit.id)
        return Record(unit.id, "", {}, num_rows, num_rows - rejected.total(), dict(rejected), [file])


def prepare(job: Stats, download: bool) -> Run:
    """Find the files of every set; the tagger is decided here, once for all workers."""
    root = location(job.output)
    units = [unit for caption_set in job.sets for unit in _units(caption_set)]
    tagger = find_tagger(download=download, approximate=job.approximate)
    return Run(
        stage=STAGE,
        root=root,
        units=units,
        settings=lambda unit: {
            "schema": SCHEMA_VERSION,
            "tagger": tagger.name,
            "column": unit.column,
            "set": unit.set_name,
            "shard": unit.fingerprint,
        },
        build=partial(StatsStage, root, tagger.kind),
        cluster=job.cluster,
        swept=[root / _COUNTS],
        count=lambda unit: count_captions(unit.file),
        per_cpu=True,
        judged=False,  # an image without a caption of its own is no fault of the counting
    )


def plan(job: Stats) -> list[tuple[Run, Plan]]:
    """Return what the job would do; nothing is downloaded."""
    run = prepare(job, download=False)
    return [(run, make_plan(run))]


def run(job: Stats) -> list[tuple[Run, Account]]:
    """Do the job and write the report."""
    prepared = prepare(job, download=job.download_nltk)
    return [(prepared, execute(prepared, job, lambda records: _write_report(job, prepared, records)))]


def read_stats(job: Stats) -> dict[str, NounStats]:
    """Return the figures of a finished job, a row for each set in the job's order."""
    return from_json(json.loads(read_bytes(location(job.output) / JSON_FILE)))


def _units(caption_set: CaptionSet) -> Iterator[CountUnit]:
    name = encode_name(caption_set.name, max_length=60)
    files = caption_files(location(caption_set.path), f"sets.{caption_set.name}.path")
    require_columns(files, f"sets.{caption_set.name}.column", caption_set.column, need_key=False)
    for file in files:
        yield CountUnit(f"{name}--{file.id}", caption_set.name, file, caption_set.column)


def _write_report(job: Stats, run: Run, records: list[Record]) -> None:
    stats = _summaries(job, run.units, {record.unit: record for record in records})
    text = json.dumps(to_json(stats), indent=1, ensure_ascii=False)
    write_atomic(run.root / JSON_FILE, text.encode("utf-8", errors="replace"))
    write_atomic(run.root / HTML_FILE, html_page(stats).encode("utf-8", errors="replace"))


def _summaries(job: Stats, units: Any, records: Mapping[str, Record]) -> dict[str, NounStats]:
    counts: dict[str, NounCounts] = {}
    for unit in units:
        [file] = records[unit.id].files
        part = NounCounts.from_table(read_table(location(job.output) / file.path))
        counts[unit.set_name] = counts[unit.set_name].merge(part) if unit.set_name in counts else part
    return {name: summarise(count) for name, count in counts.items()}
