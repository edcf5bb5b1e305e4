"""`pixart diff`: what differs between two datasets."""

from jobs.config import Diff
from pixart_data.differences import compare
from pixart_data.editions import unfinished_sets
from pixart_data.errors import DataError
from pixart_data.shards import feature_sets, read_manifest
from pixart_data.storage import location


def diff(job: Diff, dry_run: bool) -> None:
    """Compare two datasets set by set; with `dry_run`, print what would be compared.

    Raises:
        DataError: If they differ, after all of it was printed.
    """
    left, right = location(job.left), location(job.right)
    if dry_run:
        for root in (left, right):
            for name, path in feature_sets(root).items():
                print(f"diff: would read {name} with {read_manifest(path).counts['rows_out']:,} samples in {root}")
            for path in unfinished_sets(root):
                print(f"diff: {path} is not finished")
        return
    num_sets = num_same = 0
    lines = []
    for found in compare(left, right, job.num_samples):
        num_sets, num_same = num_sets + 1, num_same + found.num_same
        print(f"{found.name}: {found.num_common:,} samples in both, {found.num_same:,} of them the same")
        for difference in found.differences:
            lines.append(f"{found.name}: {difference}")
            print(f"  {difference}")
    if lines:
        more = f" (and {len(lines) - 1} more line(s) like it)" if len(lines) > 1 else ""
        raise DataError(f"{job.left} and {job.right}: expected the same samples, found differences: {lines[0]}{more}")
    print(f"diff: {num_sets} sets, {num_same:,} samples, no difference")
