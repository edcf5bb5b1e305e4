"""What happened on the way that is worth counting: storage that was waited for, batches that were halved."""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def note(kind: str) -> None:
    """Count an event of this process."""
    with _lock:
        _counts[kind] += 1


def counts() -> dict[str, int]:
    """Return the events of this process so far, by kind."""
    with _lock:
        return dict(_counts)
