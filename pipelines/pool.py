"""The scheduler: units of work on Ray actors that load a model once.

Ray's own ActorPool has no limit on attempts, and calls queued on an actor that waits for capacity are stuck with it.
Here a worker gets work only after it has answered a ping and loaded its model, a unit that fails is tried again
elsewhere a limited number of times, a worker that dies or hangs is replaced, and two units share a worker so that its
model does not wait while one of them ends. When a worker dies, either of its units may be to blame: from then on each
gets a worker to itself, and only what kills a worker alone is set aside. An error that no retry can mend (a setting,
full storage) ends the job.
"""

import contextlib
import logging
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipelines.cluster import Share
from pipelines.ending import stopped
from pipelines.worker import Done, Stage, Work, Worker
from pixart_data.errors import ConfigError, JobError, PixArtError, TransientError

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_MAX_FAILURES_AT_FIRST = 10
_POLL_S = 1.0
_GROW_EVERY_S = 30.0
_GRACE_S = 20.0  # from SIGTERM on, for units in flight; Slurm, Kubernetes and Ray give 30 s before they kill
_LONGEST_PAUSE_S = 60.0
_MAX_PAUSES = 10  # with what `retries` waits, a quarter of an hour of storage that is away


class Watch(Protocol):
    """Who is told of what happens while units are worked on."""

    def workers(self, num_working: int, num_waiting: int) -> None:
        """Called about once a second."""

    def live(self, rows: int, rejected: int) -> None:
        """Called about once a second with the rows of the units in flight."""

    def unit_failed(self, unit: str, attempt: int, reason: str, final: bool) -> None:
        """Called for each failed attempt; a final one sets the unit aside."""

    def note(self, kind: str, count: int = 1) -> None:
        """Called for what else is worth counting."""


@dataclass
class _Hand:
    """A worker: what it runs, and the last news of it."""

    actor: Any
    running: dict[Any, Work] = field(default_factory=dict)
    alone: bool = False
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    changed_s: dict[str, float] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    beats: int = 0


@dataclass
class Pool:
    """Workers and the units they hold. `failed` names the units set aside, with the last error of each.

    Attributes:
        units_per_worker: How many units share a worker.
        stall_s: A unit without a new row for so long hangs: its worker is killed.
        grow: Returns how many workers the cluster has room for by now; None keeps the number.
    """

    build: Callable[[], Stage]
    share: Share
    max_attempts: int
    watch: Watch
    units_per_worker: int = 1
    stall_s: float = 1800.0
    grow: Callable[[], int] | None = None
    failed: dict[str, str] = field(default_factory=dict)
    _todo: deque[Work] = field(default_factory=deque)
    _attempts: Counter[str] = field(default_factory=Counter)
    _alone: set[str] = field(default_factory=set)
    _pauses: Counter[str] = field(default_factory=Counter)
    _not_before_s: dict[str, float] = field(default_factory=dict)
    _pinged: dict[Any, _Hand] = field(default_factory=dict)
    _loading: dict[Any, tuple[_Hand, float]] = field(default_factory=dict)
    _hands: list[_Hand] = field(default_factory=list)
    _asked: dict[Any, _Hand] = field(default_factory=dict)
    _respawn_s: list[float] = field(default_factory=list)
    _grown_s: float = 0.0
    _num_loaded: int = 0
    _num_done: int = 0
    _num_failures: int = 0
    _failed_starts: int = 0
    _stopped_s: list[float] = field(default_factory=list)
    _wake: threading.Event = field(default_factory=threading.Event)

    def work(self, units: Sequence[Work]) -> Iterator[tuple[Done, int]]:
        """Yield every unit that gets done, as it gets done, with the number of its attempt.

        Raises:
            ConfigError: If the stage cannot be built with these settings.
            JobError: If storage fails, workers keep dying, nothing succeeds, or the process is asked to stop.
        """
        self._todo = deque(units)
        self._grown_s = time.monotonic()
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            for _ in range(self.share.num_workers):
                self._spawn()
            while self._goes_on():
                self._dispatch()
                yield from self._collect()
                self._listen()
                self._end_hung()
                self._grow()
            if self._stopped_s:
                raise stopped()
        finally:
            signal.signal(signal.SIGTERM, previous)
            starting = [*self._pinged.values(), *(hand for hand, _ in self._loading.values())]
            for hand in [*self._hands, *starting]:
                ray.kill(hand.actor)

    def _goes_on(self) -> bool:
        """After SIGTERM, units in flight may end within the grace; after a second one, they may not."""
        running = any(hand.running for hand in self._hands)
        if not self._stopped_s:
            return bool(self._todo) or running
        return running and len(self._stopped_s) == 1 and time.monotonic() - self._stopped_s[0] < _GRACE_S

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_s.append(time.monotonic())
        self._wake.set()

    # Workers

    def _spawn(self) -> None:
        options = {"num_cpus": self.share.num_cpus, "num_gpus": self.share.num_gpus}
        concurrency = self.units_per_worker + 1  # and one that answers
        actor = ray.remote(Worker).options(**options, max_restarts=0, max_concurrency=concurrency).remote(self.build)
        self._pinged[actor.ping.remote()] = _Hand(actor)

    def _grow(self) -> None:
        now_s = time.monotonic()
        due = [at_s for at_s in self._respawn_s if at_s <= now_s]
        self._respawn_s = [at_s for at_s in self._respawn_s if at_s > now_s]
        for _ in due:
            self._spawn()
        if self.grow is None or time.monotonic() - self._grown_s < _GROW_EVERY_S:
            return
        self._grown_s = time.monotonic()
        present = len(self._hands) + len(self._pinged) + len(self._loading) + len(self._respawn_s)
        for _ in range(min(self.grow() - present, len(self._todo))):
            self._spawn()

    def _started(self, reference: Any, hand: _Hand, loaded: bool) -> None:
        """A first load that fails for a stated reason ends the job; later ones may be the fault of one machine."""
        try:
            ray.get(reference)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PixArtError) and not isinstance(cause, TransientError) and not self._num_loaded:
                ray.kill(hand.actor)
                raise type(cause)(str(cause)) from error
            self._not_started(hand, _last_line(error), is_dead=not isinstance(error, RayTaskError))
        else:
            if not loaded:
                self._loading[hand.actor.load.remote()] = (hand, time.monotonic())
                return
            self._failed_starts = 0
            self._num_loaded += 1
            self._hands.append(hand)

    def _not_started(self, hand: _Hand, reason: str, is_dead: bool) -> None:
        """Put another worker in the place of one that did not come up; several of one node die at once, with it."""
        ray.kill(hand.actor)
        self.watch.note("worker_died")
        log.warning("a worker failed to load its model: %s", reason)
        self._failed_starts += 1
        most = _MAX_FAILED_STARTS * (self.share.num_workers if is_dead else 1)
        if self._failed_starts >= most and not self._hands:
            raise JobError(
                f"workers keep failing while they load the model ({reason}); if memory is short, give "
                "cluster.num_workers a smaller number, or take a smaller model"
            )
        if self._failed_starts > most:  # others work, and this place in the cluster is no good
            self._respawn_s.append(time.monotonic() + _GROW_EVERY_S)
        else:
            self._spawn()

    def _replace(self, hand: _Hand) -> None:
        """Put another worker in the place of one that is dead or hangs."""
        ray.kill(hand.actor)
        if hand in self._hands:
            self._hands.remove(hand)
        self._asked = {reference: asked for reference, asked in self._asked.items() if asked is not hand}
        self._spawn()

    # Units

    def _dispatch(self) -> None:
        """Hand units out, evenly; one that may kill its worker gets a worker to itself."""
        if self._stopped_s:
            return
        now_s = time.monotonic()
        for _ in range(len(self._todo)):
            if not any(self._has_room(hand) for hand in self._hands):
                return
            unit = self._todo.popleft()
            hand = self._hand_for(unit.id) if self._not_before_s.get(unit.id, 0.0) <= now_s else None
            if hand is None:
                self._todo.append(unit)
                continue
            self._attempts[unit.id] += 1
            hand.alone = unit.id in self._alone
            hand.changed_s[unit.id] = now_s
            hand.running[hand.actor.run.remote(unit)] = unit

    def _has_room(self, hand: _Hand) -> bool:
        return not hand.running or (not hand.alone and len(hand.running) < self.units_per_worker)

    def _hand_for(self, unit: str) -> _Hand | None:
        room = [hand for hand in self._hands if self._has_room(hand)]
        if unit in self._alone:
            room = [hand for hand in room if not hand.running]
        return min(room, key=lambda hand: len(hand.running), default=None)

    def _collect(self) -> Iterator[tuple[Done, int]]:
        running = {reference: hand for hand in self._hands for reference in hand.running}
        waited = [*self._pinged, *self._loading, *running]
        if not waited:  # all units are paused
            self._wake.wait(_POLL_S)
            return
        ray.wait(waited, num_returns=1, timeout=_POLL_S)
        ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        for reference in ready:
            if reference in self._pinged:
                self._started(reference, self._pinged.pop(reference), loaded=False)
            elif reference in self._loading:
                self._started(reference, self._loading.pop(reference)[0], loaded=True)
            elif reference in running[reference].running:  # or its worker has just been found dead by its other unit
                yield from self._finished(reference, running[reference])

    def _finished(self, reference: Any, hand: _Hand) -> Iterator[tuple[Done, int]]:
        try:
            done = ray.get(reference)
        except RayTaskError as error:
            unit = hand.running.pop(reference)
            hand.rows.pop(unit.id, None)
            cause = error.cause
            log.debug("%s: %s", unit.id, error)  # with the traceback
            if isinstance(cause, ConfigError | JobError) and not isinstance(cause, TransientError):
                raise type(cause)(str(cause)) from error
            if isinstance(cause, TransientError):
                self._pause(unit)
            self._retry(unit, _last_line(error), blamed=True)
        except RayError as error:  # the worker is dead, or what it sent cannot be read here
            preempted = bool(getattr(error, "preempted", False))
            self.watch.note("preempted" if preempted else "worker_died")
            self._lost(hand, f"its worker died ({_last_line(error)})", preempted)
        else:
            unit = hand.running.pop(reference)
            hand.rows.pop(unit.id, None)
            self._num_done += 1
            yield done, self._attempts[unit.id]

    def _lost(self, hand: _Hand, reason: str, preempted: bool = False) -> None:
        """Take back the units of a worker that is dead; alone, its unit is to blame."""
        units = list(hand.running.values())
        hand.running.clear()
        self._replace(hand)
        for unit in units:
            if preempted:
                self._attempts[unit.id] -= 1
            else:
                self._alone.add(unit.id)
            self._retry(unit, reason, blamed=len(units) == 1)

    def _pause(self, unit: Work) -> None:
        """Leave a unit alone for a while; storage that was away is not its fault, within limits."""
        self._pauses[unit.id] += 1
        self._not_before_s[unit.id] = time.monotonic() + min(2.0 ** self._pauses[unit.id], _LONGEST_PAUSE_S)
        if self._pauses[unit.id] <= _MAX_PAUSES:
            self._attempts[unit.id] -= 1

    def _retry(self, unit: Work, reason: str, blamed: bool) -> None:
        attempt = self._attempts[unit.id]
        final = blamed and attempt >= self.max_attempts
        self.watch.unit_failed(unit.id, attempt, reason, final)
        self._num_failures += 1
        most = max(_MAX_FAILURES_AT_FIRST, 2 * self.share.num_workers)
        if attempt and not self._num_done and self._num_failures >= most:
            raise JobError(
                f"the first {self._num_failures} attempts all failed, the last one at {unit.id}: {reason}; "
                "mend the cause, then run the same command again"
            )
        if final:
            log.error("%s: set aside after %d attempts: %s", unit.id, attempt, reason)
            self.failed[unit.id] = reason
            return
        log.warning("%s: attempt %d failed: %s", unit.id, max(attempt, 1), reason)
        self._todo.append(unit)

    # News

    def _listen(self) -> None:
        """Take the signs of life that have come in and ask for others; never waits."""
        ready, _ = ray.wait([*self._asked], num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for reference in ready:
            hand = self._asked.pop(reference)
            with contextlib.suppress(RayError):  # a dead worker has nothing to tell
                self._heard(hand, ray.get(reference))
        asked = {id(hand) for hand in self._asked.values()}
        for hand in self._hands:
            if hand.running and id(hand) not in asked:
                self._asked[hand.actor.pulse.remote()] = hand
        rows = [counts for hand in self._hands for counts in hand.rows.values()]
        self.watch.workers(len(self._hands), len(self._pinged) + len(self._loading))
        self.watch.live(sum(count for count, _ in rows), sum(rejected for _, rejected in rows))

    def _heard(self, hand: _Hand, pulse: Any) -> None:
        now_s = time.monotonic()
        units = {unit.id for unit in hand.running.values()}
        for unit in units:
            if pulse.rows.get(unit) != hand.rows.get(unit) or pulse.beats != hand.beats:
                hand.changed_s[unit] = now_s
        hand.beats = pulse.beats
        hand.rows = {unit: counts for unit, counts in pulse.rows.items() if unit in units}
        for kind, count in (Counter(pulse.events) - hand.events).items():
            self.watch.note(kind, count)
        hand.events = Counter(pulse.events)

    def _end_hung(self) -> None:
        """Kill workers whose units stand still, and those that do not come to an end of loading."""
        now_s = time.monotonic()
        for hand in list(self._hands):
            still = [unit.id for unit in hand.running.values() if now_s - hand.changed_s[unit.id] > self.stall_s]
            if still:
                self.watch.note("worker_hung")
                self._lost(hand, f"no row in {self.stall_s:g} s, its worker was killed (cluster.stall_s)")
        for reference, (hand, since_s) in list(self._loading.items()):
            if now_s - since_s > self.stall_s:
                del self._loading[reference]
                self.watch.note("worker_hung")
                self._not_started(hand, f"not done after {self.stall_s:g} s (cluster.stall_s)", is_dead=True)


def _last_line(error: BaseException) -> str:
    if isinstance(error, OutOfMemoryError):  # its last line is advice on settings of Ray that are not used here
        return "memory ran out on its machine, and Ray killed it"
    if isinstance(error, RayTaskError) and isinstance(error.cause, PixArtError):
        return str(error.cause)  # made to be read, and without the name of its class
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
