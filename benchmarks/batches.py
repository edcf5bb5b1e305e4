"""What every reader of `benchmarks.read_shards` yields, and comparing it with what was written."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.samples import CHANNELS, MAX_TOKENS, SIDE, WIDTH, Samples

BATCH_SIZE = 64
SEQUENTIAL, PLANNED = "sequential", "planned"


class Batch(NamedTuple):
    """B samples, ready for the device: contiguous tensors in host memory, valid until the next batch is taken.

    Attributes:
        keys: B keys.
        moments: fp16 (B, 2, C, H, W); of the reference fp32 (B, 2 C, H, W).
        text: The tensors that text consists of. Packed, the tokens of one sample after those of another, such as bf16
            (N, D), or one for each part of a codec; of the reference padded, fp32 (B, 1, 120, D).
    """

    keys: Sequence[str]
    moments: Tensor
    text: Sequence[Tensor]


class Reader(Protocol):
    """One way to read the samples."""

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end, in one of the two orders."""


Expected = Callable[[int], tuple[Tensor, Sequence[Tensor]]]
"""What a reader must give of a sample: moments, and its share of each tensor of text, along the first axis."""


class Buffers:
    """The memory of one batch, used again for the next: making it anew would cost more than filling it."""

    def __init__(self) -> None:
        self.moments = np.empty((BATCH_SIZE, 2, CHANNELS, SIDE, SIDE), np.float16)
        self.text = np.empty((BATCH_SIZE * MAX_TOKENS, WIDTH), np.int16)

    def pack(
        self, keys: Sequence[str], moments: Sequence[npt.NDArray[np.float16]], texts: Sequence[npt.NDArray[np.int16]]
    ) -> Batch:
        """Copy the arrays of the samples into a batch; texts are the bits of bf16, (n D,)."""
        np.stack(moments, out=self.moments)
        num_tokens = sum(text.size for text in texts) // WIDTH
        np.concatenate(texts, out=self.text[:num_tokens].reshape(-1))
        return self.filled(keys, num_tokens)

    def filled(self, keys: Sequence[str], num_tokens: int) -> Batch:
        """Return the batch that lies in the memory."""
        text = torch.from_numpy(self.text[:num_tokens]).view(torch.bfloat16)  # (N, D)
        return Batch(keys, torch.from_numpy(self.moments), [text])


def as_tensor(bits: npt.NDArray[np.uint16]) -> Tensor:
    """Return bits of bf16 as a tensor, a copy."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16)


def packed(samples: Samples, i: int) -> tuple[Tensor, Sequence[Tensor]]:
    """Return what a sample is, as most readers give it: fp16 (2, C, H, W) and bf16 (n, D)."""
    return torch.from_numpy(np.array(samples.moments[i])), [as_tensor(samples.text(i))]


def check(name: str, reader: Reader, samples: Samples, order: str, expected: Expected) -> None:
    """Compare one pass with what was written, bit by bit.

    Raises:
        ValueError: If a sample is doubled, different, or in another place than its order says.
    """
    seen: list[int] = []
    num_batches = len(samples) // BATCH_SIZE
    with contextlib.closing(reader.stream(order)) as stream:
        for batch in itertools.islice(stream, num_batches):
            numbers = [samples.number(key) for key in batch.keys]
            _require_same(f"{name}, {order}", batch, [expected(i) for i in numbers])
            seen += numbers
    if len(seen) != num_batches * BATCH_SIZE or len(set(seen)) != len(seen):
        raise ValueError(
            f"{name}, {order}: {num_batches} batches hold {len(seen)} samples, {len(set(seen))} of them different"
        )
    if (seen == sorted(seen)) != (order == SEQUENTIAL):
        raise ValueError(f"{name}, {order}: the samples come in another order: {seen[:8]}")


def _require_same(where: str, batch: Batch, wanted: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
    texts = [torch.cat(list(shares)) for shares in zip(*(text for _, text in wanted), strict=True)]
    pairs = [(batch.moments, torch.stack([moments for moments, _ in wanted])), *zip(batch.text, texts, strict=True)]
    for found, right in pairs:
        if not found.is_contiguous() or found.dtype != right.dtype or found.shape != right.shape:
            raise ValueError(f"{where}: expected {right.dtype} {right.shape}, found {found.dtype} {found.shape}")
        if not torch.equal(found.view(torch.uint8), right.view(torch.uint8)):
            raise ValueError(f"{where}: a batch differs from what was written: {batch.keys}")
