"""Batches that do not fit into memory: halved, and remembered as too large."""

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pixart_data import events

R = TypeVar("R")

log = logging.getLogger(__name__)


class Halving(Generic[R]):
    """Calls a function with batches that fit into memory.

    Args:
        function: Takes a batch, anything that can be sliced, and returns one result for each of its rows.
        weigh: What of a batch costs memory; its number of rows, or for padded text its number of tokens.
    """

    def __init__(self, function: Callable[[Any], list[R]], weigh: Callable[[Any], int] = len) -> None:
        self.function, self.weigh = function, weigh
        self.limit: int | None = None

    def __call__(self, rows: Any) -> list[R]:
        """Return the results of all rows, in order.

        Raises:
            RuntimeError, MemoryError: As the function does, also when a single row does not fit.
        """
        if len(rows) <= 1 or self.limit is None or self.weigh(rows) <= self.limit:
            try:
                return self.function(rows)
            except (RuntimeError, MemoryError) as error:
                if len(rows) <= 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler: the exception holds the frames, and they hold the tensors of the failed batch.
            self.limit = self.weigh(rows) // 2
            events.note("batch_halved")
            log.warning("a batch of %d did not fit into memory; batches are halved from here on", len(rows))
            _release()
        middle = (len(rows) + 1) // 2
        return self(rows[:middle]) + self(rows[middle:])


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on a GPU (torch has an error for that) or on a CPU (where it has only words)."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)


def _release() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
