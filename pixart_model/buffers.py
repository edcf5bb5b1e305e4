"""Host memory that batches are read into, one after another: taken once, grown to the largest batch, and used again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """The memory of one batch at a time: named pieces, each as large as the largest that was asked for.

    Attributes:
        turn: How many batches it was lent to before.

    Args:
        pinned: Page-locked, so that a GPU copies from it while the host goes on; needs CUDA.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned, self.turn = pinned, 0
        self._memory: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def release(self) -> None:
        """Take the memory back from the batch that it was lent to."""
        self.turn += 1

    def wait(self) -> None:
        """Wait until devices have copied what they were asked to."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def guard(self, device: torch.device) -> None:
        """Note that copies to a device have been queued, which the next batch has to wait for."""
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(device))

    def take(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return a tensor in the piece of this name; its values are what was there before."""
        size_bytes = dtype.itemsize * math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or len(memory) < size_bytes:
            spare = 0 if memory is None else size_bytes // 8  # batches differ: not to grow at each a little longer
            memory = torch.empty(size_bytes + spare, dtype=torch.uint8, pin_memory=self.pinned)
            self._memory[name] = memory
        return memory[:size_bytes].view(dtype).view(*shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, to be written to."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view
