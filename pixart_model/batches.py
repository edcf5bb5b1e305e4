"""Batches, as they were read into host memory and as a training step takes them.

Legend: B samples, all of one bucket; C latent channels, H W latent cells; n_i text tokens of sample i, N of all, L of
the longest; D text width.
"""

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixart_data.codecs import Codec
from pixart_data.shards import FeatureSet
from pixart_model.buffers import Buffers
from pixart_model.packing import Packed


@dataclass(frozen=True, eq=False)
class Names:
    """Rows of an image set's index; their keys are looked up when somebody asks for them.

    Attributes:
        images: The set; pickled where the rows came from another process, to be opened only if it is needed.
        rows: (B,).
    """

    images: FeatureSet | bytes
    rows: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[type["Names"], tuple[bytes, npt.NDArray[np.uint32]]]:
        return Names, (self.images if isinstance(self.images, bytes) else pickle.dumps(self.images), self.rows)

    def keys(self) -> list[str]:
        """Return the keys; the parts of the index that hold them are read, each time."""
        images = _unpickled(self.images) if isinstance(self.images, bytes) else self.images
        return images.keys(self.rows.tolist())


@functools.lru_cache(4)
def _unpickled(images: bytes) -> FeatureSet:
    features: FeatureSet = pickle.loads(images)
    return features


@dataclass(frozen=True, eq=False)
class _Samples:
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> list[str]:
        """B keys."""
        return self.names.keys()


@dataclass(frozen=True, eq=False)
class Batch(_Samples):
    """Samples of one bucket, for a model that takes padded text.

    Attributes:
        moments: fp16 (B, 2, C, H, W): posterior mean and standard deviation, unscaled.
        text: bf16 (B, L, D), zeros after a caption's end.
        mask: bool (B, L), True on true tokens.
        size_px: fp32 (B, 2): original height and width.
        ratio: fp32 (B,): height / width of the bucket, with its two decimals.
        labels: int64 (B,): the class of each sample, or None; with classes, `text` and `mask` hold no token.
    """

    moments: Tensor
    text: Tensor
    mask: Tensor
    size_px: Tensor
    ratio: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PackedBatch(_Samples):
    """Samples of one bucket, for a model that takes captions one after the other.

    Attributes:
        moments, size_px, ratio, labels: As in `Batch`.
        text: bf16 (N, D).
        offsets: int32 (B + 1,): the caption of sample i is `text[offsets[i] : offsets[i + 1]]`.
        lengths: The n_i, on the host.
    """

    moments: Tensor
    text: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    size_px: Tensor
    ratio: Tensor
    labels: Tensor | None = None

    @property
    def captions(self) -> Packed:
        """The captions as the model takes them."""
        return Packed(self.text, self.offsets, self.lengths)


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions of a batch that are of one text set, in the form they are stored in.

    Attributes:
        codec: That decodes them.
        samples: int64 (b,): which of the batch they belong to, ascending.
        lengths: int64 (b,): their tokens.
        num_rare: int64 (b,): of what the codec stores apart, the rows of each.
        parts: The tensors of the codec, each of all captions one after the other: (N_b, ...) and, of what is stored
            apart, (K_b, ...).
    """

    codec: Codec
    samples: Tensor
    lengths: Tensor
    num_rare: Tensor
    parts: Sequence[Tensor]

    def to(self, device: torch.device) -> "Captions":
        """Return copies on a device, or on the CPU, if that is where they are, the same tensors."""
        samples, lengths, num_rare, *parts = (
            one.to(device, non_blocking=True) for one in (self.samples, self.lengths, self.num_rare, *self.parts)
        )
        return Captions(self.codec, samples, lengths, num_rare, parts)

    def decode(self) -> Tensor:
        """Return the features where the captions are, bf16 (N_b, D)."""
        if self.codec.size_bytes(1) is not None:
            return self.codec.decode(self.parts)
        firsts = self.lengths.cumsum(0) - self.lengths  # (b,)
        starts = torch.repeat_interleave(firsts, self.num_rare, output_size=len(self.parts[-1]))  # (K_b,)
        return self.codec.decode(self.parts, starts)

    def places(self, starts: Tensor) -> Tensor:
        """Return where each token goes if caption i of the batch starts at `starts[i]`; (B,) to (N_b,)."""
        num_tokens = len(self.parts[0])
        shift = starts[self.samples] - (self.lengths.cumsum(0) - self.lengths)  # (b,)
        shifts = torch.repeat_interleave(shift, self.lengths, output_size=num_tokens)
        return shifts + torch.arange(num_tokens, device=shifts.device)


@dataclass(frozen=True, eq=False)
class HostBatch(_Samples):
    """Samples of one bucket in host memory, as they are stored.

    Of `Dataset.batches`, the tensors lie in memory that is used again: they are valid until the next batch is asked
    for, or the iterator is closed. Copies to a GPU that `to` has queued by then are waited for; whoever reads the
    tensors in another way is done before. Of a `DataLoader` or of `Dataset.read`, they are the batch's own.

    Attributes:
        step: The number of the batch in the global order.
        moments: fp16 (B, 2, C, H, W): posterior mean and standard deviation, unscaled.
        texts: The captions, by the text set that they come from.
        lengths: int64 (B,): tokens of each caption; 0 with classes.
        size_px: fp32 (B, 2): original height and width.
        ratio: fp32 (B,): height / width of the bucket, with its two decimals.
        skipped: Of samples that are damaged and were replaced by others of the batch, what was wrong with each.
        labels: int64 (B,): the class of each sample, of a dataset that was opened with classes, or None.
    """

    step: int
    moments: Tensor
    texts: Sequence[Captions]
    lengths: Tensor
    size_px: Tensor
    ratio: Tensor
    skipped: tuple[str, ...] = ()
    labels: Tensor | None = None
    _buffers: Buffers | None = field(default=None, repr=False)
    _turn: int = 0

    def __reduce__(self) -> tuple[type["HostBatch"], tuple[object, ...]]:
        self._require_valid()
        tensors = (self.moments, self.texts, self.lengths, self.size_px, self.ratio)
        return HostBatch, (self.names, self.step, *tensors, self.skipped, self.labels)

    @overload
    def to(self, device: torch.device, packed: Literal[False] = False) -> Batch: ...
    @overload
    def to(self, device: torch.device, packed: Literal[True]) -> PackedBatch: ...

    def to(self, device: torch.device, packed: bool = False) -> Batch | PackedBatch:
        """Return the batch decoded on a device, in memory of its own: padded, or packed.

        Raises:
            RuntimeError: If the batch is no longer valid.
        """
        self._require_valid()
        texts = [captions.to(device) for captions in self.texts]
        moments, size_px, ratio = (
            one.to(device, non_blocking=True, copy=True) for one in (self.moments, self.size_px, self.ratio)
        )
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True, copy=True)
        lengths = self.lengths.to(device, non_blocking=True)  # (B,)
        if packed:
            offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # (B + 1,)
            on_host = tuple(self.lengths.tolist())
            text = _placed(texts, offsets[:-1], sum(on_host))  # (N, D)
            result: Batch | PackedBatch = PackedBatch(
                self.names, moments, text, offsets, on_host, size_px, ratio, labels
            )
        else:
            longest = int(self.lengths.max())
            starts = torch.arange(len(self), device=device) * longest
            text = _placed(texts, starts, len(self) * longest)  # (B L, D)
            text = text.view(len(self), longest, text.shape[-1])  # (B, L, D)
            mask = torch.arange(longest, device=device) < lengths[:, None]  # (B, L)
            result = Batch(self.names, moments, text, mask, size_px, ratio, labels)
        if self._buffers is not None:
            self._buffers.guard(device)
        return result

    def _require_valid(self) -> None:
        if self._buffers is not None and self._buffers.turn != self._turn:
            raise RuntimeError(f"batch {self.step}: used after the next one was asked for; copy it with to() before")


def _placed(texts: Sequence[Captions], starts: Tensor, num_rows: int) -> Tensor:
    """Return all captions in one tensor (num_rows, D), caption i from row `starts[i]` on, zeros elsewhere."""
    width = texts[0].codec.width if texts else 0
    text = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=starts.device)
    for captions in texts:
        text.index_copy_(0, captions.places(starts), captions.decode())
    return text


def pad(captions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return captions (n_i, D) as one tensor (B, L, D), zeros after each end, and its mask (B, L)."""
    text = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)  # (B, L, D)
    lengths = torch.tensor([len(caption) for caption in captions], device=text.device)  # (B,)
    mask = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # (B, L)
    return text, mask
