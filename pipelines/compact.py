"""`pixart compact`: a dataset of many small shards to one of few large ones, in random order.

What goes where is planned first, see `pixart_data.packs`; a unit is a pack, which is one shard to be. The plan stays:
run again after the source has grown, there are further packs, and those of before are not touched.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import Compact
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.ending import Stopped
from pipelines.packs import NULL_UNIT, PLACES, NullCaption, PackStage
from pipelines.worker import Work
from pixart_data.commits import COMMITS, MANIFEST, Record, read_records, read_table
from pixart_data.config import digest
from pixart_data.editions import Excerpt, Original, copy_calibration, find, identity, manifest_sha256, write_edition
from pixart_data.errors import ConfigError, DataError, JobError, PixArtError
from pixart_data.leases import output_lock
from pixart_data.owners import MADE_BY, place, require_run
from pixart_data.packs import (
    TEXT_FOLDER,
    Generation,
    Groups,
    bucket_ranks,
    make_groups,
    plan_generation,
    read_generations,
    require_rows,
    require_same,
    sweep_plans,
)
from pixart_data.ranges import Place
from pixart_data.records import SCHEMA_VERSION
from pixart_data.shards import feature_sets
from pixart_data.storage import exists, list_files, location
from pixart_data.threads import ahead

log = logging.getLogger(__name__)

STAGE = "compact"
_READ_THREADS = 8
_UNITS_EXAMINED = 5

Finish = Callable[[list[Record]], Account]


@dataclass(frozen=True)
class _Layout:
    """A source, which of its rows share a member, and all packs that were planned for it."""

    original: Original
    groups: Groups
    generations: list[Generation]


def plan(job: Compact) -> list[tuple[Run, Plan]]:
    """Return what the job would do, a run for each set; nothing is written."""
    return [(run, make_plan(run)) for run, _ in prepare(job, write=False)]


def run(job: Compact) -> list[tuple[Run, Account]]:
    """Do the job, image sets first.

    Raises:
        DataError: If a member of the source is damaged, after all that can be copied was, or if the source changed.
    """
    return [(prepared, _execute(prepared, job, finish)) for prepared, finish in prepare(job, write=True)]


def _execute(prepared: Run, job: Compact, finish: Finish) -> Account:
    try:
        return execute(prepared, job, finish)
    except Stopped:
        raise
    except JobError:
        damaged = _damaged(prepared)
        if damaged:
            others = f" ({len(damaged) - 1} more like it)" if len(damaged) > 1 else ""
            raise DataError(f"{damaged[0]}{others}; the other packs are done") from None
        raise


def _damaged(prepared: Run) -> list[str]:
    """Return what is wrong with members of the first few packs that are not done, if that is why."""
    with contextlib.suppress(PixArtError):  # what stopped the run is told then
        done = read_records(prepared.root)
        left = [unit for unit in prepared.units if unit.id not in done]
        stage: Any = prepared.build()
        return [line for unit in left[:_UNITS_EXAMINED] for line in stage.damaged(unit)]
    return []


def prepare(job: Compact, write: bool) -> list[tuple[Run, Finish]]:
    """Read the source, plan the packs that are not planned yet, and return a run and its end for each set.

    Args:
        write: Put plans there, so that they stay.

    Raises:
        ConfigError: If the image set to be followed is not in the source.
        DataError: If there is no sealed set, or one lost samples that were compacted.
    """
    sets = {name: Original(root) for name, root in feature_sets(location(job.path)).items()}
    if not sets:
        raise DataError(f"{job.path}: expected a dataset, found no finished feature set; run `pixart extract` first")
    images = [name for name, original in sets.items() if original.manifest.kind == "image"]
    leader = job.image_set or (images[0] if images else None)
    if job.image_set is not None and job.image_set not in images:
        known = ", ".join(images) or "none"
        raise ConfigError(f"image_set: expected an image set of {job.path} ({known}), found {job.image_set!r}")
    ordered = [*images, *(name for name in sets if name not in images)]
    followed = sets[leader] if leader is not None else None
    return [_prepare_set(job, name, sets[name], followed, write) for name in ordered]


def _prepare_set(
    job: Compact, name: str, original: Original, followed: Original | None, write: bool
) -> tuple[Run, Finish]:
    root = location(job.output) / name
    if place(root) == place(original.root):
        raise ConfigError(f"output: expected another folder than the dataset's own, found {job.output}; choose another")
    require_run(root, STAGE)  # before a plan is written there
    if write:
        with output_lock(root):
            layout = _plan(root, original, followed, job.shard_bytes, write)
            sweep_plans(root, layout.generations)
    else:
        layout = _plan(root, original, followed, job.shard_bytes, write)
    features = digest(identity(original.manifest))
    units: list[Work] = [*_null(original), *(pack for generation in layout.generations for pack in generation.packs)]
    folders = {bucket["ratio"] for bucket in original.manifest.buckets} or {TEXT_FOLDER}
    prepared = Run(
        stage=f"{STAGE} {name}",
        root=root,
        units=units,
        settings=lambda unit: {"schema": SCHEMA_VERSION, "features": features, "members": unit.digest},
        build=partial(PackStage, root, original.root),
        cluster=job.cluster,
        swept=[root / PLACES, *(root / folder for folder in sorted(folders))],
        count=lambda unit: int(unit.num_members),
        per_cpu=True,
        judged=False,
        needs_gpu=False,
    )
    return prepared, partial(_finish, root, layout)


def _plan(root: Path, original: Original, followed: Original | None, shard_bytes: int, write: bool) -> _Layout:
    generations = read_generations(root)
    if not generations and (exists(root / MANIFEST) or list_files(root / COMMITS)):
        what = "expected a new folder, or what compact left there, found a feature set of another command"
        raise ConfigError(f"output: {root}: {what}; choose another")
    named = require_same(original, root, generations)
    if exists(root / MANIFEST):
        require_rows(original, Original(root))
    if generations and generations[-1].shard_bytes != shard_bytes:
        log.info("%s: shards of %d bytes, as planned before, stay", root, generations[-1].shard_bytes)
    groups = make_groups(original, named)
    ranks = bucket_ranks(original, followed)
    fresh = plan_generation(root, len(generations), original, groups, ranks, shard_bytes, write)
    return _Layout(original, groups, [*generations, *([fresh] if fresh else [])])


def _null(original: Original) -> list[NullCaption]:
    null = original.manifest.model.get("null")
    if not null:
        return []
    place = Place(null["path"], null["offset_bytes"], null["size_bytes"], null["crc32"])
    return [NullCaption(place, null["num_tokens"])]


def _finish(root: Path, layout: _Layout, records: Sequence[Record]) -> Account:
    """Write the set's tables and its manifest; the rows are those of the source, in its order."""
    original, groups = layout.original, layout.groups
    shards = [file for record in records for file in record.files if file.path.endswith(".tar")]
    number_of = {file.path: number for number, file in enumerate(shards)}
    packs = [record for record in records if record.unit != NULL_UNIT]
    tables = list(ahead(partial(_read_places, root), packs, _READ_THREADS, 4 * _READ_THREADS))
    hashes, offsets, flipped = (
        np.concatenate([np.empty(0, np.uint64), *(table[name].to_numpy() for table in tables)])
        for name in ("hash", "offset_bytes", "flipped_offset_bytes")
    )
    own = [number_of[file.path] for record in packs for file in record.files if file.path in number_of]
    numbers = np.repeat(np.array(own, np.uint32), np.array([table.num_rows for table in tables], np.int64))
    leaders = groups.leader[groups.of[original.places]]  # by row of the index
    at, found = find(hashes, original.entries["key"][leaders])
    if not found.all():
        lost = original.keys([int(np.flatnonzero(~found)[0])])
        raise DataError(f"{root}: sample {lost[0]} is in no pack; compact into a new folder, and please report this")
    excerpt = Excerpt(original, np.ones(len(original), np.bool_), numbers[at], offsets[at], flipped[at])
    manifest = replace(
        original.manifest,
        shards=[asdict(file) for file in shards],
        model={**original.manifest.model, **{k: v for record in records for k, v in record.facts.items()}},
        records={record.unit: digest(asdict(record)) for record in records},
        provenance={**original.manifest.provenance, "compacted_from": manifest_sha256(original), MADE_BY: STAGE},
    )
    copy_calibration(original, root)
    write_edition(root, manifest, [excerpt])
    counts = original.manifest.counts
    return Account(counts["rows_in"], counts["rows_out"], counts["rejected"])


def _read_places(root: Path, record: Record) -> pa.Table:
    [file] = [file for file in record.files if file.path.startswith(f"{PLACES}/")]
    return read_table(root / file.path)
