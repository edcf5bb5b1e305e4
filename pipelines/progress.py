"""What is shown while units are worked on: a line for whoever watches, metrics for Ray, a status file for everybody.

The status file and the summary page are written by a thread of their own: storage that hangs delays no worker, and what
cannot be written fails no job.
"""

import contextlib
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.metrics import Metrics, object_store_bytes
from pixart_data.commits import COMMITS, Record
from pixart_data.errors import JobError, PixArtError
from pixart_data.logs import is_json
from pixart_data.processes import process_name
from pixart_data.runs import (
    STATUS_FILE,
    SUMMARY_FILE,
    FailedUnit,
    SlowUnit,
    Status,
    Tally,
    duration,
    read_status,
)
from pixart_data.storage import list_files, write_atomic
from pixart_data.summaries import summary_page

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_REWRITE_EVERY_S = 0.2
_WRITE_EVERY_S = 5.0
_RATE_OVER_S = 60.0
_ROWS = {"stats": "captions"}  # what the rows of a stage are called in its line
_LAST_WRITE_S = 10.0  # a process that was told to stop has thirty seconds in all

Outcome = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it begins.

    Attributes:
        stage: The command's word, and the feature set's name after it.
        root: The output directory, local or on an object store.
        num_units: All of them, those done before included.
        done: Records of the units done before.
        price_per_hour: Dollars for one worker-hour, if known.
        rows_expected: Rows in all units, if known without reading them.
    """

    stage: str
    root: Path
    num_units: int
    done: Sequence[Record] = ()
    price_per_hour: float | None = None
    rows_expected: int | None = None


@dataclass(frozen=True)
class Timing:
    """How a worker fared with a unit.

    Attributes:
        worker: Names the worker: figures of one worker are never mixed with those of another.
        seconds: From the unit's start to its end.
        busy_s: Of them, those in which the worker's model was at work, for this unit or for another one.
        attempt: From 1.
        peak_rss_bytes: The largest resident memory of the worker's process so far.
        rows: Rows that were worked; None for all of the unit's.
    """

    worker: str
    seconds: float
    busy_s: float
    attempt: int
    peak_rss_bytes: int
    rows: int | None = None


class Progress:
    """Keeps a run's `Status`, shows it as a line, publishes it as metrics and writes it beside the results.

    The line is rewritten in place on a terminal and logged every ten seconds elsewhere. Totals of earlier runs of the
    same output are carried on. A run that finds nothing to do changes none of them.
    """

    def __init__(self, run: RunFacts) -> None:
        self._run = run
        self._has_work = len(run.done) < run.num_units
        self._writer = _Writer(self._beat)
        self._metrics = Metrics(run.stage, str(run.root))
        self._found = _read(run)
        self._status = _begin(run, self._found, self._has_work)
        self._rejected: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._sample: Record | None = run.done[0] if run.done else None
        self._unit_ended_s: dict[str, float] = {}
        self._in_place = sys.stderr.isatty() and not is_json()
        self._began_s = self._workers_seen_s = self._shown_s = time.monotonic()
        self._written_s = float("-inf")
        self._window: deque[tuple[float, int]] = deque([(self._began_s, 0)])
        self._closed = False
        if self._has_work:
            self._status.add_point(force=True)
            self._write()

    def workers(self, num_working: int, num_waiting: int) -> None:
        """Tell how many workers are up, and how many wait for room or load their model; about once a second."""
        now_s = time.monotonic()
        status = self._status
        ran = status.this_run
        if not (ran.worker_s or ran.units or status.num_working):  # a pace is that of workers, not of their start
            self._began_s = self._workers_seen_s = now_s
            self._window = deque([(now_s, 0)])
        ran.worker_s += status.num_working * (now_s - self._workers_seen_s)
        self._workers_seen_s = now_s
        status.num_working, status.num_waiting = num_working, num_waiting

    def live(self, rows: int, rejected: int) -> None:
        """Tell how many rows the units in flight have behind them, and how many of these were rejected."""
        self._status.live_rows, self._status.live_rejected = rows, rejected
        self._tick()

    def unit_done(self, record: Record, timing: Timing) -> None:
        """Count a committed unit."""
        status, now_s = self._status, time.monotonic()
        rows = record.rows_in if timing.rows is None else timing.rows
        status.count(record)
        self._rejected.update(record.rejected)
        self._sample = record
        status.failed.pop(record.unit, None)
        status.add_slow(SlowUnit(unit=record.unit, rows=rows, seconds=timing.seconds, worker=timing.worker))
        ran = status.this_run
        ran.rows += rows
        ran.units += 1
        ran.busy_s += timing.busy_s
        # Also what passed between two units of a worker: a model that waits for its next unit is idle, too. Where units
        # overlap, so do their seconds and the busy ones among them, and their share is still right.
        ran.span_s += max(now_s - self._unit_ended_s.get(timing.worker, now_s), timing.seconds)
        self._unit_ended_s[timing.worker] = now_s
        status.peaks.raise_to(worker_bytes=timing.peak_rss_bytes)
        # Counted now; what is still in flight is told anew with the next poll.
        status.live_rows = max(status.live_rows - rows, 0)
        status.live_rejected = max(status.live_rejected - sum(record.rejected.values()), 0)
        self._tick(force=not self._in_place and status.num_done == status.num_units)

    def unit_failed(self, unit: str, attempt: int, reason: str, final: bool) -> None:
        """Count a failed attempt; after a `final` one the unit is set aside."""
        self._status.failed[unit] = FailedUnit(unit=unit, attempts=attempt, reason=reason, set_aside=final)
        self.note("attempt_failed")

    def note(self, kind: str, count: int = 1) -> None:
        """Count events that were mended on the way, such as `worker_died` or `storage_retry`."""
        if count > 0:
            self._events[kind] += count
            self._status.events[kind] = self._status.events.get(kind, 0) + count

    def close(self, outcome: Outcome, error: str = "") -> None:
        """End the line, and write the last status and the summary page; a second call changes nothing."""
        if self._closed:
            return
        self._closed = True
        status = self._status
        if self._in_place and status.this_run.units:
            self._show(force=True)
            sys.stderr.write("\n")
        if status.num_working or status.num_waiting:
            self.workers(0, 0)
        status.live_rows = status.live_rejected = 0
        status.state, status.error = outcome, error
        if outcome == "done":
            status.failed = {}
        if self._has_work:
            self._measure()
            with contextlib.suppress(PixArtError, OSError):
                status.num_foreign = max(_num_records(self._run.root) - status.num_done, 0)
            status.add_point(force=True)
            self._metrics.publish(status, self._rejected, self._events)
        elif self._found is not None and _outcome(self._found) == _outcome(status):
            return  # all is said as the last run left it
        self._write()
        page = summary_page(status, str(self._run.root), self._sample)
        self._writer.put(self._run.root / SUMMARY_FILE, page.encode())
        self._writer.end(_LAST_WRITE_S)

    def line(self) -> str:
        """Return the line as it stands."""
        status = self._status
        ran, left = self._ran(), status.seconds_left()
        rows = _ROWS.get(status.stage, "rows")
        rejected = sum(self._rejected.values()) + status.live_rejected
        parts = [
            f"{status.stage} {status.num_done}/{status.num_units} shards",
            f"{ran.rows:,} {rows}",
            f"{ran.rows_per_s:.1f} {rows}/s",
            f"{rejected:,} rejected",
            f"eta {'?' if left is None else duration(left)}",
        ]
        if ran.busy_share is not None:
            parts.append(f"model idle {1 - ran.busy_share:.0%}")
        if status.failed:
            parts.append(f"{len(status.failed)} shard(s) failing")
        if status.num_waiting:
            parts.append(f"{status.num_waiting} worker(s) starting")
        return " | ".join(parts)

    def _fields(self) -> dict[str, Any]:
        """The line's figures for a log that machines read."""
        status, ran = self._status, self._ran()
        return {
            "stage": status.stage,
            "shards": status.num_units,
            "shards_done": status.num_done,
            "shards_failing": len(status.failed),
            "rows": ran.rows,
            "rejected": sum(self._rejected.values()) + status.live_rejected,
            "rows_per_s": round(ran.rows_per_s, 3),
            "seconds_left": status.seconds_left(),
            "model_busy_share": ran.busy_share,
            "workers": status.num_working,
            "workers_starting": status.num_waiting,
        }

    def _ran(self) -> Tally:
        """This run's tally up to now, units in flight included."""
        self._status.this_run.elapsed_s = max(time.monotonic() - self._began_s, 0.0)
        return self._status.ran

    def _tick(self, force: bool = False) -> None:
        rows, now_s = self._ran().rows, time.monotonic()
        self._window.append((now_s, rows))
        while now_s - self._window[0][0] > _RATE_OVER_S:
            self._window.popleft()
        since_s, before = self._window[0]
        # Rows of a unit that failed are taken back; that is no negative rate.
        self._status.rows_per_s_now = max(rows - before, 0) / (now_s - since_s) if now_s > since_s else None
        self._status.add_point()
        self._show(force)
        if now_s - self._written_s >= _WRITE_EVERY_S:
            self._measure()
            self._write()
            self._metrics.publish(self._status, self._rejected, self._events)

    def _show(self, force: bool = False) -> None:
        now_s = time.monotonic()
        if not force and now_s - self._shown_s < (_REWRITE_EVERY_S if self._in_place else _LINE_EVERY_S):
            return
        self._shown_s = now_s
        if self._in_place:
            sys.stderr.write(f"\r\x1b[K{self.line()}")
            sys.stderr.flush()
        else:
            log.info("%s", self.line(), extra={"fields": self._fields()})

    def _measure(self) -> None:
        self._ran()
        self._status.peaks.raise_to(
            driver_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            object_store_bytes=object_store_bytes() or 0,
        )

    def _write(self) -> None:
        self._written_s = time.monotonic()
        self._status.updated_unix_s = time.time()
        self._written = self._status.to_bytes()
        self._writer.put(self._run.root / STATUS_FILE, self._written)

    def _beat(self) -> None:
        """Say that the driver lives while it has nothing new to say: it waits for the cluster, or makes an index."""
        told = Status.model_validate_json(self._written)  # not the present one: that is another thread's
        told.updated_unix_s = time.time()
        self._writer.put(self._run.root / STATUS_FILE, told.to_bytes())


def _begin(run: RunFacts, found: Status | None, has_work: bool) -> Status:
    """Return the status to start from: a new one, or what earlier runs left, with their work put behind."""
    now_unix_s = time.time()
    status = Status(
        stage=run.stage,
        driver=f"{socket.gethostname()} (pid {os.getpid()})",
        process=process_name(),
        num_runs=int(has_work),
        first_started_unix_s=now_unix_s,
        started_unix_s=now_unix_s,
        updated_unix_s=now_unix_s,
        num_units=run.num_units,
        rows_expected=run.rows_expected,
        price_per_hour=run.price_per_hour,
        num_foreign=max(_num_records(run.root) - len(run.done), 0),
    )
    if found is not None:
        kept = {"first_started_unix_s", "slowest", "events", "peaks", "timeline", "timeline_every_s"}
        if not has_work:
            kept |= {"driver", "process", "num_runs", "started_unix_s", "updated_unix_s", "this_run", "before"}
        status = status.model_copy(update={name: getattr(found, name) for name in kept}, deep=True)
    if found is not None and has_work:
        done = {record.unit for record in run.done}
        status.num_runs += found.num_runs
        status.before = found.before.plus(found.this_run)  # rows in flight went with their driver
        status.failed = {
            name: unit.model_copy(update={"set_aside": False})  # it is tried again
            for name, unit in found.failed.items()
            if name not in done
        }
    for record in run.done:
        status.count(record)
    return status


def _outcome(status: Status) -> tuple[Any, ...]:
    """What a run that finds nothing to do may still change: the end it comes to, and rows that a retry has won."""
    return status.state, status.error, status.num_units, status.num_done, status.rows_out, status.rejected


def _read(run: RunFacts) -> Status | None:
    try:
        found = read_status(run.root)
    except (PixArtError, OSError) as error:
        log.warning("%s: %s; its totals start anew", run.stage, error)
        return None
    return found if found is None or found.stage == run.stage else None


def _num_records(root: Path) -> int:
    return sum(path.suffix == ".json" and not path.name.startswith(".") for path in list_files(root / COMMITS))


class _Writer:
    """Writes files in a thread of its own, of each the latest content only. What fails is said once, and left.

    `beat` is called in that thread when nothing was put for five seconds.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._changed = threading.Condition()
        self._pending: dict[str, tuple[Path, bytes]] = {}
        self._is_ending = self._has_failed = False
        self._thread: threading.Thread | None = None

    def put(self, path: Path, data: bytes) -> None:
        """Have a file written soon, in place of what was to be written there and is not yet."""
        with self._changed:
            self._pending[str(path)] = (path, data)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pixart-status", daemon=True)
                self._thread.start()

    def end(self, timeout_s: float) -> None:
        """Wait until all is written, but no longer than this; nothing can be put any more."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._pending or self._is_ending, _WRITE_EVERY_S):
                    self._beat()
                if not self._pending:
                    return
                path, data = self._pending.pop(next(iter(self._pending)))
            try:
                _write(path, data)
            except Exception as error:  # noqa: BLE001  clients of stores raise what they like; no run fails for this
                if not self._has_failed:
                    log.warning("%s: not written (%s); the job goes on without it", path, error)
                self._has_failed = True


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except (FileNotFoundError, JobError) as error:
        if not isinstance(error.__cause__ or error, FileNotFoundError):
            raise
        write_atomic(path, data)  # the driver swept temporary files away at that moment, this one among them
