"""Reading batches ahead of who asks for them: by threads of this process, or by the workers of a `DataLoader`."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from pixart_model.batches import HostBatch
from pixart_model.buffers import Buffers
from pixart_model.devices import follow

if TYPE_CHECKING:
    from pixart_model.dataset import Dataset

T = TypeVar("T")


def read_ahead(
    numbers: Iterator[int],
    locate: Callable[[int], T],
    read: Callable[[int, T, Buffers], HostBatch],
    num_threads: int,
    num_prefetch: int,
    pinned: bool = False,
) -> Generator[HostBatch, None, None]:
    """Yield batches in the order of their numbers, without end.

    The memory of `num_prefetch + num_threads + 1` batches is used again and again. As many batches as are read ahead
    have been located before that, so that the system can fetch them.

    Args:
        numbers: Of the batches, without end.
        locate: Says where a batch lies.
        read: Reads what was located.
        num_threads: That do both.
        num_prefetch: Batches read ahead, besides those being read.
        pinned: Read into page-locked memory; needs CUDA.
    """
    free = deque(Buffers(pinned) for _ in range(num_prefetch + num_threads + 1))
    located: deque[tuple[int, Future[T]]] = deque()
    ahead: deque[tuple[Future[HostBatch], Buffers]] = deque()
    pool = ThreadPoolExecutor(num_threads, "read", follow(torch.device("cuda" if pinned else "cpu")))

    def locate_next() -> None:
        number = next(numbers)
        located.append((number, pool.submit(locate, number)))

    def read_located(number: int, place: Future[T], memory: Buffers) -> HostBatch:
        memory.wait()
        return read(number, place.result(), memory)  # it was begun before this, so it does not wait for this

    try:
        for _ in range(num_prefetch):
            locate_next()
        while True:
            while free:
                locate_next()
                memory = free.popleft()
                ahead.append((pool.submit(read_located, *located.popleft(), memory), memory))
            future, memory = ahead.popleft()
            yield future.result()
            memory.release()
            free.append(memory)
    finally:
        if not sys.is_finalizing():  # else the threads have ended, and what shuts pools down is gone
            pool.shutdown(cancel_futures=True)


class Batches(torch.utils.data.Dataset[HostBatch]):
    """The batches of a dataset by their numbers, each in memory of its own; for a `DataLoader`'s workers.

    The numbers go on without end, so there is no length: a sampler such as `range(start, stop)` says which to read.
    Give `batch_size=None` too. A copy in another process, forked or spawned, opens the files anew.
    """

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> HostBatch:
        """Return a batch.

        Raises:
            DataError: Where a sample is damaged, as `data.damaged` has it.
        """
        return self.dataset.read(number)
