"""What runs in the processes of a pipeline: a stage, built once, that does one unit after another."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from pipelines.engine import busy_s
from pixart_data import events
from pixart_data.commits import Record
from pixart_data.errors import DataError, TransientError
from pixart_data.retries import is_transient

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


class Retrying(Stage, Protocol):
    """A stage that can do the rejected rows of a unit again."""

    def retry(self, unit: Any, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Do the rows again that were rejected for one of `reasons`; return the record that replaces `record`.

        Files stay or gain others beside them; only the unit's table of rows is written anew.
        """


class Amending(Stage, Protocol):
    """A stage that can do what a done unit still lacks."""

    def amend(self, unit: Any, record: Record, report: Report) -> Record:
        """Do what is missing; return the record that replaces `record`."""


@dataclass(frozen=True)
class Amend:
    """A unit that is done but for something that the job has come to ask for since."""

    unit: Any
    record: Record

    @property
    def id(self) -> str:
        """The unit's name."""
        return str(self.unit.id)


@dataclass(frozen=True)
class Retry:
    """A unit of which only some rejected rows are to be done again."""

    unit: Any
    record: Record
    reasons: tuple[str, ...]

    @property
    def id(self) -> str:
        """The unit's name."""
        return str(self.unit.id)

    @property
    def num_rows(self) -> int:
        """The rows that are done again."""
        return sum(self.record.rejected.get(reason, 0) for reason in self.reasons)


@dataclass(frozen=True)
class Done:
    """A unit that a worker has done: the record to be written, and what it took.

    Attributes:
        seconds: From its start to its end, other units of the worker working beside it.
        busy_s: How long the worker's model was at work meanwhile, for this unit or for another one.
    """

    record: Record
    worker: str
    seconds: float
    busy_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Pulse:
    """A sign of life: rows and rejected rows of each unit in flight, and events and beats of the process so far."""

    rows: dict[str, tuple[int, int]]
    events: dict[str, int]
    beats: int


class Worker:
    """The actor. Units run in threads of their own, `pulse` is answered in another."""

    def __init__(self, build: Callable[[], Stage]) -> None:
        self._build = build
        self._stage: Stage | None = None
        self._rows: dict[str, tuple[int, int]] = {}

    def ping(self) -> None:
        """Answer: this worker has been given its place in the cluster."""

    def load(self) -> None:
        """Build the stage, which loads its model."""
        self._stage = self._build()

    def run(self, unit: Work) -> Done:
        """Do a unit."""
        if self._stage is None:
            raise RuntimeError("run before load")
        self._rows[unit.id] = (0, 0)
        started_s, busy_before_s = time.monotonic(), busy_s()

        def report(rows: int, rejected: int) -> None:
            self._rows[unit.id] = (rows, rejected)

        try:
            record = _do(self._stage, unit, report)
        finally:
            self._rows.pop(unit.id, None)
        seconds = round(time.monotonic() - started_s, 6)
        return Done(record, _name(), seconds, round(busy_s() - busy_before_s, 6), _peak_rss_bytes())

    def pulse(self) -> Pulse:
        """Return a sign of life."""
        return Pulse(dict(self._rows), events.counts(), events.beats())


def _do(stage: Any, unit: Work, report: Report) -> Record:
    """Do a unit, or some of it; an input that could not be read for reasons that may pass is no fault of it."""
    try:
        if isinstance(unit, Retry):
            record: Record = stage.retry(unit.unit, unit.reasons, unit.record, report)
        elif isinstance(unit, Amend):
            record = stage.amend(unit.unit, unit.record, report)
        else:
            record = stage(unit, report)
    except DataError as error:
        if isinstance(error.__cause__, OSError) and is_transient(error.__cause__):
            raise TransientError(str(error)) from error
        raise
    return record


def _name() -> str:
    return f"{ray.util.get_node_ip_address()}:{os.getpid()}"


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
