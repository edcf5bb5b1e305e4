"""`pixart import` and `pixart export`: features from and to the layouts of other tools."""

import logging
import time
from pathlib import Path

from jobs.config import Export
from pipelines import imports
from pipelines.config import Import
from pipelines.extract import match_line
from pixart_data.errors import ConfigError
from pixart_data.exports import export, require_own
from pixart_data.leases import output_lock
from pixart_data.pairs import Pairs
from pixart_data.shards import feature_sets, read_manifest
from pixart_data.storage import location

log = logging.getLogger(__name__)

_SAY_EVERY_S = 5.0


def import_features(job: Import, dry_run: bool) -> None:
    """Make feature sets of what another tool wrote, or print what that would do."""
    if dry_run:
        for run, plan in imports.plan(job):
            print(*plan.lines(run), sep="\n")
        return
    for run, account in imports.run(job):
        print(f"{run.stage}: {account.line()} -> {run.root}")
        print(f"{run.stage}: {rounding_line(run.root)}")
    print(f"import: {match_line(location(job.output), job.image.set_name, job.text.set)} -> {job.output}")


def rounding_line(root: Path) -> str:
    """Say whether the stored values are those that were found."""
    manifest = read_manifest(root)
    rounding = manifest.provenance["imported"]["rounding"]
    if not rounding["values"]:
        return f"every value is kept exactly, as {manifest.dtype}"
    return (
        f"stored as {manifest.dtype}, which rounded {rounding['values']:,} values of {rounding['samples']:,} samples, "
        f"by {rounding['max_error']:.2g} at most"
    )


def export_features(job: Export, dry_run: bool) -> None:
    """Write a dataset in another tool's layout, or print what that would do.

    Raises:
        ConfigError: If there is no such set, or the output holds something else.
        DataError: If a sample is damaged, or the layout cannot hold the dataset.
        JobError: If the storage fails, or another export is writing there.
    """
    out = Path(job.output)
    if "://" in job.output:
        raise ConfigError(f"output: expected a local folder, found {job.output}; export to a disk, then copy it there")
    pairs = Pairs(_set(job, "image_set"), _set(job, "text_set"))
    try:
        if dry_run:
            require_own(out)
            print(f"export: would write {len(pairs):,} samples, as {job.layout} -> {out}")
            return
        require_own(out)
        with output_lock(out) as lease:
            started_s = said_s = time.monotonic()
            first = None
            for done in export(pairs, job.layout, out):
                lease.check()
                first = done if first is None else first
                now_s = time.monotonic()
                if now_s - said_s > _SAY_EVERY_S:
                    said_s, rate = now_s, (done - first) / (now_s - started_s)
                    log.info("export: %s of %s samples, %.0f/s", f"{done:,}", f"{len(pairs):,}", rate)
        _tell(job, pairs, first or 0)
    finally:
        pairs.close()


def _tell(job: Export, pairs: Pairs, before: int) -> None:
    kept = f", {before:,} of them by an earlier run" if before else ""
    alone = len(pairs.images) - len(pairs)
    without = f"; {alone:,} images without text are left out" if alone else ""
    print(f"export: {len(pairs):,} samples{kept}, as {job.layout}{without} -> {job.output}")
    if pairs.texts.manifest.codec.get("name") == "int8":
        print("export: text was stored as int8: its values are those that training reads, not T5's own")


def _set(job: Export, key: str) -> Path:
    root, name = Path(job.path), getattr(job, key)
    if "://" in job.path:
        raise ConfigError(f"path: expected a local folder, found {job.path}; copy it to a disk first")
    sets = feature_sets(root)
    if name not in sets:
        raise ConfigError(
            f"{key}: expected a finished feature set {name} in {root}, found {', '.join(sets) or 'none'}; name another "
            f"with --set {key}=NAME"
        )
    return sets[name]
