"""The scheduler: units of work on Ray actors that load a model once.

Ray's own ActorPool has no limit on attempts, and calls queued on an actor that waits for capacity are stuck with it.
Here a worker gets work only after it has answered a ping, a unit that fails is tried again elsewhere a limited number
of times, and a worker that dies is replaced. An error that no retry can mend (a setting, full storage) ends the job.
"""

import logging
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipelines.cluster import Share
from pixart_data.commits import Record
from pixart_data.errors import ConfigError, JobError

log = logging.getLogger(__name__)

_MAX_START_DEATHS = 3
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
        return self._stage(unit, self._report)

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
    _attempts: dict[str, int] = field(default_factory=dict)
    _starting: dict[Any, Any] = field(default_factory=dict)
    _running: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    _start_deaths: int = 0
    _stopped: bool = False

    def work(self, units: Sequence[Work], live: Report) -> Iterator[Record]:
        """Yield a record for every unit that gets done, as it gets done; call `live` about once a second.

        Raises:
            ConfigError: If the stage cannot be built with these settings.
            JobError: If storage fails, workers keep dying, or the process is asked to stop.
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

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True

    def _spawn(self) -> None:
        options = {"num_cpus": self.share.num_cpus, "num_gpus": self.share.num_gpus}
        worker = ray.remote(_Worker).options(**options, max_restarts=0, max_concurrency=2).remote(self.build)
        self._starting[worker.load.remote()] = worker

    def _dispatch(self) -> None:
        while self._todo and self._idle:
            unit, worker = self._todo.popleft(), self._idle.pop()
            self._attempts[unit.id] = self._attempts.get(unit.id, 0) + 1
            self._running[worker.run.remote(unit)] = (worker, unit)

    def _collect(self) -> Iterator[Record]:
        ready, _ = ray.wait([*self._starting, *self._running], num_returns=1, timeout=_POLL_S)
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
                continue
            worker, unit = self._running.pop(reference)
            try:
                record = ray.get(reference)
            except RayActorError as error:
                self._spawn()
                self._retry(unit, f"its worker died ({_last_line(error)})")
            except RayTaskError as error:
                self._idle.append(worker)
                self._raise_if_final(error)
                self._retry(unit, _last_line(error))
            except RayError as error:  # among them: an exception that cannot be unpickled here
                self._idle.append(worker)
                self._retry(unit, _last_line(error))
            else:
                self._idle.append(worker)
                yield record

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            self._idle.append(worker)  # to be ended with the others
            self._raise_if_final(error)
            raise
        except RayActorError as error:
            self._start_deaths += 1
            if self._start_deaths >= _MAX_START_DEATHS:
                raise JobError(
                    f"workers die while they load the model ({_last_line(error)}); "
                    "it may be short of memory: give cluster.num_workers a smaller number, or take a smaller model"
                ) from error
            self._spawn()
        else:
            self._start_deaths = 0
            self._idle.append(worker)

    def _retry(self, unit: Any, reason: str) -> None:
        if self._attempts[unit.id] < self.max_attempts:
            log.warning("%s: attempt %d failed: %s", unit.id, self._attempts[unit.id], reason)
            self._todo.append(unit)
        else:
            log.error("%s: set aside after %d attempts: %s", unit.id, self.max_attempts, reason)
            self.failed[unit.id] = reason

    def _raise_if_final(self, error: RayTaskError) -> None:
        cause = error.cause
        if isinstance(cause, ConfigError | JobError):
            raise type(cause)(str(cause)) from error

    def _live_rows(self) -> tuple[int, int]:
        try:
            counts = ray.get([worker.rows.remote() for worker, _ in self._running.values()], timeout=_POLL_S)
        except RayError:  # a worker that is busy or dying has nothing to tell this second
            return (0, 0)
        return sum(rows for rows, _ in counts), sum(rejected for _, rejected in counts)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
