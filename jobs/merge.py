"""`pixart merge`: datasets with different samples, joined into one."""

from jobs.config import Merge
from pixart_data.config import resolved_toml
from pixart_data.editions import require_finished
from pixart_data.errors import ConfigError
from pixart_data.storage import location, write_atomic
from pixart_data.unions import check, open_all
from pixart_data.unions import merge as merge_sets


def merge(job: Merge, dry_run: bool) -> None:
    """Join datasets; with `dry_run`, check that they can be and print how many samples that makes.

    Raises:
        ConfigError: If the output is one of the datasets, or holds what another command made.
        DataError: If the datasets do not go together, or lack a shard.
    """
    if job.output in job.paths:
        raise ConfigError(f"output: expected a folder of its own, found the dataset {job.output}; choose another")
    for path in job.paths:
        require_finished(location(path))
    opened = open_all([location(path) for path in job.paths])
    if dry_run:
        check(opened, location(job.output))
        for name, originals in opened.items():
            print(f"merge: {name}: would join {sum(map(len, originals)):,} samples of {len(originals)} sets")
        return
    for name, manifest in merge_sets(opened, location(job.output)):
        write_atomic(location(job.output) / name / "job.toml", f"# pixart merge\n{resolved_toml(job)}".encode())
        num_shards = f"{len(manifest.shards):,} shards"
        print(f"merge: {name}: {manifest.counts['rows_out']:,} samples in {num_shards} -> {job.output}/{name}")
