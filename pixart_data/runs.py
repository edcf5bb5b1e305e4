"""The status of a run: `status.json` beside its results, which the driver rewrites every few seconds.

The one file of an output with clock times in it. It outlives the driver: figures add up over the runs that one output
took (resumed, killed, resumed), and anybody who sees the storage can read it. Commit records stay the truth about what
is done; this says how it went.
"""

import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixart_data.commits import Record
from pixart_data.errors import DataError
from pixart_data.processes import is_alive
from pixart_data.storage import read_bytes
from pixart_data.verdicts import GATE, Verdicts

STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.html"
FORMAT = "pixart-run"
VERSION = 1
SILENT_S = 60.0
"""A running driver writes every five seconds; one that was not heard of for this long is taken for dead."""

_RETRIED = ("fetch", "caption", "extract", "import")  # the stages whose rejected rows `pixart retry` does again
_NUM_SLOWEST = 10
_NUM_POINTS = 240
_POINT_EVERY_S = 5.0

State = Literal["running", "done", "failed", "stopped"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")  # a newer toolkit may have written more


class Tally(_Part):
    """What was worked: in one run, or added up over several.

    Attributes:
        rows: Rows of the units that were committed, rejected ones included.
        elapsed_s: Since the first worker was up.
        worker_s: Seconds of workers that were up, added up; what is paid for.
        busy_s: Of them, seconds inside the model, in units that were committed.
        span_s: What `busy_s` is a part of: from the start of each worker's first unit to the end of its last, gaps
            between units included.
    """

    rows: int = 0
    units: int = 0
    elapsed_s: float = 0.0
    worker_s: float = 0.0
    busy_s: float = 0.0
    span_s: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Return the sum."""
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in Tally.model_fields})

    @property
    def rows_per_s(self) -> float:
        """Rows per second, 0 before any time has passed."""
        return self.rows / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def busy_share(self) -> float | None:
        """Share of their time, 0 to 1, that workers spent inside the model; None while there is nothing to tell."""
        return min(self.busy_s / self.span_s, 1.0) if self.busy_s > 0 and self.span_s > 0 else None


class SlowUnit(_Part):
    """One of the units that took longest."""

    unit: str
    seconds: float
    rows: int
    worker: str


class FailedUnit(_Part):
    """A unit whose last attempt failed. `set_aside`: it has no attempts left in this run."""

    unit: str
    attempts: int
    reason: str
    set_aside: bool


class Peaks(_Part):
    """The most memory seen at any time."""

    worker_bytes: int = 0
    driver_bytes: int = 0
    object_store_bytes: int = 0

    def raise_to(self, **sizes_bytes: int) -> None:
        """Keep the larger of what was seen and what is seen."""
        for name, size_bytes in sizes_bytes.items():
            setattr(self, name, max(getattr(self, name), size_bytes))


class Status(_Part):
    """Where a run stands.

    Times of day are seconds since 1970 (`..._unix_s`).

    Attributes:
        error: Why the run ended, if it did not end well.
        num_runs: How often a driver had work to do here.
        rows_expected: In all units, where that is known without reading them.
        rejected: Rows by reason, of the units that are done.
        gate: What the gate found of their captions, as `Verdicts` has it; empty if they were not judged.
        num_foreign: Commit records found that count for nothing: of other sources, or to be redone by this run.
        rows_per_s_now: Over the last minute.
        this_run, before: What this driver worked, and what all drivers before it did.
        slowest: At most ten, the slowest first.
        timeline: (elapsed_s over all runs, rows worked, workers up), thinned out as it grows.
    """

    format: str = FORMAT
    version: int = VERSION
    stage: str
    state: State = "running"
    error: str = ""
    driver: str = ""
    process: str = ""
    num_runs: int = 1
    first_started_unix_s: float
    started_unix_s: float
    updated_unix_s: float
    num_units: int
    num_done: int = 0
    rows_expected: int | None = None
    rows_in: int = 0
    rows_out: int = 0
    rejected: dict[str, int] = {}
    gate: dict[str, Any] = {}
    num_foreign: int = 0
    num_working: int = 0
    num_waiting: int = 0
    live_rows: int = 0
    live_rejected: int = 0
    rows_per_s_now: float | None = None
    price_per_hour: float | None = None
    this_run: Tally = Field(default_factory=Tally)
    before: Tally = Field(default_factory=Tally)
    slowest: list[SlowUnit] = []
    failed: dict[str, FailedUnit] = {}
    events: dict[str, int] = {}
    peaks: Peaks = Field(default_factory=Peaks)
    timeline: list[tuple[float, int, int]] = []
    timeline_every_s: float = _POINT_EVERY_S

    # What is derived

    @property
    def ran(self) -> Tally:
        """What this run worked so far, with the rows of units in flight."""
        return self.this_run.model_copy(update={"rows": self.this_run.rows + self.live_rows})

    @property
    def total(self) -> Tally:
        """What all runs worked so far, with the rows of units in flight."""
        return self.before.plus(self.ran)

    @property
    def num_set_aside(self) -> int:
        """Units that this run has given up."""
        return sum(unit.set_aside for unit in self.failed.values())

    @property
    def num_left(self) -> int:
        """Units that are neither done nor given up."""
        return max(self.num_units - self.num_done - self.num_set_aside, 0)

    @property
    def num_rejected(self) -> int:
        """Rows rejected in the units that are done."""
        return sum(self.rejected.values())

    def silent_s(self, now_unix_s: float) -> float:
        """Seconds since the driver was last heard of; clocks of two machines may differ, so never negative."""
        return max(now_unix_s - self.updated_unix_s, 0.0)

    def is_alive(self, now_unix_s: float) -> bool:
        """Tell whether a driver seems to be at work; one on this machine is known to be, or not to be."""
        return self.state == "running" and self.silent_s(now_unix_s) < SILENT_S and is_alive(self.process)

    def seconds_left(self) -> float | None:
        """Return the time left at the pace that a worker has had in this run, with the workers of now.

        None while there is nothing to judge from: no rows yet, or no worker up.
        """
        if not self.num_left:
            return 0.0
        ran, rows_left = self.ran, self._rows_left()
        if not ran.rows or rows_left is None:
            return ran.elapsed_s / ran.units * self.num_left if ran.units else None
        if ran.worker_s > 0:
            return rows_left * ran.worker_s / ran.rows / self.num_working if self.num_working else None
        return rows_left * ran.elapsed_s / ran.rows

    def cost(self) -> float | None:
        """Dollars so far, over all runs; None without a price."""
        return None if self.price_per_hour is None else self.total.worker_s / 3600 * self.price_per_hour

    def cost_in_all(self) -> float | None:
        """Dollars to the end, at the pace of all runs; None without a price, or before anything is done."""
        cost, rows, rows_left = self.cost(), self.total.rows, self._rows_left()
        if cost is None or not self.num_left:
            return cost
        return cost + cost * rows_left / rows if rows and rows_left is not None else None

    def _rows_left(self) -> float | None:
        rows_per_unit = self.rows_in / self.num_done if self.num_done else None
        if self.rows_expected is not None:
            aside = self.num_set_aside * (rows_per_unit or 0.0)
            return max(self.rows_expected - aside - self.rows_in - self.live_rows, 0.0)
        return max(rows_per_unit * self.num_left - self.live_rows, 0.0) if rows_per_unit else None

    # What is counted

    def count(self, record: Record) -> None:
        """Count a unit that is done."""
        self.num_done += 1
        self.rows_in += record.rows_in
        self.rows_out += record.rows_out
        for reason, count in record.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
        if GATE in record.facts:
            self.gate = Verdicts.from_facts(self.gate).plus(Verdicts.from_facts(record.facts[GATE])).to_facts()

    def add_slow(self, unit: SlowUnit) -> None:
        """Keep a unit if it is one of the slowest; one that is done again replaces what it took before."""
        others = [other for other in self.slowest if other.unit != unit.unit]
        self.slowest = sorted([*others, unit], key=lambda slow: -slow.seconds)[:_NUM_SLOWEST]

    def add_point(self, force: bool = False) -> None:
        """Add the present to the timeline if the last point is old enough."""
        total = self.total
        if not force and self.timeline and total.elapsed_s - self.timeline[-1][0] < self.timeline_every_s:
            return
        self.timeline.append((round(total.elapsed_s, 1), total.rows, self.num_working))
        if len(self.timeline) > _NUM_POINTS:
            self.timeline = self.timeline[::2]
            self.timeline_every_s *= 2

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return self.model_dump_json(indent=1).encode()

    def figures(self, now_unix_s: float) -> dict[str, Any]:
        """Return the derived figures by name, JSON-able, units in the names."""
        total = self.total
        return {
            "alive": self.is_alive(now_unix_s),
            "silent_s": self.silent_s(now_unix_s),
            "units_left": self.num_left,
            "units_set_aside": self.num_set_aside,
            "rows_rejected": self.num_rejected,
            "rows_per_s_this_run": self.ran.rows_per_s,
            "rows_per_s_all_runs": total.rows_per_s,
            "busy_share": total.busy_share,
            "idle_share": None if total.busy_share is None else 1 - total.busy_share,
            "seconds_left": self.seconds_left() if self.is_alive(now_unix_s) else None,
            "cost_dollars": self.cost(),
            "cost_in_all_dollars": self.cost_in_all(),
        }


def read_status(root: Path) -> Status | None:
    """Return the status in an output directory, local or on an object store; None if there is none.

    Raises:
        DataError: If the file is something else, or of a version that this toolkit does not know.
        JobError: If the storage fails.
    """
    try:
        data = read_bytes(root / STATUS_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        status = Status.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{root / STATUS_FILE}: expected the status of a run, found {where}: {problem['msg']}; it holds no "
            "results: delete it, and the next run writes a new one"
        ) from error
    if (status.format, status.version) != (FORMAT, VERSION):
        raise DataError(
            f"{root / STATUS_FILE}: expected {FORMAT} version {VERSION}, found {status.format} version "
            f"{status.version}; look at it with the toolkit that wrote it"
        )
    return status


def advice(status: Status, place: str, alive: bool) -> list[str]:
    """Say what to type next, one step a line; nothing while all goes well.

    Args:
        place: The output directory, as a person would type it.
    """
    command = status.stage.split()[0]
    again = _again(command, place)
    steps = []
    if status.state == "running" and not alive:
        steps.append(f"the driver is gone, or cannot write here; what is committed stays: {again}")
    elif status.state == "stopped":
        steps.append(f"it was stopped; to go on where it was: {again}")
    elif status.state == "failed" and not status.num_set_aside:
        steps.append(f"mend what the error says; then, to go on where it was: {again}")
    if status.num_set_aside and not alive:
        steps.append(f"shards set aside: {status.num_set_aside:,}; mend the cause, then: {again}")
    if command == "filter" and status.state == "done":
        steps.append(f"these are the rows measured; what the filters kept of them: pixart inspect {shlex.quote(place)}")
    if status.num_rejected and status.state != "running" and command in _RETRIED:
        steps.append(f"rows rejected: {status.num_rejected:,}; to look at some: pixart inspect {shlex.quote(place)}")
        if status.num_done == status.num_units and status.rejected.keys() - _LASTING:
            steps.append(f"if their cause has passed, to try rejected rows again: pixart retry {shlex.quote(place)}")
    return steps


def _again(command: str, place: str) -> str:
    job = f"{place}/job.toml"
    if "://" not in place:
        return f"pixart {command} {shlex.quote(job)}"
    if place.startswith("s3://"):  # the command takes a local job file
        return f"the same command again; its job file: aws s3 cp {shlex.quote(job)} . && pixart {command} job.toml"
    return f"the same command again; its job file, to be copied here first: {job}"


_LASTING = {"no_caption", "empty_caption", "duplicate_key", "bad_row", "bad_url", "not_an_image", "not_a_file"}

EVENTS = {
    "attempt_failed": "failed attempts at a shard",
    "worker_died": "workers that died and were replaced",
    "worker_hung": "workers that hung and were replaced",
    "preempted": "workers lost to a machine that was taken back",
    "batch_halved": "times a batch was halved for lack of memory",
    "server_away": "times a captioning server was away or busy",
    "answer_broken": "broken answers of captioning servers",
    "storage_retry": "times storage failed and was tried again",
}
"""Kinds of events in words; other kinds are shown as they are."""


def event_lines(status: Status) -> list[str]:
    """Return the events, counted, in words."""
    return [f"{count:,} {EVENTS.get(kind, kind)}" for kind, count in sorted(status.events.items())]


def duration(seconds: float) -> str:
    """Return a time in the largest unit that keeps two figures or more: `90 s`, `20 min`, `8.3 h`, `3.1 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def size(size_bytes: int) -> str:
    """Return a size for people: `512 MB`, `1.2 GB`; 1 GB is 10^9 bytes."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
