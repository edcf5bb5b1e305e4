"""`pixart stats`: captions to nouns and quality, one part for each file, then one report beside the paper's Table 1."""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import MOST_PICTURES, Stats
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.facts import Facts, LanguageSample, num_without
from pipelines.findings import (
    COUNTS,
    DRAWN,
    DRAWN_SEED,
    HTML_FILE,
    JSON_FILE,
    QUALITY,
    candidates,
    read_findings,
    write_findings,
)
from pipelines.sets import CountUnit, Sets, find_sets
from pipelines.worker import Report
from pixart_data.columns import Rows, read_columns
from pixart_data.commits import PublishedFile, Record, publish, publish_table
from pixart_data.corpora import Corpus
from pixart_data.errors import ConfigError
from pixart_data.galleries import Row, draw_rows, find_shards
from pixart_data.gates import failures
from pixart_data.inputs import num_rows
from pixart_data.nouns import NounCounter
from pixart_data.quality import MEASURES, Inspector
from pixart_data.records import Reason
from pixart_data.renderings import shortened
from pixart_data.retries import storage
from pixart_data.storage import location, staging
from pixart_data.tagging.engines import Kind, open_engine
from pixart_data.tagging.references import TextBlobEngine, nltk_name
from pixart_data.tagging.resources import find_resources

__all__ = ["HTML_FILE", "JSON_FILE", "plan", "read_stats", "run"]

STAGE = "stats"
VERSION = 4
"""Of what a unit's files and record hold; units of another one are redone."""

_SIZES = (("width_px", "width"), ("height_px", "height"))
_TRIED_OUT = ("Two dogs run. A red house stands to the left of the tree.", None)

log = logging.getLogger(__name__)


class StatsStage:
    """Tags, counts and measures the captions of one file after another.

    Args:
        tagger: Name of the engine that the job was planned with.
        num_rows: Of each set by its name; decides which share of them is measured in tokens.
    """

    def __init__(self, job: Stats, kind: Kind, tagger: str, num_rows: Mapping[str, int]) -> None:
        self.job, self.root = job, location(job.output)
        self.engine = open_engine(kind)
        if self.engine.name != tagger:
            raise ConfigError(
                f"noun tagger: expected {tagger}, as where the job was planned, found {self.engine.name} on this "
                "machine; install one version everywhere"
            )
        self.counter = NounCounter(tagger, self.engine.approximate, self.engine.vocabulary)
        self.inspector = Inspector(self.engine.vocabulary)
        self.lengths, self.num_rows = lengths_of(job), num_rows
        self._measure(Rows(0, pa.nulls(2, pa.string()), pa.array(_TRIED_OUT), {}))  # compiles what is not yet
        self._forget()

    def __call__(self, unit: CountUnit, report: Report) -> Record:
        """Write the file's tables of counts and measures, and return its record."""
        try:
            return self._do(unit, report)
        finally:  # what a failure leaves behind is not the next unit's
            self._forget()

    def _do(self, unit: CountUnit, report: Report) -> Record:
        facts, rejected, rows_in = Facts(), Counter[str](), 0
        drawn: list[Row] = []
        file = f"{unit.set_name}/{unit.file.id.partition('~')[0]}"
        sample = LanguageSample(file)
        if self.lengths is not None:
            self.lengths.begin(self.num_rows[unit.set_name])
        with ExitStack() as stack:
            table = MeasuresTable(stack, self.root, unit.id) if self.job.measures else None
            for rows in read_columns(unit.file, unit.column, unit.texts, () if unit.is_raw else _SIZES):
                measures, failed = self._measure(rows)
                facts.add(rows, measures, failed)
                if table is not None:
                    table.write(rows.keys, measures, failed)
                sample.add(rows.captions, rows.first)
                if not unit.is_raw:
                    facts.add_sizes(rows, self.job.resolution_px)
                if self.lengths is not None:
                    self.lengths.add(rows.captions, rows.first, file)
                drawn += self._draw(unit, rows)
                rows_in += len(rows.captions)
                rejected += _rejected(rows, measures)
                report(rows_in, rejected.total())
            files = [publish_table(self.counter.take().to_table(), self.root, self.root / COUNTS, unit.id)]
            files += [table.publish()] if table is not None else []
        files += self._publish_drawn(unit, drawn)
        facts.languages = sample.languages()
        facts.totals.openers.merge(self.inspector.take_openers())
        facts.lengths = self.lengths.take() if self.lengths is not None else None
        return Record(unit.id, "", {}, rows_in, rows_in - rejected.total(), dict(rejected), files, facts.to_json())

    def _measure(self, rows: Rows) -> tuple[pa.RecordBatch, pa.Array]:
        """Count the nouns of some rows; return their measures and what fails the gate."""
        block = self.engine.tag(rows.captions)
        self.counter.add(block)
        asked, ended = rows.more.get("prompt"), rows.more.get("finish_reason")
        measures = self.inspector.measure(block, asked, ended)
        return measures, failures(measures, self.job.gate)

    def _draw(self, unit: CountUnit, rows: Rows) -> list[Row]:
        if self.job.gallery is None or unit.is_raw or "beside" not in rows.more:
            return []
        return draw_rows(rows.keys, rows.more["beside"], rows.captions, MOST_PICTURES, DRAWN_SEED)

    def _publish_drawn(self, unit: CountUnit, drawn: list[Row]) -> list[PublishedFile]:
        if not drawn:
            return []
        table = pa.Table.from_pylist([vars(row) for row in candidates(drawn)])
        return [publish_table(table, self.root, self.root / DRAWN, unit.id)]

    def _forget(self) -> None:
        self.counter.take()
        self.inspector.take_openers()
        if self.lengths is not None:
            self.lengths.take()


class MeasuresTable:
    """The measures of a unit's captions, written as they come.

    Args:
        stack: Ends with the unit: an unfinished table is gone then.
    """

    schema = pa.schema([pa.field("key", pa.string()), *MEASURES, pa.field("failures", pa.list_(pa.string()))])

    def __init__(self, stack: ExitStack, root: Path, unit: str) -> None:
        self._root, self._unit = root, unit
        self._staged = stack.enter_context(staging(root / QUALITY, f"{unit}.parquet"))
        self._writer = stack.enter_context(pq.ParquetWriter(self._staged, self.schema, compression="zstd"))

    def write(self, keys: pa.Array, measures: pa.RecordBatch, failed: pa.Array) -> None:
        """Add rows."""
        with storage(self._root / QUALITY):
            self._writer.write_batch(pa.record_batch([keys, *measures.columns, failed], schema=self.schema))

    def publish(self) -> PublishedFile:
        """Put the finished table in its place."""
        with storage(self._root / QUALITY):
            self._writer.close()
        return publish(self._staged, self._root, self._root / QUALITY, self._unit, ".parquet")


def lengths_of(job: Stats) -> Any:
    """Return what measures captions in tokens; None where the job does not ask for it.

    Raises:
        ConfigError: If there is no such tokenizer.
    """
    if job.tokenizer is None:
        return None
    from pixart_data.lengths import LengthCounter

    return LengthCounter(job.tokenizer, job.max_tokens, subfolder=job.tokenizer_subfolder)


def _rejected(rows: Rows, measures: pa.RecordBatch) -> Counter[str]:
    """Count the rows without a caption, null or blank; why the table itself rejected some is among the facts."""
    num_absent = num_without(measures)
    return +Counter({str(Reason.NO_CAPTION): num_absent - rows.num_bad, str(Reason.BAD_ROW): rows.num_bad})


def prepare(job: Stats, sets: Sets, download: bool) -> Run:
    """Return the run over the units of all sets; the tagger is decided here, once for all workers.

    Args:
        download: Whether NLTK's data is fetched where it is missing.

    Raises:
        ConfigError: If the tokenizer, the gallery's source or NLTK's data is not there.
        DataError: If a file cannot be read.
    """
    root = location(job.output)
    kind: Kind = "textblob" if job.approximate else "nltk"
    if kind == "nltk":
        find_resources(download)
    tagger = TextBlobEngine().name if kind == "textblob" else nltk_name()
    if job.gallery is not None:
        find_shards(job.gallery.source)
        if not sets.have_pairs:
            log.warning(
                "gallery: expected a table with captions and raw captions beside each other, found none; set "
                "raw_column of a set to the column of the raw ones"
            )
    lengths = lengths_of(job)
    rows = Counter[str]()
    for unit in sets.units if lengths is not None else ():
        rows[unit.set_name] += num_rows(unit.file)
    decided = {
        "schema": VERSION,
        "tagger": tagger,
        "measures": job.measures,
        "gate": job.gate.model_dump(),
        "resolution_px": job.resolution_px,
        "tokenizer": None if lengths is None else [lengths.take().identity, job.max_tokens],
    }
    return Run(
        stage=STAGE,
        root=root,
        units=sets.units,
        settings=partial(_settings, job, decided),
        build=partial(StatsStage, job, kind, tagger, dict(rows)),
        cluster=job.cluster,
        swept=[root / COUNTS, root / QUALITY, root / DRAWN],
        count=lambda unit: num_rows(unit.file),
        per_cpu=True,
        judged=False,  # an image without a caption of its own is no fault of the counting
    )


def _settings(job: Stats, decided: dict[str, Any], unit: CountUnit) -> dict[str, Any]:
    own: dict[str, Any] = {
        "column": unit.column,
        "beside": unit.beside,
        "set": unit.set_name,
        "shard": unit.fingerprint,
    }
    if job.gallery is not None and unit.beside and not unit.is_raw:
        own["gallery"] = True  # which of the rows drawn are shown is decided in the end
    return {**decided, **own}


def plan(job: Stats) -> list[tuple[Run, Plan]]:
    """Return what the job would do; nothing is downloaded."""
    run = prepare(job, find_sets(job), download=False)
    return [(run, make_plan(run))]


def run(job: Stats) -> list[tuple[Run, Account]]:
    """Do the job and write the report."""
    sets = find_sets(job)
    prepared = prepare(job, sets, download=job.download_nltk)
    planned = make_plan(prepared)
    tell_what_is_replaced(prepared, planned)
    if planned.todo:
        _announce(prepared)
    account = execute(prepared, job, partial(write_findings, job, sets))
    for corpus in read_stats(job):
        if corpus.language.get("flagged"):
            log.warning(
                "%s: %s: %.0f%% of the captions looked at are not in English, which is all that the tagger knows: its "
                "figures mean little (languages: %s)",
                STAGE,
                shortened(corpus.name),
                100 * corpus.language["share_other"],
                ", ".join(f"{code} {count}" for code, count in corpus.language["most"]),
            )
    return [(prepared, account)]


def tell_what_is_replaced(prepared: Run, planned: Plan) -> None:
    """Log it if the report that is there is of other captions, or of these under other names."""
    if planned.others and (prepared.root / HTML_FILE).exists():
        log.info(
            "%s: %s holds a report of other captions or of other names, which this one replaces; to keep both, give "
            "this one a folder of its own (--out)",
            STAGE,
            prepared.root,
        )


def _announce(prepared: Run) -> None:
    """Say which engine counts, and why; what must be compiled is compiled here, for the workers of this machine."""
    stage: Any = prepared.build()
    if stage.engine.approximate:  # the others have said so themselves
        log.info("%s: %s, as `approximate` asks; figures are marked with ~", STAGE, stage.engine.name)


def read_stats(job: Stats) -> list[Corpus]:
    """Return what a finished job found of each set, in the order of the report."""
    return read_findings(location(job.output))
