"""`pixart compact`: gather the small shards of a dataset into large ones."""

from pipelines import compact as compact_pipeline
from pipelines.config import Compact
from pixart_data.editions import require_finished
from pixart_data.shards import Manifest, feature_sets, read_manifest
from pixart_data.storage import location


def compact(job: Compact, dry_run: bool) -> None:
    """Compact a dataset, or print what that would do.

    Raises:
        DataError: If a set of it was begun and not finished.
    """
    require_finished(location(job.path))
    if dry_run:
        for run, plan in compact_pipeline.plan(job):
            print(*plan.lines(run), sep="\n")
        return
    before = {name: read_manifest(root) for name, root in feature_sets(location(job.path)).items()}
    for run, account in compact_pipeline.run(job):
        print(f"{run.stage}: {account.line()} -> {run.root}")
        print(f"{run.stage}: {_shards(before[run.root.name])} before, {_shards(read_manifest(run.root))} now")


def _shards(manifest: Manifest) -> str:
    num_bytes = sum(shard["size_bytes"] for shard in manifest.shards)
    return f"{len(manifest.shards):,} shards, {num_bytes:,} bytes"
