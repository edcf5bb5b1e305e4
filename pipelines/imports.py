"""`pixart import`: features that other tools wrote, as feature sets that train.

Like those of `extract`, the image set and the text set are runs of their own. Values become what feature sets hold,
fp16 and bf16; where that rounds, it is counted.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipelines.config import Import
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.features import FeatureWriter, read_part, rejected_keys
from pipelines.texts import NULL_UNIT, PLAIN_CODEC, TEXT_SHARDS, NullCaption
from pipelines.worker import Report, Work
from pixart_data.arrivals import (
    CELL_PX,
    NULL_CAPTION,
    Arrival,
    Portion,
    Reader,
    Rounding,
    Unusable,
    stored_moments,
    stored_tokens,
)
from pixart_data.buckets import Bucket, bucket_table, custom_table, size_name
from pixart_data.commits import Record, read_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.models import identity, versions
from pixart_data.mosaics import Mosaics
from pixart_data.records import IMAGE_INDEX, SCHEMA_VERSION, TEXT_INDEX, Reason
from pixart_data.references import References, read_null_caption
from pixart_data.seals import seal
from pixart_data.shards import INDEX_PARTS, MOMENTS, Manifest
from pixart_data.storage import is_remote, location
from pixart_data.tensorfiles import TensorFiles
from pixart_data.units import fingerprint

STAGE = "import"
TOKENS = (("t5", "BF16"),)
_PACKAGES = ("pixart-toolkit", "torch", "numpy", "pyarrow")
_PROBED_UNITS, _PROBED_ROWS = 16, 64

Finish = Callable[[list[Record]], None]


class ImageImport:
    """Posteriors of one unit after another."""

    def __init__(self, root: Path, reader: Reader, resolution_px: int, sizes: Sequence[str] | None) -> None:
        self.root, self.reader, self.resolution_px = root, reader, resolution_px
        self.sizes = None if sizes is None else frozenset(sizes)

    def __call__(self, unit: Portion, report: Report) -> Record:
        """Write the unit's shards and index part and return its record."""
        with FeatureWriter(self.root, unit.id, MOMENTS) as writer:
            rounding = _write(writer, self.reader.images(unit), self._add, report)
            return writer.record(writer.finish(IMAGE_INDEX), {"rounding": asdict(rounding)})

    def retry(self, unit: Portion, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Read the samples again that were rejected for one of `reasons`."""
        keys = rejected_keys(read_part(self.root, record), reasons)
        with FeatureWriter(self.root, unit.id, MOMENTS) as writer:
            rounding = _write(writer, self.reader.images(unit), self._add, report, keys)
            rounding.add(Rounding(**record.facts["rounding"]))
            return writer.record(writer.finish(IMAGE_INDEX, record), {"rounding": asdict(rounding)})

    def _add(self, writer: FeatureWriter, arrival: Arrival) -> Rounding:
        values, rounding = stored_moments(arrival.values)  # type: ignore[arg-type]  # (2, C, h, w)
        bucket = self._bucket(*values.shape[-2:])
        height_px, width_px = arrival.original_px or (bucket.height_px, bucket.width_px)
        row = {
            "key": arrival.key,
            "bucket": bucket.ratio,
            "height_px": bucket.height_px,
            "width_px": bucket.width_px,
            "original_width_px": width_px,
            "original_height_px": height_px,
            "image_ops": "",
        }
        writer.add(bucket.ratio, [values], row)
        return rounding

    def _bucket(self, height: int, width: int) -> Bucket:
        size = f"{height * CELL_PX}x{width * CELL_PX}"
        if self.sizes is not None and size not in self.sizes:
            raise Unusable(Reason.BAD_SHAPE, f"expected a canvas of image.buckets, found {size}")
        try:
            [bucket] = custom_table([size], self.resolution_px)
        except ConfigError as error:
            raise Unusable(Reason.BAD_SHAPE, str(error)) from error
        return bucket


class TextImport:
    """Text features of one unit after another; `null` is the file of the empty caption."""

    def __init__(self, root: Path, reader: Reader, width: int, null: Path | None) -> None:
        self.root, self.reader, self.width, self.null = root, reader, width, null

    def __call__(self, unit: Portion | NullCaption, report: Report) -> Record:
        """Write the unit's shard and index part and return its record."""
        with FeatureWriter(self.root, unit.id, TOKENS) as writer:
            if isinstance(unit, NullCaption):
                return self._null(writer)
            rounding, padded = _write(writer, self.reader.texts(unit), self._add, report), self._padded(writer)
            facts = {"rounding": asdict(rounding), "padded_tokens": padded}
            return writer.record(writer.finish(TEXT_INDEX), facts)

    def retry(self, unit: Portion, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Read the samples again that were rejected for one of `reasons`."""
        keys = rejected_keys(read_part(self.root, record), reasons)
        with FeatureWriter(self.root, unit.id, TOKENS) as writer:
            rounding = _write(writer, self.reader.texts(unit), self._add, report, keys)
            padded = max(self._padded(writer), record.facts["padded_tokens"])
            rounding.add(Rounding(**record.facts["rounding"]))
            facts = {"rounding": asdict(rounding), "padded_tokens": padded}
            return writer.record(writer.finish(TEXT_INDEX, record), facts)

    def _add(self, writer: FeatureWriter, arrival: Arrival) -> Rounding:
        values, rounding = stored_tokens(arrival.values)  # type: ignore[arg-type]  # (n, D)
        if values.shape[1] != self.width:
            raise Unusable(Reason.BAD_SHAPE, f"expected text features of width {self.width}, found {values.shape[1]}")
        row = {"key": arrival.key, "num_tokens": len(values), "caption": arrival.caption, "padded": arrival.num_padded}
        writer.add(TEXT_SHARDS, [values], row)
        return rounding

    @staticmethod
    def _padded(writer: FeatureWriter) -> int:
        return max((row.pop("padded", 0) for row in writer.rows), default=0)

    def _null(self, writer: FeatureWriter) -> Record:
        if self.null is None:
            raise DataError("expected a file of the empty caption, found none")
        values, rounding = stored_tokens(read_null_caption(self.null, self.width))
        writer.add(TEXT_SHARDS, [values], {"key": NULL_UNIT, "num_tokens": len(values)})
        [file] = writer.finish(schema=None)
        place = {name: writer.rows[0][name] for name in ("offset_bytes", "size_bytes", "crc32", "num_tokens")}
        facts = {"rounding": asdict(rounding), "padded_tokens": 0, "null": {"path": file.path, **place}}
        return Record(writer.unit, "", {}, 0, 0, {}, [file], facts=facts)


def _write(
    writer: FeatureWriter,
    arrivals: Iterator[Arrival],
    add: Callable[[FeatureWriter, Arrival], Rounding],
    report: Report,
    keys: Set[str] | None = None,
) -> Rounding:
    """Write what arrives, or the reason why it cannot be; with `keys` only of these."""
    rounding, num_rejected = Rounding(), 0
    for count, arrival in enumerate((a for a in arrivals if keys is None or a.key in keys), 1):
        error, detail = arrival.error, arrival.detail
        if error is None:
            try:
                rounding.add(add(writer, arrival))
            except Unusable as why:
                error, detail = why.reason, why.detail
        if error is not None:
            writer.reject(arrival.key, error, detail)
            num_rejected += 1
        report(count, num_rejected)
    return rounding


def plan(job: Import) -> list[tuple[Run, Plan]]:
    """Return what the job would do, a run for each set."""
    return [(run, make_plan(run)) for run, _ in runs(job)]


def run(job: Import, reasons: Sequence[str] = (), only: Path | None = None) -> list[tuple[Run, Account]]:
    """Do the job, images first.

    Args:
        reasons: Of a finished job, do the rows again that were rejected for these.
        only: Just the feature set in this directory, named as the job names it.
    """
    wanted = [(run, finish) for run, finish in runs(job) if only is None or str(run.root) == str(only)]
    return [(run, execute(run, job, finish, reasons)) for run, finish in wanted]


def open_reader(job: Import) -> Reader:
    """Return the reader of the job's layout.

    Raises:
        ConfigError: If there is no such folder, or it is not on a local disk or mount.
    """
    root, image, text = Path(job.path), job.image, job.text
    if "://" in job.path or not root.is_dir():
        raise ConfigError(f"path: expected a local folder, found {job.path}; check the path, or copy it here first")
    factor = image.scaling_factor if image.scaled else 1.0
    if job.layout == "reference":
        lists, column = tuple(job.lists), text.caption_column or "prompt"
        folders = (image.folder, text.folder)
        return References(
            root, lists, *folders, column, image.resolution_px, image.channels, text.width, job.rows_per_unit
        )
    if job.layout == "mds":
        columns = (image.column, text.column, text.caption_column or "caption")
        return Mosaics(
            root, *columns, image.resolution_px, image.channels, text.width, factor, bytes_dtype=job.bytes_dtype
        )
    folders = (image.folder or "", text.folder or "")
    return TensorFiles(root, *folders, image.channels, text.width, factor, job.rows_per_unit)


@dataclass(frozen=True)
class _Common:
    """What both runs of a job share."""

    job: Import
    reader: Reader
    portions: list[Portion]

    def run(self, name: str, decided: dict[str, Any], **more: Any) -> Run:
        root = location(self.job.output) / name
        decided = {"schema": SCHEMA_VERSION, "layout": self.job.layout, **decided}
        return Run(
            stage=f"{STAGE} {name}",
            root=root,
            settings=lambda unit: {**decided, "shard": unit.fingerprint},
            cluster=self.job.cluster,
            count=lambda unit: unit.num_rows if isinstance(unit, Portion) else 0,
            per_cpu=True,
            needs_gpu=False,
            **{"units": self.portions, **more},
        )


def runs(job: Import) -> list[tuple[Run, Finish]]:
    """Return the runs of a job, images first, and what seals each.

    Raises:
        ConfigError: If the layout is not as the job says, or there is nothing in it.
        DataError: If its lists or its index cannot be read.
    """
    reader = open_reader(job)
    portions = reader.portions()
    if not portions:
        raise ConfigError(f"path: expected samples in {job.path}, found none; check the path")
    common = _Common(job, reader, portions)
    return [_image_run(common), _text_run(common)]


def _image_run(common: _Common) -> tuple[Run, Finish]:
    job, config = common.job, common.job.image
    root = location(job.output) / config.set_name
    model = identity("image.model", config.model, None, config.subfolder)
    files = config.model_dump(exclude={"set", "model", "subfolder"}) | {"bytes_dtype": job.bytes_dtype}
    folders = {bucket.ratio for bucket in bucket_table(config.resolution_px)}
    if not is_remote(root):
        folders |= {path.name for path in root.glob("*.[0-9][0-9]") if path.is_dir()}
    run = common.run(
        config.set_name,
        {"image": {"model": model, **files}},
        build=partial(ImageImport, root, common.reader, config.resolution_px, config.buckets),
        swept=[root / INDEX_PARTS, *(root / name for name in sorted(folders))],
    )
    facts = {
        "id": config.model,
        "subfolder": config.subfolder,
        "revision": None,
        "identity": model,
        "dtype": "unknown, imported",
        "scaling_factor": config.scaling_factor,
        "shift_factor": 0.0,
        "channels": config.channels,
        "downsampling": CELL_PX,
    }
    return run, partial(_seal_images, root, job, facts)


def _text_run(common: _Common) -> tuple[Run, Finish]:
    job, config = common.job, common.job.text
    root = location(job.output) / config.set
    width = config.width or _probed_width(common)
    null = Path(config.null_caption) if config.null_caption else Path(job.path) / NULL_CAPTION
    if config.null_caption and not null.is_file():
        raise ConfigError(f"text.null_caption: expected a file, found no {null}; check the path, or leave it out")
    units: list[Work] = [*common.portions]
    if null.is_file():
        units.insert(0, NullCaption(fingerprint=fingerprint(str(null))))
    model = identity("text.model", config.model, None, config.subfolder)
    tokenizer = identity("text.model", config.model, None, config.tokenizer_subfolder)
    files = config.model_dump(include={"folder", "column", "caption_column"}) | {"bytes_dtype": job.bytes_dtype}
    run = common.run(
        config.set,
        {"text": {"model": model, "tokenizer": tokenizer, "width": width, **files}},
        units=units,
        build=partial(TextImport, root, common.reader, width, null if null.is_file() else None),
        swept=[root / INDEX_PARTS, root / TEXT_SHARDS],
    )
    facts = {
        "id": config.model,
        "subfolder": config.subfolder,
        "tokenizer_subfolder": config.tokenizer_subfolder,
        "revision": None,
        "identity": model,
        "dtype": "unknown, imported",
        "width": width,
    }
    return run, partial(_seal_texts, root, job, facts)


def _probed_width(common: _Common) -> int:
    """Return the width of the first features that can be read."""
    why = "there are no rows"
    for portion in common.portions[:_PROBED_UNITS]:
        for arrival in itertools.islice(common.reader.texts(portion), _PROBED_ROWS):
            if arrival.values is not None:
                return int(arrival.values.shape[1])
            why = arrival.detail
    raise DataError(
        f"{common.job.path}: expected text features, found none that can be read in the first units, the last because: "
        f"{why}; check text.folder or text.column, or set text.width to import the images alone"
    )


def _seal_images(root: Path, job: Import, model: dict[str, Any], records: list[Record]) -> None:
    policy = {
        "resolution_px": job.image.resolution_px,
        "bucket": "as imported",
        "resize": "as imported",
        "colour": "as imported",
    }
    table = [asdict(bucket) for bucket in _table(root, job, records)]
    manifest = Manifest("image", "moments", "F16", model, policy, asdict(Account.of(records)), buckets=table)
    seal(root, records, IMAGE_INDEX, replace(manifest, provenance=_provenance(job, records)))


def _seal_texts(root: Path, job: Import, model: dict[str, Any], records: list[Record]) -> None:
    policy = {
        "cleaning": "whitespace-1",  # of prompts when sampling; what the other tool did to captions is not known
        "max_tokens": max((record.facts["padded_tokens"] for record in records), default=0) or 1,
        "padding": "none stored",
    }
    for record in records:
        model = {**model, **({"null": record.facts["null"]} if "null" in record.facts else {})}
    counts, codec = asdict(Account.of(records)), {"name": PLAIN_CODEC}
    manifest = Manifest("text", "t5", "BF16", model, policy, counts, codec=codec)
    seal(root, records, TEXT_INDEX, replace(manifest, provenance=_provenance(job, records)))


def _provenance(job: Import, records: list[Record]) -> dict[str, Any]:
    """Return the layout, what rounding cost over all units, and versions."""
    rounding = Rounding()
    for record in records:
        rounding.add(Rounding(**record.facts["rounding"]))
    return {"imported": {"layout": job.layout, "rounding": asdict(rounding)}, **versions(*_PACKAGES)}


def _table(root: Path, job: Import, records: list[Record]) -> tuple[Bucket, ...]:
    """Return the table of the job, else the reference's if it has every canvas that was found, else those found.

    Raises:
        DataError: If two canvases would share a folder.
    """
    if job.image.buckets is not None:
        return custom_table(job.image.buckets, job.image.resolution_px)
    found: set[Bucket] = set()
    for record in records:
        [part] = [file.path for file in record.files if file.path.startswith(f"{INDEX_PARTS}/")]
        rows = read_table(root / part, columns=["bucket", "height_px", "width_px", "error"])
        rows = rows.filter(pc.is_null(rows["error"])).drop(["error"])
        found |= {Bucket(*row.values()) for row in rows.group_by(rows.schema.names).aggregate([]).to_pylist()}
    standard = bucket_table(job.image.resolution_px)
    if found <= set(standard):
        return standard
    try:
        return custom_table(sorted(map(size_name, found)), job.image.resolution_px)
    except ConfigError as error:
        raise DataError(
            f"{root}: {error}; import again with --set 'image.buckets=[\"HEIGHTxWIDTH\", ...]', which rejects the rest"
        ) from error
