"""The transformers that `benchmarks.train_steps` lets take turns: ours, diffusers', and one done as the reference does.

All three hold the same weights and get the same latents, timesteps and captions, each as its own training loop hands
them over: ours one caption after the other, the others padded to 120 tokens with a mask.

Legend: B batch, N image tokens, L padded text tokens, D width, H heads; x latents, then image tokens; t timesteps;
y captions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_model.conversion import to_diffusers
from pixart_model.model import PixArt
from pixart_model.packing import pack
from pixart_model.sizes import Model

MAX_TOKENS = 120
"""What the reference and diffusers' pipeline pad captions to."""

OURS, DIFFUSERS, REFERENCE = "ours", "diffusers", "reference"


@dataclass(frozen=True)
class Inputs:
    """A batch of one canvas.

    Attributes:
        x: Noisy latents (B, C, height, width).
        t: Timesteps (B,).
        captions: B of them, (n_i, caption_width) each.
    """

    x: Tensor
    t: Tensor
    captions: list[Tensor]

    def to(self, device: torch.device) -> "Inputs":
        """Return the batch on a device."""
        return Inputs(self.x.to(device), self.t.to(device), [one.to(device) for one in self.captions])


@dataclass(frozen=True)
class Contender:
    """A network, and its forward pass in evaluation or training: B inputs to (B, 2 C, height, width)."""

    name: str
    network: nn.Module
    forward: Callable[[], Tensor]


def contender(name: str, config: Model, inputs: Inputs) -> Contender:
    """Build a network with the weights of seed 0, where its inputs are, and prepare those, which is not timed."""
    device = inputs.x.device
    ours = _ours(config).to(device)
    if name == OURS:
        packed = pack(inputs.captions)
        return Contender(name, ours, lambda: ours(inputs.x, inputs.t, packed))
    text, mask = _padded(inputs.captions)
    if name == DIFFUSERS:
        theirs = _diffusers(ours, config).to(device)
        nothing = {"resolution": None, "aspect_ratio": None}

        def forward() -> Tensor:
            out: Tensor = theirs(
                inputs.x, encoder_hidden_states=text, timestep=inputs.t, added_cond_kwargs=nothing,
                encoder_attention_mask=mask,
            ).sample  # fmt: skip
            return out

        return Contender(name, theirs, forward)
    reference = Reference(config).to(device)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return Contender(name, reference, lambda: reference(inputs.x, inputs.t, text, mask))


def _ours(config: Model) -> PixArt:
    torch.manual_seed(0)
    model = PixArt(config)
    with torch.no_grad():  # zeros of the initialisation would hide what is wrong
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn.proj.weight", "final_layer.linear.weight")):
                parameter.normal_(std=0.02)
    return model


def _diffusers(ours: PixArt, config: Model) -> Any:
    from diffusers import PixArtTransformer2DModel

    weights, arguments = to_diffusers(ours.state_dict(), config)
    theirs = PixArtTransformer2DModel(**arguments)
    theirs.load_state_dict(weights, strict=True)
    return theirs


def _padded(captions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return captions as (B, 120, caption_width), zeros after each end, and their mask, int64 (B, 120)."""
    text = torch.stack([F.pad(one, (0, 0, 0, MAX_TOKENS - len(one))) for one in captions])
    lengths = torch.tensor([len(one) for one in captions], device=text.device)
    return text, (torch.arange(MAX_TOKENS, device=text.device) < lengths[:, None]).long()


class Reference(nn.Module):
    """PixArt as its repository computes it, under the same parameter names.

    Captions are embedded with their padding, which is taken out afterwards; the positions are computed in numpy and
    copied in every forward pass; modulation is written out operation by operation. Its attention is xformers', which
    there is no CPU build of: cross-attention over a block-diagonal mask is one call for each caption here.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        width, self.config = config.width, config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, width, config.patch, config.patch)})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.ModuleDict({"y_proj": _Mlp(config.caption_width, width, width)})
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.depth))
        self.final_layer = _Final(width, config.patch * config.patch * 2 * config.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Latents (B, C, height, width), timesteps (B,), captions (B, L, caption_width), mask (B, L)."""
        patch = self.config.patch
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        positions = torch.from_numpy(_positions(rows, columns, self.config)).unsqueeze(0).to(x.dtype)  # (1, N, D)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + positions  # (B, N, D)
        t = self.t_embedder["mlp"](_sinusoid(t))  # (B, D)
        t0 = self.t_block(t)  # (B, 6 D)
        y = self.y_embedder["y_proj"](y)  # (B, L, D)
        lengths = mask.sum(dim=1).tolist()
        y = y.masked_select(mask.unsqueeze(-1) != 0).view(1, -1, x.shape[-1])  # (1, M, D)
        for block in self.blocks:
            x = block(x, y, t0, lengths)
        x = self.final_layer(x, t)  # (B, N, patch * patch * 2 C)
        x = x.reshape(len(x), rows, columns, patch, patch, -1)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), -1, rows * patch, columns * patch)  # (B, 2 C, height, width)


class _Mlp(nn.Module):
    def __init__(self, inner: int, hidden: int, outer: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inner, hidden), nn.Linear(hidden, outer)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).unbind(2)  # (B, N, H, d) each
        out: Tensor = self.proj(_attention(q, k, v).reshape(b, n, d))
        return out


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, lengths: list[int]) -> Tensor:
        b, n, d = x.shape
        q = self.q_linear(x).view(1, -1, self.heads, d // self.heads)  # (1, B N, H, d)
        k, v = self.kv_linear(y).view(1, -1, 2, self.heads, d // self.heads).unbind(2)  # (1, M, H, d) each
        parts = zip(q.split(n, dim=1), k.split(lengths, dim=1), v.split(lengths, dim=1), strict=True)
        out: Tensor = self.proj(torch.cat([_attention(*part) for part in parts], dim=1).view(b, n, d))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = _SelfAttention(width, heads)
        self.cross_attn = _CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = _Mlp(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, lengths: list[int]) -> Tensor:
        six = (self.scale_shift_table[None] + t.reshape(len(x), 6, -1)).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa)
        x = x + self.cross_attn(x, y, lengths)
        out: Tensor = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return out


class _Final(nn.Module):
    def __init__(self, width: int, outer: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outer)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as xformers lays tensors out, (B, N, H, d)."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))  # (B, H, N, d) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sinusoid(t: Tensor) -> Tensor:
    frequencies = torch.exp(-np.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (B, 256)


def _positions(rows: int, columns: int, config: Model) -> Any:
    """Return the positions as the reference does in every forward pass: float64 in numpy, then float32; (N, D)."""
    base = config.base_size // config.patch
    row = np.arange(rows, dtype=np.float32) / (rows / base) / config.interpolation_scale
    column = np.arange(columns, dtype=np.float32) / (columns / base) / config.interpolation_scale
    grid = np.stack(np.meshgrid(column, row), axis=0)  # (2, rows, columns): w first
    omega = 1.0 / 10_000 ** (np.arange(config.width // 4, dtype=np.float64) / (config.width / 4.0))
    halves = [np.einsum("m,d->md", axis.reshape(-1), omega) for axis in grid]
    parts = [np.concatenate([np.sin(half), np.cos(half)], axis=1) for half in halves]
    return np.concatenate(parts, axis=1).astype(np.float32)
