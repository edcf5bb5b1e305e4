"""Names of processes that outlive them: whether the one that left something behind is still alive."""

import contextlib
import os
import socket
from pathlib import Path


def process_name() -> str:
    """Return a name of this process that no other one gets: machine, process number, and when it started."""
    return f"{_machine()}.{os.getpid()}.{_started(os.getpid())}"


def is_alive(name: str) -> bool:
    """Tell whether the process of that name is alive; one on another machine is taken to be."""
    machine, _, rest = name.partition(".")
    number, _, started = rest.partition(".")
    if machine != _machine() or not number.isdigit():
        return True
    return _started(int(number)) == started != ""


def _machine() -> str:
    """Return what tells apart the process numbers of machines and containers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # what is Linux's own
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "".join(c if c.isalnum() else "-" for c in "-".join(part.strip() for part in parts))


def _started(number: int) -> str:
    """Return when a process started, in ticks since the machine did; empty if there is none, or it is a corpse."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return _started_elsewhere(number)
    return "" if fields[0] in ("Z", "X") else fields[19]


def _started_elsewhere(number: int) -> str:
    """Where there is no /proc, only tell whether the process is there."""
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "0"
    return "0"
