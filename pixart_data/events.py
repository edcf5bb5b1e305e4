"""What happened on the way that is worth counting, and signs that something still happens."""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()
_beats: Counter[str] = Counter()


def note(kind: str) -> None:
    """Count an event of this process: storage that was waited for, a batch that was halved."""
    with _lock:
        _counts[kind] += 1


def counts() -> dict[str, int]:
    """Return the events of this process so far, by kind."""
    with _lock:
        return dict(_counts)


def beat() -> None:
    """Give a sign of life from within a long step that has no rows to show, such as the copy of a large tar."""
    with _lock:
        _beats["all"] += 1


def beats() -> int:
    """Return the number of signs of life so far."""
    with _lock:
        return _beats["all"]
