"""The parts of the transformers, under the reference's parameter names.

Legend: B batch, N image tokens, M text tokens of all captions, D width of a token, H heads; x image tokens, y text
tokens, t conditioning on time; msa is self-attention, mlp the feed-forward part. LayerNorms over the residual stream
have no parameters.
Source: PixArt-alpha (arXiv:2310.00426), section 2.3; DiT (arXiv:2212.09748); PixArt-Sigma (arXiv:2403.04692).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pixart_model.attention import Text

_NUM_FREQUENCIES = 256
_STREAM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `normalize(x) * (1 + scale) + shift`: x (B, N, D), the others (B, 1, D)."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what to keep
        return normalize(x) * (1 + scale) + shift
    out: Tensor = _Modulation.apply(x, shift, scale)  # type: ignore[no-untyped-call]
    return out


def normalize(x: Tensor) -> Tensor:
    """Return tokens (B, N, D) with mean 0 and variance 1 over their channels."""
    return F.layer_norm(x, x.shape[-1:], eps=_STREAM_EPS)


class _Modulation(torch.autograd.Function):
    """`modulate` that keeps its input for the backward pass, and not the normalised tokens too.

    The input is the residual stream, which is kept anyway: of a block's activations, a thirteenth is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        normalized, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], None, None, _STREAM_EPS)
        ctx.save_for_backward(x, mean, inverse_std, scale)
        return torch.addcmul(shift, normalized, 1 + scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        x, mean, inverse_std, scale = ctx.saved_tensors
        grad_scale = (grad * ((x - mean) * inverse_std)).sum(1, keepdim=True)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), x, x.shape[-1:], mean, inverse_std, None, None, [True, False, False]
        )[0]
        return grad_x, grad.sum(1, keepdim=True), grad_scale


def sinusoid(t: Tensor, num_channels: int = _NUM_FREQUENCIES) -> Tensor:
    """Embed numbers (B,) as cosines and sines (B, num_channels) in fp32.

    In bf16 the thousand timesteps would fall together to 507 different numbers.
    """
    half = num_channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, num_channels)


def position_axis(num_places: int, num_channels: int, base: int, scale: float) -> Tensor:
    """Return sines, then cosines, of places along one side, (num_places, num_channels), in float64 on the CPU.

    Any number of places is stretched onto [0, base / scale).
    """
    omega = 10_000.0 ** -(torch.arange(num_channels // 2, dtype=torch.float64) / (num_channels // 2))
    angles = torch.arange(num_places, dtype=torch.float64)[:, None] / (num_places / base) / scale * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (num_places, num_channels)


class Positions:
    """Sine-cosine embeddings of grids of tokens; the first half of the channels holds the column, the second the row.

    Any aspect ratio is stretched onto the square [0, base / scale), with `base` tokens on the reference side. What is
    kept are the sides of grids, so that forty buckets cost a few MB and not as many tables. Copies and pickles of a
    model begin with none.
    """

    def __init__(self, width: int, base: int, scale: float) -> None:
        self._width, self._base, self._scale = width, base, scale
        self._axes: dict[tuple[int, torch.device], Tensor] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the embedding of a grid, fp32 (1, N, D)."""
        row, column = self.axis(rows, device), self.axis(columns, device)  # (rows, D / 2) and (columns, D / 2)
        grid = [column.expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)]  # (rows, columns, D / 2) each
        return torch.cat(grid, dim=2).flatten(0, 1)[None]  # (1, N, D)

    def axis(self, num_places: int, device: torch.device) -> Tensor:
        """Return the embedding of one side, fp32 (num_places, D / 2), made once for each length and device."""
        key = (num_places, device)
        if key not in self._axes:
            with torch.inference_mode(mode=False):  # what sampling makes, training may use
                side = position_axis(num_places, self._width // 2, self._base, self._scale)
                self._axes[key] = side.to(device, torch.float32)
        return self._axes[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_axes": {}}


class PatchEmbed(nn.Module):
    """Cuts latents into tokens: (B, C, height, width) -> (B, N, D)."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.proj(x)  # (B, D, rows, columns)
        return x.flatten(2).transpose(1, 2).contiguous()  # (B, N, D), or all blocks would work across memory


class NumberEmbed(nn.Module):
    """Embeds timesteps, sizes or ratios: (B,) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # noqa: D102
        frequencies = sinusoid(t)  # (B, 256)
        out: Tensor = self.mlp(frequencies.to(next(self.parameters()).dtype))  # (B, D)
        return out


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, out_width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbed(nn.Module):
    """Brings text features to the width of the model: (..., caption_width) -> (..., D)."""

    def __init__(self, caption_width: int, width: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_width, width, width)

    def forward(self, y: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.y_proj(y)
        return out


def modulator(width: int, num_parts: int) -> nn.Sequential:
    """Return what makes shifts, scales and gates of time: (B, D) -> (B, num_parts D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, num_parts * width))


class SelfAttention(nn.Module):
    """Attention among image tokens, with PixArt-Sigma's two options.

    Compression shortens keys and values by the same factor on both sides of the grid. Where a side is no multiple of
    it, the last row or column is repeated, so that no image token goes unseen. `conv` and `uniform` are Sigma's.
    Sigma's `ave` takes the nearest token, which is `uniform`; `average` is a true mean.

    Args of the constructor:
        compression: `conv`, `average`, `uniform` or None.
        factor: Of compression, on each side.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool = False, compression: str | None = None, factor: int = 1
    ) -> None:
        super().__init__()
        self.heads, self.compression, self.factor = heads, compression, factor
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width) if qk_norm else None
        self.k_norm = nn.LayerNorm(width) if qk_norm else None
        if compression == "conv":
            self.sr = nn.Conv2d(width, width, factor, factor, groups=width)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D) of a grid of so many rows and columns."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # (B, N, H, D / H) each
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.flatten(2)).view_as(q).to(v.dtype)
            k = self.k_norm(k.flatten(2)).view_as(k).to(v.dtype)
        if self.compression is not None:
            k, v = self.compress(k, grid), self.compress(v, grid)  # (B, N / factor^2, H, D / H) each
        q, k, v = (tokens.transpose(1, 2) for tokens in (q, k, v))  # (B, H, N or less, D / H) each
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D / H)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)
        return out

    def compress(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Shorten keys or values: (B, N, H, D / H) to as many heads, each side of the grid divided and rounded up."""
        cells = tokens.view(len(tokens), *grid, -1).permute(0, 3, 1, 2)  # (B, D, rows, columns)
        if self.compression == "uniform":
            cells = cells[..., :: self.factor, :: self.factor]
        else:
            missing_rows, missing_columns = (-side % self.factor for side in grid)
            cells = F.pad(cells, (0, missing_columns, 0, missing_rows), mode="replicate")
            cells = self.sr(cells) if self.compression == "conv" else F.avg_pool2d(cells, self.factor)
        fewer = cells.flatten(2).transpose(1, 2)  # (B, N / factor^2, D)
        if self.compression == "conv":
            fewer = self.norm(fewer).to(tokens.dtype)
        return fewer.reshape(*fewer.shape[:2], *tokens.shape[2:])


class CrossAttention(nn.Module):
    """Attention from image tokens to the tokens of their caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Text) -> Tensor:
        """Image tokens (B, N, D) to (B, N, D)."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))  # (B, N, H, D / H)
        kv = self.kv_linear(y.tokens).unflatten(-1, (2, self.heads, -1))  # (M, 2, H, D / H), or (B, L, ...)
        out: Tensor = self.proj(y.attend(q, kv))  # (B, N, D)
        return out


class Block(nn.Module):
    """A transformer block of PixArt.

    Modulated by adaLN-single, one MLP for all blocks and a small table in each; or, in the ablation, by that MLP and
    one of its own in place of the table, of which adaLN-single is the case that does not change with time.
    """

    def __init__(self, width: int, mlp_ratio: float, attention: SelfAttention, own_modulation: bool) -> None:
        super().__init__()
        self.attn = attention
        self.cross_attn = CrossAttention(width, attention.heads)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.adaLN_modulation = modulator(width, 6) if own_modulation else None
        if not own_modulation:
            self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(self, x: Tensor, y: Text, t: Tensor, t0: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens x (B, N, D) of a grid; t (B, D) is time, t0 (B, 6, D) the modulation that all blocks share."""
        own = self.scale_shift_table if self.adaLN_modulation is None else self.adaLN_modulation(t).view_as(t0)
        modulation = own.to(x.dtype) + t0.to(x.dtype)  # (B, 6, D), as exact as the sums that run through all blocks
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # (B, 1, D) each
        x = x + gate_msa * self.attn(modulate(x, shift_msa, scale_msa), grid)
        x = x + self.cross_attn(x, y)
        out: Tensor = x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))
        return out


class FinalLayer(nn.Module):
    """Tokens to the latent cells under them: (B, N, D) -> (B, N, patch * patch * out_channels)."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Conditioned on t (B, D) as it is before the MLP of the blocks."""
        modulation = self.scale_shift_table.to(x.dtype) + t[:, None].to(x.dtype)  # (B, 2, D)
        shift, scale = modulation.chunk(2, dim=1)  # (B, 1, D) each
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out
