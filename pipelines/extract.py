"""`pixart extract`: images to VAE posteriors and captions to T5 features, as feature sets joined by key.

The sets are separate runs with records of their own, so that another resolution or other captions cost only themselves.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.config import Extract
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.images import ImageStage
from pipelines.texts import CALIBRATION, NULL_UNIT, PLAIN_CODEC, TEXT_SHARDS, Calibration, NullCaption, TextStage
from pipelines.worker import Work
from pixart_data.buckets import bucket_table, size_name
from pixart_data.canvases import preparation
from pixart_data.captions import CaptionFile, caption_files, count_captions, require_columns
from pixart_data.commits import Record
from pixart_data.config import digest
from pixart_data.entries import ENTRIES, entry_type, require_whole
from pixart_data.errors import ConfigError, DataError
from pixart_data.models import identity, require_kind, versions
from pixart_data.records import IMAGE_INDEX, SCHEMA_VERSION, TEXT_INDEX
from pixart_data.seals import seal
from pixart_data.sections import ImageFeatures, Source, TextFeatures
from pixart_data.shards import INDEX_PARTS, Manifest
from pixart_data.sources import Unit, count_rows, find_units
from pixart_data.storage import is_remote, local_copy, location

log = logging.getLogger(__name__)

STAGE = "extract"
_KEYS_AT_ONCE = 1 << 16
_OF_CODEC = ("codec", "measured")  # facts that are not of the model
_PACKAGES = ("pixart-toolkit", "torch", "transformers", "diffusers", "pillow", "numpy", "pyarrow")

Finish = Callable[[list[Record]], None]


def plan(job: Extract) -> list[tuple[Run, Plan]]:
    """Return what the job would do, a run for each set."""
    return [(run, make_plan(run)) for run, _ in list(_runs(job))]


def run(job: Extract, reasons: Sequence[str] = (), only: Path | None = None) -> list[tuple[Run, Account]]:
    """Do the job, images first.

    Args:
        reasons: Of a finished job, do the rows again that were rejected for these.
        only: Just the feature set in this directory, named as the job names it.
    """
    runs = list(_runs(job))  # all of them: a mistake in [text] is not to be found after days of [image]
    wanted = [(run, finish) for run, finish in runs if only is None or str(run.root) == str(only)]
    return [(run, execute(run, job, finish, reasons)) for run, finish in wanted]


def match_line(root: Path, image_set: str, text_set: str) -> str:
    """Say how many samples of two finished sets training will find in both.

    Raises:
        DataError: If an index is damaged.
    """
    images, texts = _sorted_keys(root / image_set, "image"), _sorted_keys(root / text_set, "text")
    both = 0
    for start in range(0, len(images), _KEYS_AT_ONCE):
        some = images[start : start + _KEYS_AT_ONCE]
        both += int((np.searchsorted(texts, some, "right") - np.searchsorted(texts, some)).sum())
    alone = f"{len(images) - both:,} images have no text, {len(texts) - both:,} texts no image"
    return f"{both:,} samples to train on: {alone}"


def _sorted_keys(root: Path, kind: str) -> npt.NDArray[np.uint64]:
    """Return the hashes of a set's keys, by which training joins too; 8 bytes for each, read piece by piece."""
    dtype = entry_type(kind)
    with local_copy(root / ENTRIES) as copy, copy.open("rb") as file:
        keys, end = np.empty(copy.stat().st_size // dtype.itemsize, np.uint64), 0
        while len(records := np.fromfile(file, dtype, _KEYS_AT_ONCE)):
            require_whole(records, root / ENTRIES)
            start, end = end, end + len(records)
            keys[start:end] = records["key"]
    keys.sort()
    return keys


def _runs(job: Extract) -> Iterator[tuple[Run, Finish]]:
    if job.image is not None and job.source is not None:
        yield _image_run(job, job.source, job.image)
    if job.text is not None:
        for name, column in job.text_columns.items():
            yield _text_run(job, job.text.model_copy(update={"set": name}), column)


def _image_run(job: Extract, source: Source, config: ImageFeatures) -> tuple[Run, Finish]:
    root = location(job.output) / config.set_name
    require_kind("image.model", config.model, config.subfolder, "Autoencoder")
    decided = {
        "schema": SCHEMA_VERSION,
        "image": {
            "model": identity("image.model", config.model, config.revision, config.subfolder),
            "resolution_px": config.resolution_px,
            "preparation": preparation(),
            "dtype": config.dtype,
            # Only what is set: sets made before these keys were there are not redone.
            **({"buckets": [size_name(bucket) for bucket in config.table]} if config.buckets else {}),
            **({"flips": True} if config.flips else {}),
        },
        "source": source.model_dump(include={"layout", "path_column", "max_image_pixels"}),
    }
    run = Run(
        stage=f"{STAGE} {config.set_name}",
        root=root,
        units=find_units(source),
        settings=lambda unit: {**decided, "shard": unit.fingerprint},
        build=partial(ImageStage, root, source, config, preparation()),
        cluster=job.cluster,
        swept=[root / INDEX_PARTS, *_bucket_folders(root, config)],
        count=count_rows,
        units_per_worker=2,
    )
    return run, partial(_seal_images, root, config)


def _bucket_folders(root: Path, config: ImageFeatures) -> list[Path]:
    """Name the folders that can hold shards: of the table, of the reference's, and of any table used before."""
    names = {bucket.ratio for bucket in (*config.table, *bucket_table(config.resolution_px))}
    if not is_remote(root):
        names |= {path.name for path in root.glob("*.[0-9][0-9]") if path.is_dir()}
    return [root / name for name in sorted(names)]


def _text_run(job: Extract, config: TextFeatures, column: str) -> tuple[Run, Finish]:
    root = location(job.output) / config.set
    require_kind("text.model", config.model, config.subfolder, "t5")
    decided: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "text": {
            "model": identity("text.model", config.model, config.revision, config.subfolder),
            "tokenizer": identity("text.model", config.model, config.revision, config.tokenizer_subfolder),
            "max_tokens": config.max_tokens,
            "cleaning": config.cleaning,
            "dtype": config.dtype,
            **({"codec": config.codec} if config.codec != PLAIN_CODEC else {}),
        },
    }
    units: list[Work] = [NullCaption()]
    if job.captions is not None:
        files = caption_files(location(job.captions.path), "captions.path")
        setting = f"captions.more.{config.set}" if config.set in job.captions.more else "captions.column"
        require_columns(files, setting, column, need_key=True)
        units += files
        decided["captions"] = {"column": column}
    elif job.source is not None:
        units += find_units(job.source)
        decided["source"] = job.source.model_dump(include={"layout", "path_column", "caption_column"})
    else:
        raise ConfigError("captions: required for [text] without [source], and missing; add [captions] with path = ...")
    calibration = CALIBRATION.replace(".", f"-{digest(decided)[:8]}.")  # another model's is not this one's
    run = Run(
        stage=f"{STAGE} {config.set}",
        root=root,
        units=units,
        settings=lambda unit: {**decided, "shard": unit.fingerprint},
        build=partial(TextStage, root, job.source, column, config, Calibration(calibration, units[1:17])),
        cluster=job.cluster,
        swept=[root / INDEX_PARTS, root / TEXT_SHARDS],
        count=_count_texts,
        units_per_worker=2,
        judged=job.text is None or config.set == job.text.set,  # not every image has a caption of each kind
    )
    return run, partial(_seal_texts, root, config)


def _count_texts(unit: Unit | CaptionFile | NullCaption) -> int:
    if isinstance(unit, NullCaption):
        return 0
    return count_captions(unit) if isinstance(unit, CaptionFile) else count_rows(unit)


def _seal_images(root: Path, config: ImageFeatures, records: list[Record]) -> None:
    policy = {
        "resolution_px": config.resolution_px,
        "bucket": "nearest in log(height / width)",
        "resize": "cover, then centre crop",
        "preparation": preparation(),
        "colour": "EXIF rotation, ICC to sRGB, alpha over white, 8-bit RGB",
    }
    table = [asdict(bucket) for bucket in config.table]
    manifest = Manifest("image", "moments", "F16", _model(root, records), policy, _counts(records), buckets=table)
    seal(root, records, IMAGE_INDEX, replace(manifest, provenance=versions(*_PACKAGES)))


def _seal_texts(root: Path, config: TextFeatures, records: list[Record]) -> None:
    policy = {"cleaning": config.cleaning, "max_tokens": config.max_tokens, "padding": "none stored"}
    manifest = Manifest("text", "t5", "BF16", _model(root, records), policy, _counts(records), codec=_codec(records))
    seal(root, records, TEXT_INDEX, replace(manifest, provenance=versions(*_PACKAGES)))


def _codec(records: list[Record]) -> dict[str, Any]:
    """Join what the units say of the codec, and how exact it was.

    Raises:
        DataError: If units were calibrated differently: their calibration was lost and made anew.
    """
    found: dict[str, dict[str, Any]] = {r.unit: r.facts.get("codec", {"name": PLAIN_CODEC}) for r in records}
    for unit, codec in found.items():
        if codec != found[NULL_UNIT]:
            raise DataError(
                f"commits/{unit}.json: expected a codec calibrated as {found[NULL_UNIT]}, found {codec}; delete this "
                f"record and that of {NULL_UNIT} and extract again"
            )
    measured = [record.facts["measured"] for record in records if "measured" in record.facts]
    if not measured:
        return found[NULL_UNIT]
    from pixart_data.codecs import merge

    return {**found[NULL_UNIT], "measured": merge(measured)}


def _model(root: Path, records: list[Record]) -> dict[str, Any]:
    """Join what the units say of the model; they can disagree when a branch on the hub moved under a long run."""
    model: dict[str, Any] = {}
    for record in records:
        for name, value in record.facts.items():
            if name not in _OF_CODEC and model.setdefault(name, value) != value:
                log.warning("%s: %s differs between shards, %s and %s: pin a revision", root, name, model[name], value)
    return model


def _counts(records: list[Record]) -> dict[str, Any]:
    return asdict(Account.of(records))
