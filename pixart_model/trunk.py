"""What PixArt and DiT have in common: latents to tokens and back, blocks in between.

Legend: B batch, C latent channels, N image tokens, D width. Sizes in latent cells unless a name ends in _px.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart_model.attention import is_autocasting
from pixart_model.layers import NumberEmbed, PatchEmbed, Positions
from pixart_model.sizes import Model

_NORMAL = ("t_embedder.", "t_block.", "y_embedder.", "csize_embedder.", "ar_embedder.")
_ZERO = ("cross_attn.proj.weight", "final_layer.linear.weight", "adaLN_modulation.1.weight")


class Trunk(nn.Module):
    """A diffusion transformer without its conditions; subclasses add them, blocks and a last layer.

    Attributes:
        config: All that decides the shapes.
        grad_checkpointing: Recompute each block in the backward pass.
        blocks: The transformer blocks.
        positions: The position embeddings; not part of the state.
    """

    def __init__(self, config: Model, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = grad_checkpointing
        self.x_embedder = PatchEmbed(config.in_channels, config.width, config.patch)
        self.t_embedder = NumberEmbed(config.width)
        self.blocks = nn.ModuleList()
        self.positions = Positions(config.width, config.base_size // config.patch, config.interpolation_scale)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_embedder.proj.weight.device

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile make one program for the blocks, for canvases and captions of any size.

        Copies of the model are not compiled. The first step takes a minute or two.
        """
        # Else torch would cut the program of a block wherever one of DDP's buckets of gradients is full, for these to
        # travel early, and what stands on both sides of a cut could not be fused. Blocks are small enough.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            block.compile(dynamic=True, backend=backend)

    @property
    def compiled(self) -> bool:
        """Whether the blocks are compiled, or being so as part of the whole."""
        return torch.compiler.is_compiling() or self.blocks[0]._compiled_call_impl is not None

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew from torch's global generator, distributed as in the reference."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.endswith(_ZERO):
                nn.init.zeros_(parameter)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("sr.weight"):  # a mean to begin with
                nn.init.constant_(parameter, 1 / self.config.kv_compression_factor**2)
            elif name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.width**-0.5)
            elif name.startswith(_NORMAL):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return latents (B, C, height, width) as tokens (B, N, D) with positions, and the rows and columns of them.

        Tokens have the type of the weights, and fp32 under autocast: it is for the blocks' matrices, not for the sums
        that run through all of them.
        """
        grid = x.shape[2] // self.config.patch, x.shape[3] // self.config.patch
        tokens = self.x_embedder(self.cast(x))  # (B, N, D)
        stream = torch.float32 if is_autocasting(x.device) else self.dtype
        return tokens.to(stream) + self.positions(*grid, x.device).to(stream), grid

    def cast(self, features: Tensor) -> Tensor:
        """Return features in the type that the first layer takes: the weights', or any under autocast."""
        return features if is_autocasting(features.device) else features.to(self.dtype)

    def run_blocks(self, x: Tensor, *conditions: Any) -> Tensor:
        """Return tokens (B, N, D) after all blocks."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                # No block draws numbers, and to ask a GPU's generator for its state is to wait for the GPU.
                x = checkpoint(block, x, *conditions, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *conditions)
        return x

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return patches (B, N, patch * patch * channels) as (B, channels, height, width)."""
        patch, (rows, columns) = self.config.patch, grid
        x = x.view(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)  # (B, channels, rows, patch, ...)
        return x.reshape(*x.shape[:2], rows * patch, columns * patch)  # (B, channels, height, width)
