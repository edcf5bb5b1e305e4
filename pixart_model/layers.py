"""The parts of the PixArt transformer, under the reference's parameter names.

Legend: B batch, N image tokens, L text tokens, D width of a token, H heads; x image tokens, y text tokens,
t conditioning on time; msa is self-attention, mlp the feed-forward part. LayerNorms have no parameters.
Source: PixArt-alpha (arXiv:2310.00426), section 2.3; DiT (arXiv:2212.09748).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NUM_FREQUENCIES = 256


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 + scale) + shift`: x (B, N, D), the others (B, 1, D)."""
    return x * (1 + scale) + shift


def sinusoid(t: Tensor, num_channels: int = _NUM_FREQUENCIES) -> Tensor:
    """Embed numbers (B,) as cosines and sines (B, num_channels) in fp32.

    In bf16 the thousand timesteps would fall together to 507 different numbers.
    """
    half = num_channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, num_channels)


def position_table(height: int, width: int, num_channels: int, base: int, scale: float) -> Tensor:
    """Return the sine-cosine positions of a grid of tokens, (height * width, num_channels), in float64 on the CPU.

    Any aspect ratio is stretched onto the square [0, base / scale), with `base` tokens on the reference side.
    The first half of the channels holds the column, the second half the row.
    """
    omega = 10_000.0 ** -(torch.arange(num_channels // 4, dtype=torch.float64) / (num_channels // 4))
    row = torch.arange(height, dtype=torch.float64) / (height / base) / scale
    column = torch.arange(width, dtype=torch.float64) / (width / base) / scale
    rows, columns = torch.meshgrid(row, column, indexing="ij")  # (height, width) each
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # (N, D / 4) each
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)  # (N, D)


class PatchEmbed(nn.Module):
    """Cuts latents into tokens: (B, C, height, width) -> (B, N, D)."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.proj(x)  # (B, D, rows, columns)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


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
    """Brings text features to the width of the model: (B, L, caption_width) -> (B, L, D)."""

    def __init__(self, caption_width: int, width: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_width, width, width)

    def forward(self, y: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.y_proj(y)
        return out


class SelfAttention(nn.Module):
    """Attention among image tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D / H) each
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D / H)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)
        return out


class CrossAttention(nn.Module):
    """Attention from image tokens to the true tokens of the caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` is bool and broadcasts to (B, H, N, L): True where a text token is one."""
        q = self.q_linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        k, v = self.kv_linear(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D / H) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)
        return out


class Block(nn.Module):
    """A transformer block modulated by adaLN-single: one MLP for all blocks, and a small table in each."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens x (B, N, D) and y (B, L, D); t (B, 6, D) is the shared modulation, to which the table is added."""
        modulation = (self.scale_shift_table + t).chunk(6, dim=1)  # (B, 1, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(x, y, mask)
        out: Tensor = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return out


class FinalLayer(nn.Module):
    """Tokens to the latent cells under them: (B, N, D) -> (B, N, patch * patch * out_channels)."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Conditioned on t (B, D) as it is before the MLP of the blocks."""
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)  # (B, 1, D) each
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out
