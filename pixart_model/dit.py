"""DiT, the class-conditional transformer that the paper starts from: noisy latents, time and a class in.

Legend: B batch, C latent channels, N image tokens, D width; x latents, then image tokens; t timesteps, then their
embedding; y classes; c what time and class give together.
Source: DiT (arXiv:2212.09748). Parameter names are those of its published weights, without `pos_embed`, which is
computed.
"""

from torch import Tensor, nn

from pixart_model.layers import Mlp, SelfAttention, modulate, modulator
from pixart_model.sizes import Model
from pixart_model.trunk import Trunk


class DiT(Trunk):
    """The transformer, freshly initialised: as published, it returns zeros then."""

    def __init__(self, config: Model, grad_checkpointing: bool = False) -> None:
        super().__init__(config, grad_checkpointing)
        width = config.width
        self.y_embedder = LabelEmbed(config.num_classes, width)
        for _ in range(config.depth):
            self.blocks.append(ClassBlock(width, config.mlp_ratio, SelfAttention(width, config.heads, config.qk_norm)))
        self.final_layer = ClassFinalLayer(width, config.patch, 2 * config.in_channels)
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
            y: Labels, int64 (B,); `config.num_classes` is no class.
            mask: Not read, like the two that follow: what PixArt takes, so that one loop trains both.
            size_px: Not read.
            ratio: Not read.

        Returns:
            (B, 2 C, height, width): noise, then the variance as a place between its bounds, in [-1, 1].
        """
        x, grid = self.embed(x)  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        x = self.run_blocks(x, c, grid)  # (B, N, D)
        x = self.final_layer(x, c)  # (B, N, patch * patch * 2 C)
        return self.unpatchify(x, grid)  # (B, 2 C, height, width)


class LabelEmbed(nn.Module):
    """A learned vector for each class, and one for none: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.embedding_table(y)
        return out


class ClassBlock(nn.Module):
    """A transformer block of DiT, modulated by an MLP of its own (adaLN-Zero)."""

    def __init__(self, width: int, mlp_ratio: float, attention: SelfAttention) -> None:
        super().__init__()
        self.attn = attention
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.adaLN_modulation = modulator(width, 6)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens x (B, N, D) of a grid; c (B, D) is time and class."""
        modulation = self.adaLN_modulation(c)[:, None].to(x.dtype)  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)  # (B, 1, D) each
        x = x + gate_msa * self.attn(modulate(x, shift_msa, scale_msa), grid)
        out: Tensor = x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))
        return out


class ClassFinalLayer(nn.Module):
    """Tokens to the latent cells under them: (B, N, D) -> (B, N, patch * patch * out_channels)."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = modulator(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Image tokens x (B, N, D); c (B, D) is time and class."""
        shift, scale = self.adaLN_modulation(c)[:, None].to(x.dtype).chunk(2, dim=2)  # (B, 1, D) each
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out
