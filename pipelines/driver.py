"""One run of a stage over its units: what is left to do, who does it, what is committed, and the account at the end."""

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from pipelines.cluster import connect, share
from pipelines.config import Cluster
from pipelines.ending import Stopped, exit_in_time, stop_on_sigterm
from pipelines.pool import Pool
from pipelines.progress import Progress, RunFacts, Timing
from pipelines.worker import Amend, Retry, Stage, Work
from pixart_data import events
from pixart_data.commits import MANIFEST, Record, read_records, sweep, write_record
from pixart_data.config import Section, digest, resolved_toml
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_data.leases import Lease, output_lock
from pixart_data.owners import require_run
from pixart_data.records import Reason
from pixart_data.storage import delete, write_atomic

log = logging.getLogger(__name__)

JOB = "job.toml"
_JUDGED_FROM_ROWS = 100
_COUNT_THREADS = 8
_UNITS_NAMED = 5


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
        units_per_worker: Two let a worker's model work while one of its units starts or ends.
        lacks: What a done unit still lacks, in a few words for the plan; empty if it lacks nothing. The stage can
            `amend` it then.
        needs_gpu: False where the work is done elsewhere, by a server: workers get no GPU then.
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
    units_per_worker: int = 1
    needs_gpu: bool = True
    lacks: Callable[[Record], str] = lambda record: ""


@dataclass
class Plan:
    """Which units are done and which are left, the redone ones by what changed, the amended ones by what they lack.

    Attributes:
        records: All that are there, those of other sources and of units to be redone included.
    """

    done: dict[str, Record] = field(default_factory=dict)
    todo: list[tuple[Work, dict[str, Any]]] = field(default_factory=list)
    redo: dict[str, list[str]] = field(default_factory=dict)
    amend: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    others: int = 0

    def line(self, run: Run) -> str:
        """Say how many shards are done and left, and why done ones are redone."""
        total = len(self.done) + len(self.todo)
        known = [*self.redo.values(), *self.amend.values()]
        parts = [f"{len(self.todo) - sum(map(len, known))} new"]
        parts += [f"{len(units)} redone: {why}" for why, units in sorted(self.redo.items())]
        parts += [f"{len(units)} amended: {why}" for why, units in sorted(self.amend.items())]
        detail = f" ({'; '.join(parts)})" if known else ""
        return f"{run.stage}: {total} shards, {len(self.done)} done, {len(self.todo)} to do{detail} -> {run.root}"

    def which_lines(self, run: Run) -> list[str]:
        """Name the shards that are to do, the first few of each kind."""
        known = {unit for units in [*self.redo.values(), *self.amend.values()] for unit in units}
        kinds = {"new": [unit.id for unit, _ in self.todo if unit.id not in known], **self.redo, **self.amend}
        lines = []
        for why, units in kinds.items():
            more = f" and {len(units) - _UNITS_NAMED} others" if len(units) > _UNITS_NAMED else ""
            if units:
                lines.append(f"{run.stage}: {why}: {', '.join(units[:_UNITS_NAMED])}{more}")
        return lines

    def lines(self, run: Run) -> Iterator[str]:
        """Yield what a dry run says of a run."""
        yield self.line(run)
        yield self.count_line(run)
        yield from self.which_lines(run)

    def count_line(self, run: Run) -> str:
        """Count the rows that are done and left; reads the sources, which can take a while."""
        num_done = sum(record.rows_in for record in self.done.values())
        with ThreadPoolExecutor(_COUNT_THREADS) as threads:
            num_left = sum(threads.map(run.count, (unit for unit, _ in self.todo if not isinstance(unit, Amend))))
        num_left += sum(unit.record.rows_in for unit, _ in self.todo if isinstance(unit, Amend))
        return f"{run.stage}: {num_done + num_left:,} rows, {num_done:,} done, {num_left:,} to do"


@dataclass(frozen=True)
class Account:
    """Rows of a finished run, over all its units, those done before included; `remark` says more of those out."""

    rows_in: int
    rows_out: int
    rejected: dict[str, int]
    remark: str = ""

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
        detail = f" ({reasons})" if reasons else ""
        remark = f"; {self.remark}" if self.remark else ""
        return f"{self.rows_in:,} in = {self.rows_out:,} out + {total:,} rejected{detail}{remark}"


def make_plan(run: Run) -> Plan:
    """Compare the units with the records under the run's root.

    Raises:
        ConfigError: If what is there is not this command's: it would be swept away.
    """
    require_run(run.root, run.stage.split()[0])
    records = read_records(run.root)
    plan = Plan(records=records, others=len(records.keys() - {unit.id for unit in run.units}))
    for unit in run.units:
        settings = run.settings(unit)
        record = records.get(unit.id)
        if record is not None and record.digest == digest(settings):
            lacks = run.lacks(record)
            if not lacks:
                plan.done[unit.id] = record
                continue
            plan.amend.setdefault(lacks, []).append(unit.id)
            plan.todo.append((Amend(unit, record), settings))
            continue
        if record is not None:
            plan.redo.setdefault(changed(record.settings, settings), []).append(unit.id)
        plan.todo.append((unit, settings))
    return plan


def execute(
    run: Run,
    job: Section,
    finish: Callable[[list[Record]], "Account | None"] | None = None,
    reasons: Sequence[str] = (),
) -> Account:
    """Do what is left of a run, commit it, call `finish` with all records, and account for every row.

    Args:
        job: The job, written resolved as `job.toml` beside the results.
        finish: Writes what spans units (an index, a report), the manifest last; called under the output's lease, with
            the records of this run's units alone, and never after a failure. It may return an account of its own,
            where rows are rejected for what is known only of all units together.
        reasons: Do nothing but the rows again that were rejected for these, of a run that is done.

    Raises:
        ConfigError: If a reason is unknown, or the results of another command are in the folder.
        DataError: If too many rows were rejected, after everything is committed.
        JobError: If units were set aside, after the others are committed, or another run holds the output.
    """
    require_known([*reasons, *run.cluster.max_rejected_by_reason])
    with exit_in_time(), output_lock(run.root) as lease:
        plan = make_plan(run)
        log.info("%s", plan.line(run))
        if plan.others:
            log.info("%s: %d shards of other sources stay there, and out of this job", run.stage, plan.others)
        if reasons:
            _plan_retry(run, plan, reasons)
        write_atomic(run.root / JOB, f"# pixart {run.stage.split()[0]}\n{resolved_toml(job)}".encode())
        sweep(run.root, run.swept, plan.records.values())
        todo = {unit.id for unit, _ in plan.todo}
        done = [record for unit, record in plan.done.items() if unit not in todo]
        progress = Progress(RunFacts(run.stage, run.root, len(run.units), done, run.cluster.price_per_hour, None))
        try:
            account = _execute(run, plan, lease, progress, finish)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | Stopped)
            progress.close("stopped" if stopped else "failed", str(error))
            raise
        progress.close("done")
    return account


def _execute(
    run: Run,
    plan: Plan,
    lease: Lease,
    progress: Progress,
    finish: Callable[[list[Record]], "Account | None"] | None,
) -> Account:
    failed = _work(run, plan, lease, progress) if plan.todo else {}
    records = [plan.done[unit.id] for unit in run.units if unit.id in plan.done]
    if failed:
        names = "; ".join(f"{unit}: {reason}" for unit, reason in sorted(failed.items())[:_UNITS_NAMED])
        raise JobError(
            f"{run.stage}: {len(failed)} of {len(run.units)} shards failed {run.cluster.max_attempts} times and "
            f"were set aside, the others are done: {names}; mend the cause, then run the same command again"
        )
    lease.check()
    account = (finish(records) if finish else None) or Account.of(records)
    lease.check()  # whoever came since has records that are not among these
    sweep(run.root, run.swept, plan.records.values())
    if run.judged:
        _judge(run, account)
    return account


def _plan_retry(run: Run, plan: Plan, reasons: Sequence[str]) -> None:
    """Replace what is to do by the rejected rows of what is done.

    Raises:
        DataError: If the run is not done, or its source or settings have changed.
    """
    if plan.todo:
        command = run.stage.split()[0]
        raise DataError(
            f"{run.root}: expected a finished run, found {len(plan.todo)} shards to do; run `pixart {command}` on "
            f"{run.root / JOB} first"
        )
    for unit in run.units:
        record = plan.done[unit.id]
        if any(record.rejected.get(reason) for reason in reasons):
            plan.todo.append((Retry(unit, record, tuple(reasons)), record.settings))
    count = sum(work.num_rows for work, _ in plan.todo if isinstance(work, Retry))
    log.info("%s: %d rejected rows of %d shards are done again", run.stage, count, len(plan.todo))


def _work(run: Run, plan: Plan, lease: Lease, progress: Progress) -> dict[str, str]:
    settings = {unit.id: unit_settings for unit, unit_settings in plan.todo}
    again = {unit.id: unit.num_rows for unit, _ in plan.todo if isinstance(unit, Retry)}
    new = {unit.id for unit, _ in plan.todo} - plan.records.keys()
    connect(run.cluster)
    stop_on_sigterm()
    cluster = run.cluster if run.needs_gpu else run.cluster.model_copy(update={"gpus_per_worker": 0.0})

    def room() -> int:
        try:
            return share(cluster, len(plan.todo), run.per_cpu).num_workers
        except JobError:  # no node for the moment: they come back, or others do
            return 0

    pool = Pool(
        run.build,
        share(cluster, len(plan.todo), run.per_cpu),
        cluster.max_attempts,
        progress,
        run.units_per_worker,
        cluster.stall_s,
        None if cluster.num_workers else room,
    )
    noted = Counter(events.counts())
    unsealed = False
    try:
        for done, attempt in pool.work([unit for unit, _ in plan.todo]):
            decided = settings[done.record.unit]
            record = replace(done.record, settings=decided, digest=digest(decided))
            lease.check()
            if record.unit not in new and not unsealed:  # a manifest of what was there describes it no more
                delete([run.root / MANIFEST])
                unsealed = True
            write_record(run.root, record, replaces=record.unit not in new)
            plan.done[record.unit] = plan.records[record.unit] = record
            took = (done.worker, done.seconds, done.busy_s, attempt, done.peak_rss_bytes)
            progress.unit_done(record, Timing(*took, rows=again.get(record.unit)))
            for kind, count in (Counter(events.counts()) - noted).items():
                progress.note(kind, count)
            noted = Counter(events.counts())
    except RayError as error:
        raise JobError(f"{run.stage}: the cluster was lost: {error}; run the same command again to go on") from error
    return pool.failed


def _judge(run: Run, account: Account) -> None:
    """Raise DataError if more rows were rejected than the job allows, in all or for one reason."""
    if account.rows_in < _JUDGED_FROM_ROWS:
        return
    judged = [(sum(account.rejected.values()), run.cluster.max_rejected, "rejected", "cluster.max_rejected")]
    for reason, limit in run.cluster.max_rejected_by_reason.items():
        judged.append((account.rejected.get(reason, 0), limit, reason, "cluster.max_rejected_by_reason"))
    for count, limit, what, key in judged:
        if count / account.rows_in > limit:
            raise DataError(
                f"{run.stage}: {account.line()}: {count / account.rows_in:.0%} {what}, limit {limit:.0%} "
                f"({key}); everything is committed in {run.root}: see what `pixart inspect` says of the "
                "rejected rows, and raise the limit if that is as it should be"
            )


def require_known(reasons: Iterable[str]) -> None:
    """Raise ConfigError, with a suggestion, if a reason for rejecting rows does not exist."""
    known = [str(reason) for reason in Reason]
    for name in reasons:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"reason {name!r}: expected why rows are rejected, found no such reason; {hint}")


def changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Name the settings that differ, dotted, the first few; without a prefix, with the word "changed" after them."""
    names = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [changed(old, new, f"{prefix}{key}.")] if old != new else []
        elif old != new:
            names.append(f"{prefix}{key}")
    return ", ".join(names[:4]) + (" changed" if not prefix else "")
