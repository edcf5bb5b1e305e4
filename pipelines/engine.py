"""A loaded model that several units share: one call at a time, the time inside it counted."""

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

M = TypeVar("M", bound=Callable[[dict[str, Any]], dict[str, Any]])

_counter = threading.Lock()
_busy: list[float] = [0.0]


class Engine(Generic[M]):
    """Lets the units of a worker take turns at its model.

    While one unit decodes its last pictures or publishes its files, the other keeps the model busy.

    Attributes:
        model: The model, a callable over column batches.
    """

    def __init__(self, model: M) -> None:
        self.model = model
        self._turn = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what the model makes of a batch."""
        with self._turn:
            started_s = time.monotonic()
            try:
                return self.model(batch)
            finally:
                with _counter:
                    _busy[0] += time.monotonic() - started_s


def busy_s() -> float:
    """Return the seconds that this process has spent inside of models, for whichever unit."""
    with _counter:
        return _busy[0]
