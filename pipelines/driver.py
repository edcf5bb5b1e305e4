"""One run of a stage over its units: what is left to do, who does it, what is committed, and the account at the end."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.cluster import connect, share
from pipelines.config import Cluster
from pipelines.pool import Pool, Stage, Work
from pipelines.progress import Progress
from pixart_data.commits import MANIFEST, Record, output_lock, read_records, sweep, write_atomic, write_record
from pixart_data.config import Section, digest, resolved_toml
from pixart_data.errors import DataError, JobError

log = logging.getLogger(__name__)

_JUDGED_FROM_ROWS = 100
_COUNT_THREADS = 8


@dataclass(frozen=True)
class Run:
    """A stage applied to units.

    Attributes:
        stage: The command's word, shown in every line.
        root: Directory of the results; records go to `commits/` in it.
        units: In the order the results are to have.
        settings: What decides the result of a unit, JSON-able; its digest goes into the record.
        build: Builds the stage inside a worker; picklable.
        swept: Directories that hold nothing but published files; in them, files that no record names are deleted.
        count: The number of rows in a unit, for `--dry-run`.
        per_cpu: Without `cluster.num_workers`, a worker for each CPU: the stage loads no large model.
        judged: Whether rejected rows count against `cluster.max_rejected`.
    """

    stage: str
    root: Path
    units: Sequence[Work]
    settings: Callable[[Any], dict[str, Any]]
    build: Callable[[], Stage]
    cluster: Cluster
    swept: Sequence[Path]
    count: Callable[[Any], int]
    per_cpu: bool = False
    judged: bool = True


@dataclass
class Plan:
    """Which units are done and which are left, why done ones are redone, and how many records are of other units."""

    done: dict[str, Record] = field(default_factory=dict)
    todo: list[tuple[Work, dict[str, Any]]] = field(default_factory=list)
    redo: Counter[str] = field(default_factory=Counter)
    others: int = 0

    def line(self, run: Run) -> str:
        """Say how many shards are done and left, and why done ones are redone."""
        total = len(self.done) + len(self.todo)
        fresh = len(self.todo) - self.redo.total()
        parts = [f"{fresh} new", *(f"{count} redone: {why}" for why, count in sorted(self.redo.items()))]
        detail = f" ({'; '.join(parts)})" if self.redo else ""
        return f"{run.stage}: {total} shards, {len(self.done)} done, {len(self.todo)} to do{detail} -> {run.root}"

    def count_line(self, run: Run) -> str:
        """Count the rows that are done and left; reads the sources, which can take a while."""
        num_done = sum(record.rows_in for record in self.done.values())
        with ThreadPoolExecutor(_COUNT_THREADS) as threads:
            num_left = sum(threads.map(run.count, (unit for unit, _ in self.todo)))
        return f"{run.stage}: {num_done + num_left:,} rows, {num_done:,} done, {num_left:,} to do"


@dataclass(frozen=True)
class Account:
    """Rows of a finished run, over all its units, those done before included."""

    rows_in: int
    rows_out: int
    rejected: dict[str, int]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Account":
        """Add up records."""
        rejected: Counter[str] = Counter()
        rows_in = rows_out = 0
        for record in records:
            rows_in += record.rows_in
            rows_out += record.rows_out
            rejected.update(record.rejected)
        return cls(rows_in, rows_out, dict(sorted(rejected.items())))

    def line(self) -> str:
        """Return `rows in = rows out + rejected`, with the reasons."""
        total = sum(self.rejected.values())
        reasons = ", ".join(f"{name} {count}" for name, count in self.rejected.items())
        return f"{self.rows_in:,} in = {self.rows_out:,} out + {total:,} rejected" + (
            f" ({reasons})" if reasons else ""
        )


def make_plan(run: Run) -> Plan:
    """Compare the units with the records under the run's root."""
    records = read_records(run.root)
    plan = Plan(others=len(records.keys() - {unit.id for unit in run.units}))
    for unit in run.units:
        settings = run.settings(unit)
        record = records.get(unit.id)
        if record is not None and record.digest == digest(settings):
            plan.done[unit.id] = record
            continue
        if record is not None:
            plan.redo[_changed(record.settings, settings)] += 1
        plan.todo.append((unit, settings))
    return plan


def execute(run: Run, job: Section, finish: Callable[[list[Record]], None] | None = None) -> Account:
    """Do what is left of a run, commit it, call `finish` with all records, and account for every row.

    Args:
        job: The job, written resolved as `job.toml` beside the results.
        finish: Writes what spans units (an index, a report), the manifest last; called under the output's lock, with
            the records of this run's units alone, and never after a failure.

    Raises:
        DataError: If too many rows were rejected, after everything is committed.
        JobError: If units were set aside, after the others are committed.
    """
    with output_lock(run.root):
        plan = make_plan(run)
        log.info("%s", plan.line(run))
        if plan.others:
            log.info("%s: %d shards of other sources stay there, and out of this job", run.stage, plan.others)
        write_atomic(run.root / "job.toml", resolved_toml(job).encode())
        sweep(run.root, run.swept)
        failed = _work(run, plan) if plan.todo else {}
        records = [plan.done[unit.id] for unit in run.units if unit.id in plan.done]
        if failed:
            names = "; ".join(f"{unit}: {reason}" for unit, reason in sorted(failed.items())[:5])
            raise JobError(
                f"{run.stage}: {len(failed)} of {len(run.units)} shards failed {run.cluster.max_attempts} times and "
                f"were set aside, the others are done: {names}; mend the cause, then run the same command again"
            )
        if finish:
            finish(records)
        sweep(run.root, run.swept)
    account = Account.of(records)
    if run.judged:
        _judge(run, account)
    return account


def _work(run: Run, plan: Plan) -> dict[str, str]:
    settings = {unit.id: unit_settings for unit, unit_settings in plan.todo}
    progress = Progress(run.stage, len(run.units), len(plan.done))
    connect(run.cluster)
    pool = Pool(run.build, share(run.cluster, len(plan.todo), run.per_cpu), run.cluster.max_attempts)

    def live(rows: int, rejected: int) -> None:
        progress.live(rows, rejected, pool.num_waiting)

    try:
        for result in pool.work([unit for unit, _ in plan.todo], live):
            decided = settings[result.unit]
            record = replace(result, settings=decided, digest=digest(decided))
            if plan.redo:  # a manifest of what was there describes it no more
                (run.root / MANIFEST).unlink(missing_ok=True)
            write_record(run.root, record)
            plan.done[record.unit] = record
            progress.unit_done(record.rows_in, sum(record.rejected.values()))
    finally:
        progress.close()
    return pool.failed


def _judge(run: Run, account: Account) -> None:
    rejected = sum(account.rejected.values())
    share_rejected = rejected / account.rows_in if account.rows_in else 0.0
    if account.rows_in >= _JUDGED_FROM_ROWS and share_rejected > run.cluster.max_rejected:
        raise DataError(
            f"{run.stage}: {account.line()}: {share_rejected:.0%} rejected, limit {run.cluster.max_rejected:.0%} "
            f"(cluster.max_rejected); everything is committed in {run.root}: see what `pixart inspect` says of the "
            "rejected rows, and raise the limit if that is as it should be"
        )


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Name the settings that differ, dotted, the first few."""
    names = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [_changed(old, new, f"{prefix}{key}.")] if old != new else []
        elif old != new:
            names.append(f"{prefix}{key}")
    return ", ".join(names[:4]) + (" changed" if not prefix else "")
