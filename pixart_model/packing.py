"""Captions one after the other, without padding: what the model's text side computes on.

Legend: B captions, n_i tokens of caption i, N of all, L of the longest; D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """B captions in one tensor.

    Attributes:
        tokens: (N, D); caption i is `tokens[offsets[i] : offsets[i + 1]]`.
        offsets: int32 (B + 1,), where the tokens are.
        lengths: The n_i on the host, so that nobody has to wait for the device to know them.
    """

    tokens: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """L."""
        return max(self.lengths)

    def split(self) -> tuple[Tensor, ...]:
        """Return views of the captions, (n_i, D) each."""
        return torch.split(self.tokens, list(self.lengths))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the captions as (B, L, D), zeros after each end, and their mask, bool (B, L), True on tokens."""
        mask, places = self.layout()
        text = self.tokens.new_zeros(mask.numel(), self.tokens.shape[-1])  # (B L, D)
        return text.index_copy(0, places, self.tokens).view(*mask.shape, -1), mask

    def layout(self) -> tuple[Tensor, Tensor]:
        """Return the mask of padded captions, bool (B, L), and where in (B L,) each of the N tokens goes, int64."""
        mask = torch.arange(self.longest, device=self.tokens.device) < self.offsets.diff()[:, None]  # (B, L)
        starts = torch.arange(len(self.lengths), device=mask.device) * self.longest - self.offsets[:-1]  # (B,)
        shifts = torch.repeat_interleave(starts, self.offsets.diff(), output_size=len(self.tokens))  # (N,)
        return mask, shifts + torch.arange(len(self.tokens), device=mask.device)


def pack(captions: Sequence[Tensor]) -> Packed:
    """Return captions, (n_i, D) each, one after the other."""
    lengths = tuple(len(caption) for caption in captions)
    return Packed(torch.cat(list(captions)), offsets_of(lengths, captions[0].device), lengths)


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return where each of captions of such lengths begins and the last one ends, int32 (B + 1,)."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)
