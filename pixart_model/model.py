"""The PixArt transformer: noisy latents, time and a caption in; noise and its variance out.

Legend: B batch, C latent channels, N image tokens, M text tokens of all captions, L of the longest, D width; x latents,
then image tokens; t timesteps, then their embedding; y captions. Sizes in latent cells unless a name ends in _px.
Source: PixArt-alpha (arXiv:2310.00426), section 2.3. Parameter names are the reference's, so its weights load.
"""

import torch
from torch import Tensor

from pixart_model.attention import Padded, Text, arrange
from pixart_model.layers import Block, CaptionEmbed, FinalLayer, NumberEmbed, SelfAttention, modulator
from pixart_model.packing import Packed
from pixart_model.sizes import Model
from pixart_model.trunk import Trunk


class PixArt(Trunk):
    """The transformer, freshly initialised.

    There is no learned null caption: the null caption is what the text encoder makes of the empty string, and comes
    with the dataset.
    """

    def __init__(self, config: Model, grad_checkpointing: bool = False) -> None:
        super().__init__(config, grad_checkpointing)
        width = config.width
        self.t_block = modulator(width, 6)
        self.y_embedder = CaptionEmbed(config.caption_width, width)
        if config.micro_conditioning:
            self.csize_embedder = NumberEmbed(width // 3)
            self.ar_embedder = NumberEmbed(width // 3)
        for i in range(config.depth):
            how = config.kv_compression if i in config.compressing_blocks else None
            attention = SelfAttention(width, config.heads, config.qk_norm, how, config.kv_compression_factor)
            self.blocks.append(Block(width, config.mlp_ratio, attention, config.modulation == "blocks"))
        self.final_layer = FinalLayer(width, config.patch, 2 * config.in_channels)
        self.initialize()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Packed,
        mask: Tensor | None = None,
        size_px: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        Args:
            x: Noisy latents (B, C, height, width), sides multiples of the patch.
            t: Timesteps (B,), 0 to 999, whole or not; used in fp32.
            y: B captions without padding, their tokens of `caption_width`; or padded, (B, L, caption_width).
            mask: For padded captions: bool (B, L), True on the true tokens; None when all are.
            size_px: (B, 2) original height and width, for micro-conditioning.
            ratio: (B,) height / width, for micro-conditioning.

        Returns:
            (B, 2 C, height, width): noise, then the variance as a place between its bounds, in [-1, 1].
        """
        x, grid = self.embed(x)  # (B, N, D)
        t = self.t_embedder(t)  # (B, D)
        if self.config.micro_conditioning:
            t = t + self._micro_condition(size_px, ratio)
        t0 = self.t_block(t).unflatten(1, (6, -1))  # (B, 6, D)
        x = self.run_blocks(x, self._read(y, mask, x.shape[1]), t, t0, grid)  # (B, N, D)
        x = self.final_layer(x, t)  # (B, N, patch * patch * 2 C)
        return self.unpatchify(x, grid)  # (B, 2 C, height, width)

    def _read(self, y: Tensor | Packed, mask: Tensor | None, image_tokens: int) -> Text:
        if isinstance(y, Packed):
            y = y._replace(tokens=self.y_embedder(self.cast(y.tokens)))  # (M, D)
            return arrange(y, image_tokens, self.config.heads, self.compiled)
        tokens = self.y_embedder(self.cast(y))  # (B, L, D)
        return Padded(tokens, None if mask is None else mask[:, None, None, :])

    def _micro_condition(self, size_px: Tensor | None, ratio: Tensor | None) -> Tensor:
        if size_px is None or ratio is None:
            raise ValueError("a model with micro-conditioning needs size_px and ratio")
        size = self.csize_embedder(size_px.flatten()).reshape(len(size_px), -1)  # (B, 2 D / 3)
        return torch.cat([size, self.ar_embedder(ratio)], dim=1)  # (B, D)
