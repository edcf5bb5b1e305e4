"""The PixArt transformer: noisy latents, time and a caption in; noise and its variance out.

Legend: B batch, C latent channels, N image tokens, L text tokens, D width; x latents, then image tokens; t timesteps,
then their embedding; y caption. Sizes in latent cells unless a name ends in _px.
Source: PixArt-alpha (arXiv:2310.00426), section 2.3. Parameter names are the reference's, so its weights load.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart_model.layers import Block, CaptionEmbed, FinalLayer, NumberEmbed, PatchEmbed, position_table
from pixart_model.sizes import Model


class PixArt(nn.Module):
    """The transformer, freshly initialised.

    There is no learned null caption: the null caption is what the text encoder makes of the empty string, and comes
    with the dataset.

    Attributes:
        grad_checkpointing: Recompute each block in the backward pass.
    """

    def __init__(self, config: Model, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = grad_checkpointing
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch)
        self.t_embedder = NumberEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbed(config.caption_width, width)
        if config.micro_conditioning:
            self.csize_embedder = NumberEmbed(width // 3)
            self.ar_embedder = NumberEmbed(width // 3)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch, 2 * config.in_channels)
        self._positions: dict[tuple[Any, ...], Tensor] = {}
        self.initialize()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        size_px: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        Args:
            x: Noisy latents (B, C, height, width), sides multiples of the patch.
            t: Timesteps (B,), 0 to 999, whole or not; used in fp32.
            y: Captions (B, L, caption_width), padded.
            mask: (B, L) bool, True on the true tokens; None when all are.
            size_px: (B, 2) original height and width, for micro-conditioning.
            ratio: (B,) height / width, for micro-conditioning.

        Returns:
            (B, 2 C, height, width): noise, then the variance as a place between its bounds, in [-1, 1].
        """
        rows, columns = x.shape[2] // self.config.patch, x.shape[3] // self.config.patch
        x = self.x_embedder(x.to(self.dtype)) + self.positions(rows, columns, x.device)  # (B, N, D)
        t = self.t_embedder(t)  # (B, D)
        if self.config.micro_conditioning:
            t = t + self._micro_condition(size_px, ratio)
        t0 = self.t_block(t).unflatten(1, (6, -1))  # (B, 6, D)
        y = self.y_embedder(y.to(self.dtype))  # (B, L, D)
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, L)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, y, t0, mask, use_reentrant=False)
            else:
                x = block(x, y, t0, mask)
        x = self.final_layer(x, t)  # (B, N, patch * patch * 2 C)
        return self._unpatchify(x, rows, columns)  # (B, 2 C, height, width)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_embedder.proj.weight.device

    def positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the position embedding (1, N, D) of a grid of tokens, made once for each grid, device and type."""
        key = (rows, columns, device, self.dtype)
        if key not in self._positions:
            base = self.config.base_size // self.config.patch
            table = position_table(rows, columns, self.config.width, base, self.config.interpolation_scale)
            self._positions[key] = table.to(device, self.dtype)[None]  # (1, N, D)
        return self._positions[key]

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew from torch's global generator, distributed as in the reference."""
        embedders = ("t_embedder.", "t_block.", "y_embedder.", "csize_embedder.", "ar_embedder.")
        zero = ("cross_attn.proj.weight", "final_layer.linear.weight")
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.endswith(zero):
                nn.init.zeros_(parameter)
            elif name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.width**-0.5)
            elif name.startswith(embedders):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def _micro_condition(self, size_px: Tensor | None, ratio: Tensor | None) -> Tensor:
        if size_px is None or ratio is None:
            raise ValueError("a model with micro-conditioning needs size_px and ratio")
        size = self.csize_embedder(size_px.flatten()).reshape(len(size_px), -1)  # (B, 2 D / 3)
        return torch.cat([size, self.ar_embedder(ratio)], dim=1)  # (B, D)

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.config.patch
        x = x.reshape(len(x), rows, columns, patch, patch, -1)  # (B, rows, columns, patch, patch, 2 C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 2 C, height, width)
