"""`pixart verify`: re-read every byte and say what is damaged, by sample."""

from jobs.config import Verify
from pixart_data.errors import DataError
from pixart_data.storage import location
from pixart_data.verification import Finding
from pixart_data.verification import verify as verify_files


def verify(job: Verify, dry_run: bool) -> None:
    """Verify what is at a path; with `dry_run`, print how many files and bytes that would read.

    Raises:
        DataError: If anything is damaged or missing, after all of it was read.
    """
    root = location(job.path)
    if dry_run:
        sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
        print(f"verify: would read at most {len(sizes)} files, {sum(sizes):,} bytes, under {root}")
        return
    damaged: list[Finding] = []
    num_files = num_bytes = 0
    for finding in verify_files(root):
        if finding.problem:
            damaged.append(finding)
            print(f"{finding.path}: {_sample(finding)}{finding.problem}")
        else:
            num_files, num_bytes = num_files + 1, num_bytes + finding.size_bytes
    if damaged:
        first = damaged[0]
        others = f"; and {len(damaged) - 1} more problem(s)" if len(damaged) > 1 else ""
        raise DataError(f"{first.path}: {_sample(first)}{first.problem}{others}; {num_files} files are whole")
    print(f"verify: {num_files} files, {num_bytes:,} bytes, all whole")


def _sample(finding: Finding) -> str:
    return f"sample {finding.sample}: " if finding.sample else ""
