"""`pixart split`: a dataset in parts, by share or by query."""

from jobs.config import Split
from pixart_data.config import resolved_toml
from pixart_data.editions import require_finished
from pixart_data.errors import ConfigError
from pixart_data.partitions import Partition, by_query, by_share, check, write
from pixart_data.storage import location, write_atomic


def split(job: Split, dry_run: bool) -> None:
    """Write the parts of a dataset; with `dry_run`, print how many samples would be in each.

    Raises:
        ConfigError: If a query is wrong, two parts have a sample in common, or the output is the dataset itself, or
            holds parts of another split or what another command made.
        DataError: If the dataset lacks a shard.
    """
    if job.output == job.path:
        raise ConfigError(f"output: expected a folder of its own, found the dataset {job.output}; choose another")
    root = location(job.path)
    require_finished(root)
    partition = by_share(root, job.share) if job.share else by_query(root, job.where, job.queried_set)
    if dry_run:
        check(partition, location(job.output))
        for number, part in enumerate(partition.names):
            for name in partition.sets:
                print(f"split: {part}: {name}: would have {partition.num_rows(name, number):,} samples")
    else:
        for part, name, manifest in write(partition, location(job.output)):
            path = location(job.output) / part / name / "job.toml"
            write_atomic(path, f"# pixart split\n{resolved_toml(job)}".encode())
            rows = f"{manifest.counts['rows_out']:,} samples in {len(manifest.shards):,} shards"
            print(f"split: {part}: {name}: {rows} -> {job.output}/{part}/{name}")
    for line in _rest(partition):
        print(line)


def _rest(partition: Partition) -> list[str]:
    counts = {name: partition.num_rows(name, -1) for name in partition.sets}
    return [f"split: {name}: {count:,} samples are in no part" for name, count in counts.items() if count]
