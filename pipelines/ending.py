"""Ending in time: Slurm, Kubernetes and Ray send SIGTERM and kill what is still there 30 s later."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pixart_data.errors import JobError

LIMIT_S = 27.0
_MESSAGE = b"stopped by SIGTERM, and Ray did not answer in time; run the same command again to go on where it was\n"
_EXIT_CODE = 4


class Stopped(JobError):
    """The process was asked to stop, and did."""


def stopped() -> Stopped:
    """Return the error that says so."""
    return Stopped("stopped by SIGTERM; run the same command again to go on where it was")


def stop_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped` from here on; Ray puts a handler of its own in place when it is connected."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    raise stopped()


@contextlib.contextmanager
def exit_in_time(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Stop on SIGTERM, and end this process `limit_s` seconds after it also where a call never returns.

    A handler of Python's waits for the call that the main thread is in; with the head of the cluster gone, a call into
    Ray can take for ever. What is committed stays, and the next run finds that this one is dead.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, limit_s), name="ending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int, limit_s: float) -> None:
    while numbers := os.read(reader, 64):
        if signal.SIGTERM in numbers:
            deadline_s = time.monotonic() + limit_s
            while (left_s := deadline_s - time.monotonic()) > 0:
                if select.select([reader], [], [], left_s)[0] and not os.read(reader, 64):
                    return
            os.write(2, _MESSAGE)
            os._exit(_EXIT_CODE)
