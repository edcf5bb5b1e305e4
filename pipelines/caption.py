"""`pixart caption`: source shards to a Parquet table of captions, one part for each shard."""

import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.config import Caption
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.pictures import Picture, read_pictures
from pipelines.pool import Report
from pixart_data.captions import seal_captions
from pixart_data.commits import Record, publish_table
from pixart_data.models import identity, require_kind
from pixart_data.records import CAPTIONS, SCHEMA_VERSION, Reason
from pixart_data.sources import Unit, count_rows, find_units

STAGE = "caption"
PARTS = "parts"
_ANY_MODEL = "."


class CaptionStage:
    """Captions one unit after another with one loaded model."""

    def __init__(self, job: Caption) -> None:
        from pixart_data.captioner import Captioner

        self.job = job
        self.captioner = Captioner(job.captioner)

    def __call__(self, unit: Unit, report: Report) -> Record:
        """Write the unit's part of the table and return its record."""
        root = Path(self.job.output)
        config = self.job.captioner
        pictures = read_pictures(unit, self.job.source, config.batch_size, config.min_side_px)
        self.captioner.seed(zlib.crc32(f"{config.seed}/{unit.id}".encode()))
        rows: list[dict[str, Any]] = []
        rejected: Counter[str] = Counter()
        for row in self._rows(pictures):
            rows.append(row)
            rejected.update(() if row["error"] is None else (row["error"],))
            report(len(rows), rejected.total())
        file = publish_table(pa.Table.from_pylist(rows, schema=CAPTIONS), root, root / PARTS, unit.id)
        rows_out = len(rows) - rejected.total()
        return Record(unit.id, "", {}, len(rows), rows_out, dict(rejected), [file], facts=self.captioner.facts)

    def _rows(self, pictures: Iterator[Picture]) -> Iterator[dict[str, Any]]:
        """Caption in batches of good pictures and yield rows in the order of the source."""
        held: list[Picture] = []
        num_good = 0
        for picture in pictures:
            held.append(picture)
            num_good += picture.error is None
            if num_good == self.job.captioner.batch_size:
                yield from self._batch(held)
                held, num_good = [], 0
        yield from self._batch(held)

    def _batch(self, held: list[Picture]) -> Iterator[dict[str, Any]]:
        good = [picture for picture in held if picture.error is None]
        answers: Iterator[Any] = iter(())
        if good:
            images = [picture.decoded.image for picture in good if picture.decoded]
            batch: dict[str, list[Any]] = {"image": images, "raw_caption": [picture.sample.caption for picture in good]}
            answers = iter(self.captioner(batch)["answer"])
        for picture in held:
            yield self._row(picture, next(answers) if picture.error is None else None)

    def _row(self, picture: Picture, answer: Any) -> dict[str, Any]:
        error, detail = picture.error, picture.detail
        if answer is not None and not answer.text:
            error, detail = Reason.EMPTY_CAPTION, f"the model answered nothing ({answer.finish_reason})"
        row: dict[str, Any] = {
            "key": picture.sample.key,
            "raw_caption": picture.sample.caption,
            "model": self.job.captioner.model,
            "status": "ok" if error is None else "rejected",
            "error": None if error is None else str(error),
            "detail": detail or None,
        }
        if picture.decoded is not None:
            row |= {
                "width_px": picture.decoded.width_px,
                "height_px": picture.decoded.height_px,
                "image_ops": picture.decoded.ops,
            }
        if answer is not None:
            row |= {
                "caption": answer.text or None,
                "prompt": answer.prompt,
                "finish_reason": answer.finish_reason,
                "num_prompt_tokens": answer.num_prompt_tokens,
                "num_tokens": answer.num_tokens,
            }
        return row


def prepare(job: Caption) -> Run:
    """Find the units of a job and what decides their results."""
    captioner = job.captioner.model_dump(exclude={"model", "revision", "batch_size", "device"})
    source = job.source.model_dump(include={"layout", "path_column", "caption_column", "max_image_pixels"})
    require_kind("captioner.model", job.captioner.model, None, _ANY_MODEL)
    model = identity("captioner.model", job.captioner.model, job.captioner.revision, None)
    decided = {"schema": SCHEMA_VERSION, "captioner": {**captioner, "model": model}, "source": source}
    root = Path(job.output)
    return Run(
        stage=STAGE,
        root=root,
        units=find_units(job.source),
        settings=lambda unit: {**decided, "shard": unit.fingerprint},
        build=partial(CaptionStage, job),
        cluster=job.cluster,
        swept=[root / PARTS],
        count=count_rows,
    )


def plan(job: Caption) -> list[tuple[Run, Plan]]:
    """Return what the job would do."""
    run = prepare(job)
    return [(run, make_plan(run))]


def run(job: Caption) -> list[tuple[Run, Account]]:
    """Do the job."""
    prepared = prepare(job)
    return [(prepared, execute(prepared, job, partial(seal_captions, prepared.root)))]
