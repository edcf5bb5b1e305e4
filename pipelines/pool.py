"""The scheduler: units of work on Ray actors that load a model once.

Ray's own ActorPool has no limit on attempts, and calls queued on an actor that waits for capacity are stuck with it.
Here a worker gets work only after it has answered a ping, a unit that fails is tried again elsewhere a limited number
of times, and a worker that dies is replaced. An error that no retry can mend (a setting, full storage) ends the job.
"""

import contextlib
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from pipelines.cluster import Share
from pixart_data.commits import Record
from pixart_data.errors import ConfigError, JobError, PixArtError

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_MAX_FAILURES_AT_FIRST = 10
_POLL_S = 1.0

Report = Callable[[int, int], None]
"""Called by a stage with the rows it has behind it in this unit, and how many of them were rejected."""


class Work(Protocol):
    """What a unit must have: a name that is its output's file name and its record's."""

    @property
    def id(self) -> str:
        """The unit's name."""


class Stage(Protocol):
    """A stage: built once in a worker, where it loads its model, then called with one unit after another."""

    def __call__(self, unit: Any, report: Report) -> Record:
        """Do a unit, publish its files, and return the record that the driver will write."""


class _Worker:
    """The actor. It runs a unit in one thread and answers `rows` in another."""

    def __init__(self, build: Callable[[], Stage]) -> None:
        self._build = build
        self._stage: Stage | None = None
        self._rows = (0, 0)

    def load(self) -> None:
        self._stage = self._build()

    def run(self, unit: Any) -> Record:
        if self._stage is None:
            raise RuntimeError("run before load")
        self._rows = (0, 0)
        started_s = time.monotonic()
        record = self._stage(unit, self._report)
        return replace(record, seconds=round(time.monotonic() - started_s, 6))

    def rows(self) -> tuple[int, int]:
        return self._rows

    def _report(self, rows: int, rejected: int) -> None:
        self._rows = (rows, rejected)


@dataclass
class Pool:
    """Workers and the units they hold. `failed` names the units set aside, with the last error of each."""

    build: Callable[[], Stage]
    share: Share
    max_attempts: int
    failed: dict[str, str] = field(default_factory=dict)
    _todo: deque[Any] = field(default_factory=deque)
    _attempts: Counter[str] = field(default_factory=Counter)
    _starting: dict[Any, Any] = field(default_factory=dict)
    _running: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    _asked: dict[Any, Any] = field(default_factory=dict)
    _rows: dict[Any, tuple[int, int]] = field(default_factory=dict)
    _num_loaded: int = 0
    _num_done: int = 0
    _num_failures: int = 0
    _failed_starts: int = 0
    _stopped: bool = False

    def work(self, units: Sequence[Work], live: Report) -> Iterator[Record]:
        """Yield a record for every unit that gets done, as it gets done; call `live` about once a second.

        Raises:
            ConfigError: If the stage cannot be built with these settings.
            JobError: If storage fails, workers keep dying, nothing succeeds, or the process is asked to stop.
        """
        self._todo = deque(units)
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            for _ in range(self.share.num_workers):
                self._spawn()
            while self._todo or self._running:
                self._dispatch()
                yield from self._collect()
                live(*self._live_rows())
                if self._stopped:
                    raise JobError("stopped by SIGTERM; run the same command again to go on where it was")
        finally:
            signal.signal(signal.SIGTERM, previous)
            for worker in [*self._idle, *self._starting.values(), *(w for w, _ in self._running.values())]:
                ray.kill(worker)

    @property
    def num_waiting(self) -> int:
        """Workers that wait for room on the cluster or are loading their model."""
        return len(self._starting)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True

    def _spawn(self) -> None:
        options = {"num_cpus": self.share.num_cpus, "num_gpus": self.share.num_gpus}
        worker = ray.remote(_Worker).options(**options, max_restarts=0, max_concurrency=2).remote(self.build)
        self._starting[worker.load.remote()] = worker

    def _dispatch(self) -> None:
        while self._todo and self._idle:
            unit, worker = self._todo.popleft(), self._idle.pop()
            self._attempts[unit.id] += 1
            self._running[worker.run.remote(unit)] = (worker, unit)

    def _collect(self) -> Iterator[Record]:
        waited = [*self._starting, *self._running]
        ray.wait(waited, num_returns=1, timeout=_POLL_S)
        ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        for reference in ready:
            if reference in self._starting:
                self._started(reference, self._starting.pop(reference))
            else:
                yield from self._finished(reference, *self._running.pop(reference))

    def _finished(self, reference: Any, worker: Any, unit: Any) -> Iterator[Record]:
        self._rows.pop(worker, None)
        try:
            record = ray.get(reference)
        except RayTaskError as error:
            self._idle.append(worker)
            if isinstance(error.cause, ConfigError | JobError):
                raise type(error.cause)(str(error.cause)) from error
            self._retry(unit, _last_line(error))
        except RayError as error:  # the worker is dead, or what it sent cannot be read here: another takes its place
            ray.kill(worker)
            self._spawn()
            if getattr(error, "preempted", False):
                self._attempts[unit.id] -= 1  # the unit is not to blame for a spot machine that was taken back
            self._retry(unit, f"its worker died ({_last_line(error)})")
        else:
            self._num_done += 1
            self._idle.append(worker)
            yield record

    def _started(self, reference: Any, worker: Any) -> None:
        """A first load that fails for a stated reason ends the job; later ones may be the fault of one machine."""
        try:
            ray.get(reference)
        except RayError as error:
            ray.kill(worker)
            cause = getattr(error, "cause", None)
            if isinstance(cause, PixArtError) and not self._num_loaded:
                raise type(cause)(str(cause)) from error
            self._failed_starts += 1
            log.warning("a worker failed to load its model: %s", _last_line(error))
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise JobError(
                    f"workers keep failing while they load the model ({_last_line(error)}); if memory is short, give "
                    "cluster.num_workers a smaller number, or take a smaller model"
                ) from error
            self._spawn()
        else:
            self._failed_starts = 0
            self._num_loaded += 1
            self._idle.append(worker)

    def _retry(self, unit: Any, reason: str) -> None:
        self._num_failures += 1
        if not self._num_done and self._num_failures >= max(_MAX_FAILURES_AT_FIRST, 2 * self.share.num_workers):
            raise JobError(
                f"the first {self._num_failures} attempts all failed, the last one at {unit.id}: {reason}; "
                "mend the cause, then run the same command again"
            )
        if self._attempts[unit.id] < self.max_attempts:
            log.warning("%s: attempt %d failed: %s", unit.id, self._attempts[unit.id], reason)
            self._todo.append(unit)
        else:
            log.error("%s: set aside after %d attempts: %s", unit.id, self.max_attempts, reason)
            self.failed[unit.id] = reason

    def _live_rows(self) -> tuple[int, int]:
        """Return the rows that units in flight have behind them, as far as their workers have told; never waits."""
        ready, _ = ray.wait([*self._asked], num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for reference in ready:
            worker = self._asked.pop(reference)
            with contextlib.suppress(RayError):  # a dead worker has nothing to tell
                self._rows[worker] = ray.get(reference)
        working = [worker for worker, _ in self._running.values()]
        if not self._asked:
            self._asked = {worker.rows.remote(): worker for worker in working}
        counts = [self._rows[worker] for worker in working if worker in self._rows]
        return sum(rows for rows, _ in counts), sum(rejected for _, rejected in counts)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
