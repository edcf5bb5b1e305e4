"""How a run is asked to leave before its end: by a signal to a process of it, or by a file in its directory."""

import contextlib
import enum
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pixart_data.retries import storage
from pixart_model.parallel import World

FILE = "stop"
"""Its name in the run's directory, for who cannot reach the processes with a signal; what it holds is not read."""

_log = logging.getLogger(__name__)


class Wish(enum.IntEnum):
    """What was asked for; of several, the largest counts."""

    GO_ON = 0
    LEAVE = 1
    """SIGTERM or the file: save, and end as if all was done."""
    INTERRUPT = 2
    """Ctrl-C: save, and end as interrupted."""


class Stops:
    """What this process was asked for so far, and what all of them were."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._path, self._world = run_dir / FILE, world
        self._wish = Wish.GO_ON  # only `hear` sets it, which may come between any two lines of this class

    def asked(self) -> Wish:
        """Return what the processes were asked for, the same in all of them; they have to call it together."""
        filed = Wish.LEAVE if self._world.is_first and self._is_filed() else Wish.GO_ON
        return Wish(self._world.largest(max(filed, self._wish)))

    def forget(self) -> bool:
        """Take the file away, once what it asks for is done, or before a run has begun.

        Returns:
            Whether there was one, in the first process.

        Raises:
            JobError: If the storage fails.
        """
        if not self._world.is_first:
            return False
        with storage(self._path):
            try:
                self._path.unlink()
            except FileNotFoundError:
                return False
        return True

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C ends the run where it is, once a checkpoint that is being written is there."""
        if number == signal.SIGINT and self._wish == Wish.INTERRUPT:
            raise KeyboardInterrupt
        self._wish = max(self._wish, Wish.INTERRUPT if number == signal.SIGINT else Wish.LEAVE)

    def _is_filed(self) -> bool:
        try:
            return self._path.exists()
        except OSError:  # a storage that does not answer is no reason to leave
            return False


@contextlib.contextmanager
def heeded(run_dir: Path, world: World) -> Iterator[Stops]:
    """Listen while a run goes on: to SIGTERM and Ctrl-C, where Python lets this thread do so, and for the file.

    To be entered by who holds the run's directory, for a file that is there by then is of an earlier run.

    Raises:
        JobError: If the storage fails.
    """
    stops = Stops(run_dir, world)
    if stops.forget():
        _log.warning(
            "%s: removed: it was there before this run began, and asks an earlier one to stop; to stop this one, make "
            "it again",
            run_dir / FILE,
        )
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stops.hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
