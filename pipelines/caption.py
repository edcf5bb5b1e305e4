"""`pixart caption`: source shards to a Parquet table of captions, one part for each shard."""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipelines.config import Caption
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.engine import Engine
from pipelines.gate import Gatekeeper, find_judge, is_no_attempt, lacks, with_gate
from pipelines.pictures import Picture, read_pictures
from pipelines.worker import Report
from pixart_data import events
from pixart_data.captions import seal_captions
from pixart_data.commits import Record, publish_table, read_table
from pixart_data.models import identity, require_kind
from pixart_data.questions import MAIN, Answers, NoCaption, columns
from pixart_data.records import SCHEMA_VERSION, Reason, captions_schema
from pixart_data.sections import Captioner
from pixart_data.sources import Unit, count_rows, find_units
from pixart_data.storage import location
from pixart_data.threads import ahead
from pixart_data.verdicts import GATE, Verdicts

if TYPE_CHECKING:
    from pixart_data.images import Decoded

STAGE = "caption"
PARTS = "parts"
_ANY_MODEL = "."
_UNDECIDING = {"model", "revision", "batch_size", "device", "server"}  # of the results
_SENT = {"max_side_px", "jpeg_quality"}  # what of a server's settings decides them

log = logging.getLogger(__name__)

Row = dict[str, Any]
T = TypeVar("T")


class CaptionStage:
    """Captions one unit after another, with one loaded model or by asking servers.

    Args:
        tagger: The engine that captions are judged with where the job was planned; None: any.
    """

    def __init__(self, job: Caption, tagger: str | None = None) -> None:
        self.job, self.root = job, location(job.output)
        self.more = list(job.captioner.questions)[1:]
        self.gate = None if job.gate is None else Gatekeeper(job.gate, job.captioner, tagger)
        if job.captioner.server is None:
            from pixart_data.captioner import Captioner

            self.captioner: Any = Captioner(job.captioner)
            self.describe: Any = Engine(self.captioner)
        else:
            from pixart_data.servers import ServedCaptioner

            self.captioner = self.describe = ServedCaptioner(job.captioner)

    def __call__(self, unit: Unit, report: Report) -> Record:
        """Write the unit's part of the table and return its record."""
        rows: list[Row] = []
        num_rejected = 0
        for row in self._rows(unit, None):
            rows.append(row)
            num_rejected += row["error"] is not None
            report(len(rows), num_rejected)
        return self._end(unit, rows)

    def retry(self, unit: Unit, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Describe the images again that were rejected for one of `reasons`, and write the part anew."""
        rows: list[Row] = read_table(self.root / record.files[0].path).to_pylist()
        again = {row["key"]: row for row in rows if row["error"] in reasons}
        num_rejected = 0
        for count, row in enumerate(self._rows(unit, again.keys()), 1):
            again[row["key"]] = row
            num_rejected += row["error"] is not None
            report(count, num_rejected)
        return self._end(unit, [again.get(row["key"], row) for row in rows], record)

    def amend(self, unit: Unit, record: Record, report: Report) -> Record:
        """Judge the captions of a part that are there, have those asked for again that fail, and write it anew."""
        rows: list[Row] = read_table(self.root / record.files[0].path).to_pylist()
        report(len(rows), sum(record.rejected.values()))
        return self._end(unit, rows, record)

    def _end(self, unit: Unit, rows: list[Row], before: Record | None = None) -> Record:
        """Put the rows through the gate, write the part and return its record; `before` is the one it replaces."""
        table, judged = self._judged(unit, rows, {} if before is None else before.facts.get(GATE, {}))
        file = publish_table(table, self.root, self.root / PARTS, unit.id)
        rejected = Counter(row["error"] for row in rows if row["error"] is not None)
        rows_out = len(rows) - rejected.total()
        facts = {**self.captioner.facts}
        if self.more:
            facts["missing"] = {name: _tally(rows, name) for name in self.more}
        return Record(unit.id, "", {}, len(rows), rows_out, dict(rejected), [file], facts=facts | judged)

    def _judged(self, unit: Unit, rows: list[Row], before: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        """Judge rows and have those asked for again that fail; return their table, and the gate's facts."""
        schema = captions_schema(self.more)
        if self.gate is None:
            return pa.Table.from_pylist(rows, schema=schema), {GATE: before} if before else {}
        self.gate.judge(rows)
        due = {row["key"]: row for row in rows if self.gate.is_due(row)}
        unanswered = Counter[str]()
        for missed in self._answered(unit, due.keys(), partial(self._again, unit, due)) if due else ():
            unanswered.update(missed)
            events.beat()
        table = pa.Table.from_pylist(rows, schema=schema.with_metadata({GATE: self.gate.tagger}))
        return table, self.gate.facts(rows, unanswered, before)

    def _rows(self, unit: Unit, keys: Any) -> Iterator[Row]:
        """Yield the rows of a unit in the order of the source, all of them or those with `keys`."""
        for rows in self._answered(unit, keys, partial(self._batch, unit)):
            yield from rows

    def _answered(self, unit: Unit, keys: Any, answer: Callable[[list[Picture]], T]) -> Iterator[T]:
        """Yield what `answer` makes of each batch of a unit's pictures, in the order of the source."""
        config, captioner = self.job.captioner, self.captioner
        num_ahead = max(captioner.batch_size, captioner.num_batches // 2)
        pictures = read_pictures(
            unit, self.job.source, num_ahead, config.min_side_px, then=self._prepare, keys=keys
        )  # no decoded picture is kept in memory but those that the engine itself keeps
        batches = _batches(pictures, captioner.batch_size)
        if captioner.num_batches == 1:
            return map(answer, batches)
        return ahead(answer, batches, captioner.num_batches, 2 * captioner.num_batches)

    def _prepare(self, decoded: "Decoded") -> tuple[Any, Row]:
        """Return what the engine makes of a picture, and what the row says of it; done beside the model."""
        facts = {"width_px": decoded.width_px, "height_px": decoded.height_px, "image_ops": decoded.ops}
        return self.captioner.prepare(decoded.image), facts

    def _batch(self, unit: Unit, held: list[Picture]) -> list[Row]:
        good = [picture for picture in held if picture.error is None]
        answers: Iterator[Answers] = iter(())
        if good:
            batch: dict[str, list[Any]] = {
                "image": [picture.placed[0] for picture in good],
                "raw_caption": [picture.sample.caption for picture in good],
                "seed": [_seed(self.job.captioner.seed, unit.id, picture.sample.key) for picture in good],
            }
            answers = iter(self.describe(batch)["answers"])
        return [self._row(picture, next(answers) if picture.error is None else {}) for picture in held]

    def _again(self, unit: Unit, due: dict[str, Row], held: list[Picture]) -> Counter[str]:
        """Ask for captions that failed until they pass or have no attempts left; count what got no answer, by reason.

        What is asked and drawn depends on a row and its attempts alone, so that a unit ends up with the same captions
        whether it is judged at once or long after, and however often that is taken up. An image that cannot be read
        any more keeps the caption that it has. One that a server fails on is left to another run: the engine itself
        has tried again.
        """
        gate, left = self.gate, [picture for picture in held if picture.error is None]
        unanswered = Counter[str]()
        while left and gate is not None:
            asked = [due[picture.sample.key] for picture in left]
            batch: dict[str, list[Any]] = {
                "image": [picture.placed[0] for picture in left],
                "raw_caption": [picture.sample.caption for picture in left],
                "seed": [
                    _seed(self.job.captioner.seed, unit.id, f"{row['key']}/{row['num_attempts']}") for row in asked
                ],
                "decoding": [gate.decoding(row) for row in asked],
            }
            answers = [found[MAIN] for found in self.describe(batch)["answers"]]
            unanswered += gate.weigh(asked, answers)
            came = [picture for picture, answer in zip(left, answers, strict=True) if not is_no_attempt(answer)]
            left = [picture for picture in came if gate.is_due(due[picture.sample.key])]
        return unanswered

    def _row(self, picture: Picture, answers: Answers) -> Row:
        main = answers.get(MAIN)
        error, detail = picture.error, picture.detail
        if isinstance(main, NoCaption):
            error, detail = main.reason, main.detail
        elif main is not None and not main.text:
            error, detail = Reason.EMPTY_CAPTION, f"the model answered nothing ({main.finish_reason})"
        row: Row = {
            "key": picture.sample.key,
            "raw_caption": picture.sample.caption,
            "model": self.job.captioner.model,
            "status": "ok" if error is None else "rejected",
            "prompt": main.prompt if main else None,
            **(picture.placed[1] if picture.placed else {}),
        }
        for name, answer in answers.items():
            row |= columns(name, answer)
        return row | {"error": None if error is None else str(error), "detail": detail or None}


def _batches(pictures: Iterator[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Yield runs of pictures with `batch_size` good ones in each, and bad ones wherever they come."""
    held: list[Picture] = []
    num_good = 0
    for picture in pictures:
        held.append(picture)
        num_good += picture.error is None
        if num_good == batch_size:
            yield held
            held, num_good = [], 0
    if held:
        yield held


def _tally(rows: list[Row], name: str) -> dict[str, int]:
    """Count the images without a further caption, by reason; those that were never asked about are in the account."""
    return dict(sorted(Counter(filter(None, (row.get(f"error{name.removeprefix(MAIN)}") for row in rows))).items()))


def _seed(seed: int, unit: str, key: str) -> int:
    return zlib.crc32(f"{seed}/{unit}/{key}".encode())


def prepare(job: Caption, reasons: Sequence[str] = ()) -> Run:
    """Find the units of a job and what decides their results.

    Args:
        reasons: Only rows that were rejected for these are to be done again.

    Raises:
        ConfigError: If there are no units, or the data that captions are judged with is missing here.
    """
    tagger = None if job.gate is None else find_judge(job.gate)
    source = job.source.model_dump(include={"layout", "path_column", "caption_column", "max_image_pixels"})
    decided = {"schema": SCHEMA_VERSION, "captioner": _decided(job.captioner), "source": source}
    root = location(job.output)
    return Run(
        stage=STAGE,
        root=root,
        units=find_units(job.source),
        settings=lambda unit: {**decided, "shard": unit.fingerprint},
        build=partial(CaptionStage, job, tagger),
        cluster=job.cluster,
        swept=[root / PARTS],
        count=count_rows,
        units_per_worker=2,
        needs_gpu=job.captioner.server is None,
        lacks=partial(lacks, job.gate, tagger, not reasons),
    )


def _decided(captioner: Captioner) -> dict[str, Any]:
    """Return what of the section decides the captions: not where the model runs.

    How many it describes at once does where it draws, since a batch draws as one.
    """
    draws = captioner.temperature > 0 and captioner.server is None
    decided = captioner.model_dump(exclude=_UNDECIDING - {"batch_size"} if draws else _UNDECIDING)
    if not captioner.prompts:  # as it was before there were any
        del decided["prompts"]
    if captioner.server is not None:
        del decided["dtype"]  # the server's own
        served = f"served:{captioner.model}@{captioner.revision or ''}"
        return {**decided, "model": served, "server": captioner.server.model_dump(include=_SENT)}
    require_kind("captioner.model", captioner.model, None, _ANY_MODEL)
    return {**decided, "model": identity("captioner.model", captioner.model, captioner.revision, None)}


def plan(job: Caption) -> list[tuple[Run, Plan]]:
    """Return what the job would do."""
    run = prepare(with_gate(job))
    return [(run, make_plan(run))]


def run(job: Caption, reasons: Sequence[str] = ()) -> list[tuple[Run, Account]]:
    """Do the job; with `reasons`, do the rows of a finished one again that were rejected for these."""
    job = with_gate(job)
    prepared = prepare(job, reasons)
    return [(prepared, execute(prepared, job, partial(_finish, prepared.root), reasons))]


def _finish(root: Path, records: list[Record]) -> Account:
    """Say which further captions are missing, for no rejected row does, seal the table, and add the gate's account."""
    missing: dict[str, Counter[str]] = {}
    for record in records:
        for name, reasons in record.facts.get("missing", {}).items():
            missing.setdefault(name, Counter()).update(reasons)
    for name, reasons in missing.items():
        found = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items())) or "none"
        log.info("%s: %s: images without it, beside those rejected: %s", STAGE, name, found)
    seal_captions(root, records)
    return replace(Account.of(records), remark=Verdicts.in_records(records).line())
