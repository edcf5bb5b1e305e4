"""How image tokens look at captions of different lengths: the one place that decides it.

Legend: B captions, n_i tokens of caption i, M of all, L of the longest; N image tokens of a sample; D width, H heads,
d = D / H channels of a head.

Linear layers compute on the M true tokens whichever way is taken; the ways differ in the attention itself:

* `Ragged`: one kernel for captions of any lengths (flash attention); fp16 and bf16 on a GPU that has it.
* `Split`: caption by caption; on a CPU, where a launch costs nothing.
* `Spread`: laid out to (B, L) with a mask; where neither can be: fp32 on a GPU, and a compiled CPU model, which would
  be compiled anew for each set of lengths.
* `Padded`: for captions that came with padding. The only one that computes on it.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_model.packing import Packed

_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_MULTIPLE, _FLASH_HEAD_MAX = 8, 256


class Split(NamedTuple):
    """Captions without padding, attended to one after the other.

    Attributes:
        tokens: (M, D).
        lengths: The n_i.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, N, H, d) and kv (M, 2, H, d) to (B, N, D)."""
        outs = []
        for image, text in zip(q.unbind(0), torch.split(kv, list(self.lengths)), strict=True):
            k, v = text.unbind(1)  # (n_i, H, d) each
            image, k, v = (tokens.transpose(0, 1)[None] for tokens in (image, k, v))  # (1, H, N or n_i, d) each
            outs.append(F.scaled_dot_product_attention(image, k, v))  # (1, H, N, d)
        return torch.cat([out.transpose(1, 2).flatten(2) for out in outs])  # (B, N, D)


class Ragged(NamedTuple):
    """Captions without padding, attended to in one kernel.

    Attributes:
        tokens: (M, D).
        offsets: int32 (B + 1,), where the captions begin and the last one ends.
        image_offsets: int32 (B + 1,), the same of the image tokens: multiples of N.
        longest: L.
    """

    tokens: Tensor
    offsets: Tensor
    image_offsets: Tensor
    longest: int

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, N, H, d) and kv (M, 2, H, d) to (B, N, D)."""
        from torch.nn.attention.varlen import varlen_attn  # not in every torch that can train here

        k, v = kv.unbind(1)  # (M, H, d) each
        out: Any = varlen_attn(
            q.flatten(0, 1), k, v, self.image_offsets, self.offsets, max_q=q.shape[1], max_k=self.longest
        )  # (B N, H, d)
        by_image: Tensor = out.view(*q.shape[:2], -1)  # (B, N, D)
        return by_image


class Spread(NamedTuple):
    """Captions without padding, padded only to be attended to.

    Attributes:
        tokens: (M, D).
        places: int64 (M,), where in (B L,) each token goes.
        mask: bool (B, 1, 1, L), True on the true tokens.
    """

    tokens: Tensor
    places: Tensor
    mask: Tensor

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, N, H, d) and kv (M, 2, H, d) to (B, N, D)."""
        padded = kv.new_zeros(self.mask.numel(), *kv.shape[1:]).index_copy(0, self.places, kv)  # (B L, 2, H, d)
        return _attend(q, padded.view(self.mask.shape[0], self.mask.shape[3], *kv.shape[1:]), self.mask)


class Padded(NamedTuple):
    """Captions with padding.

    Attributes:
        tokens: (B, L, D).
        mask: bool (B, 1, 1, L), True on the true tokens; None when all are.
    """

    tokens: Tensor
    mask: Tensor | None

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, N, H, d) and kv (B, L, 2, H, d) to (B, N, D)."""
        return _attend(q, kv, self.mask)


Text = Split | Ragged | Spread | Padded


def arrange(captions: Packed, image_tokens: int, heads: int, compiled: bool) -> Text:
    """Prepare captions for the cross-attention of all blocks.

    Args:
        captions: B of them, of the model's width D.
        image_tokens: N.
        heads: H.
        compiled: Whether the blocks are; then nothing may depend on the single lengths.
    """
    tokens, offsets, lengths = captions
    device = tokens.device
    dtype = torch.get_autocast_dtype(device.type) if is_autocasting(device) else tokens.dtype
    way = choose(device, dtype, tokens.shape[1] // heads, compiled)
    if way is Split:
        return Split(tokens, lengths)
    if way is Ragged:
        ends = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * image_tokens  # (B + 1,)
        return Ragged(tokens, offsets, ends, captions.longest)
    mask, places = captions.layout()  # (B, L) and (M,)
    return Spread(tokens, places, mask[:, None, None])


def choose(
    device: torch.device, dtype: torch.dtype, head_channels: int, compiled: bool
) -> type[Split] | type[Ragged] | type[Spread]:
    """Return how captions without padding are attended to when computing in a type on a device."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _has_flash(device, head_channels):
        return Ragged
    return Split if device.type != "cuda" and not compiled else Spread


def is_autocasting(device: torch.device) -> bool:
    """Return whether autocast chooses the type of the arithmetic on a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _has_flash(device: torch.device, head_channels: int) -> bool:
    fits = head_channels % _FLASH_HEAD_MULTIPLE == 0 and head_channels <= _FLASH_HEAD_MAX
    has_kernel = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return fits and has_kernel and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def _attend(q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (B, N, H, d), kv (B, L, 2, H, d) and a mask that broadcasts to (B, H, N, L), to (B, N, D)."""
    q, k, v = (tokens.transpose(1, 2) for tokens in (q, *kv.unbind(2)))  # (B, H, N or L, d) each
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, d)
    return out.transpose(1, 2).flatten(2)  # (B, N, D)
