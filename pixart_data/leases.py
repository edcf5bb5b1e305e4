"""One run at a time on an output, on any storage: the lease that a driver holds while it works.

A lease is a numbered file `.lease/000007.json`, made only where there is none of that number, which local file
systems, NFS and object stores all do for one of several at once. Its holder writes it anew every few seconds. Whoever
wants it reads the highest number: one whose holder has let go, is known to be dead, or has not written for a while is
followed by the next number. So a lease is never taken from under a holder that lives, and a holder that was thought
dead (a machine that slept) finds a higher number than its own and stops before it commits anything.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pixart_data.errors import JobError, PixArtError
from pixart_data.processes import is_alive, process_name
from pixart_data.storage import TEMPORARY, delete, is_remote, list_files, make_dir, read_bytes, write_atomic, write_new

log = logging.getLogger(__name__)

FOLDER = ".lease"
RENEW_S = 10.0
EXPIRE_S = 45.0
"""A holder that has not renewed its lease for so long is taken to be dead."""

_POLL_S = 1.0


@dataclass(frozen=True)
class _Claim:
    """What a lease file says."""

    token: str
    process: str
    holder: str = ""
    beat: int = 0
    released: bool = False


class Lease:
    """A held lease, renewed in a thread of its own."""

    def __init__(self, root: Path, number: int, claim: _Claim) -> None:
        self.root, self.number = root, number
        self._claim = claim
        self._lost = ""
        self._renewed_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lease is still held; to be called before every commit.

        Raises:
            JobError: If another run has taken it, or it could not be renewed for so long that one may.
        """
        if not self._lost and time.monotonic() - self._renewed_s > EXPIRE_S / 2:
            self._renew_once()  # the process may have slept: see who came meanwhile
        if not self._lost and time.monotonic() - self._renewed_s > EXPIRE_S / 2:
            self._lost = "its lease could not be renewed"
        if self._lost:
            raise JobError(f"{self.root}: this run stops, {self._lost}; run the same command again to go on")

    def release(self) -> None:
        """Let go, so that the next run need not wait."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            path, text = _path(self.root, self.number), _text(replace(self._claim, released=True))
            try:
                write_atomic(path, text)
            except (PixArtError, OSError):
                with contextlib.suppress(OSError):
                    _write_over(path, text)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            self._renew_once()

    def _renew_once(self) -> None:
        try:
            numbers = _numbers(self.root)
            if not numbers or numbers[-1] > self.number:
                self._lost = "another run has taken over"
                return
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            write_atomic(_path(self.root, self.number), _text(self._claim))
            self._renewed_s = time.monotonic()
        except (PixArtError, OSError) as error:
            log.warning("%s: the lease could not be renewed, trying again: %s", self.root, error)


def _write_over(path: Path, text: bytes) -> None:
    """Write a local file where it lies: on a full disk there is no room for another one beside it."""
    if is_remote(path):
        return
    with path.open("r+b") as file:
        file.write(text)
        file.truncate()


@dataclass(frozen=True)
class Holder:
    """Who holds an output directory, or held it last.

    Attributes:
        name: Machine and process, for people.
        released: Whether it has let go.
        is_alive: Whether it has not, and shows signs of life.
    """

    name: str
    released: bool
    is_alive: bool


def last_holder(root: Path) -> Holder | None:
    """Return who holds a local output directory or held it last, None if nobody ever did; nothing is changed."""
    numbers = _numbers(root)
    claim = _read(root, numbers[-1]) if numbers else None
    if claim is None:
        return None
    alive = not claim.released and is_alive(claim.process)
    if alive and claim.process.split(".")[0] != process_name().split(".")[0]:
        with contextlib.suppress(OSError):  # of another machine the last sign of life is all that is known
            alive = time.time() - _path(root, numbers[-1]).stat().st_mtime < EXPIRE_S
    return Holder(claim.holder, claim.released, alive)


@contextlib.contextmanager
def output_lock(root: Path) -> Iterator[Lease]:
    """Hold an output directory for one run.

    The lease of a run that died on this machine is taken over at once; that of one that died on another machine after
    `EXPIRE_S` seconds without a sign of life.

    Raises:
        JobError: If another run holds it.
    """
    make_dir(root)
    lease = _acquire(root)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(root: Path) -> Lease:
    while True:
        numbers = _numbers(root)
        if numbers:
            _await_end(root, numbers[-1])
        number = (numbers[-1] if numbers else 0) + 1
        claim = _Claim(uuid.uuid4().hex, process_name(), f"{socket.gethostname()}, process {os.getpid()}")
        if write_new(_path(root, number), _text(claim)) and _numbers(root)[-1] == number:
            temporary = (path for path in list_files(root / FOLDER) if path.name.startswith(TEMPORARY))
            delete([*(_path(root, old) for old in numbers), *temporary])  # what holders that were killed left
            return Lease(root, number, claim)


def _await_end(root: Path, number: int) -> None:
    """Return when the lease of that number is no longer held.

    Raises:
        JobError: If its holder shows signs of life.
    """
    first = _read(root, number)
    if first is None or first.released or not is_alive(first.process):
        return
    busy = f"{root}: another run is writing here ({first.holder}); wait for it, or choose another output"
    if is_alive(first.process) and first.process.split(".")[0] == process_name().split(".")[0]:
        raise JobError(busy)
    log.info("%s: a run on another machine holds it; waiting up to %.0f s for a sign of life", root, EXPIRE_S)
    deadline_s = time.monotonic() + EXPIRE_S
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        claim = _read(root, number)
        if claim is None or claim.released:
            return
        if claim.beat != first.beat:
            raise JobError(busy)
    log.warning("%s: no sign of life of the run that held it; taking over", root)


def _numbers(root: Path) -> list[int]:
    names = (path.name.removesuffix(".json") for path in list_files(root / FOLDER) if path.name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdigit())


def _path(root: Path, number: int) -> Path:
    return root / FOLDER / f"{number:06d}.json"


def _text(claim: _Claim) -> bytes:
    return json.dumps(asdict(claim)).encode()


def _read(root: Path, number: int) -> _Claim | None:
    """Return what a lease file says; None if it is gone or damaged, and thus held by nobody."""
    try:
        return _Claim(**json.loads(read_bytes(_path(root, number))))
    except (FileNotFoundError, ValueError, TypeError):
        return None
