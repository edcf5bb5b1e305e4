"""The transformer's section of a job file, and the sizes it can be given by name.

A size is a function that returns a complete section: `pixart_xl_2()`, `pixart_l_2()`, `pixart_b_2()`, `pixart_s_2()`
and `pixart_tiny()`. In a job file `size = "xl-2"` names one of them, and a number written beside it wins.
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pixart_data.config import Section

Size = Literal["xl-2", "l-2", "b-2", "s-2", "tiny"]


class Model(Section):
    """The PixArt transformer, complete: nothing about it is decided elsewhere."""

    size: Size | None = "xl-2"
    """Where the numbers that are not given come from; none where `depth`, `width` and `heads` are."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    width: int = Field(ge=4)
    """Channels of a token; a multiple of `heads` and of 4, and of 3 with micro-conditioning."""
    heads: int = Field(ge=1)
    """Attention heads of a block."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden channels of a block's MLP over `width`."""
    patch: int = Field(default=2, ge=1)
    """Side of a token in latent cells."""
    in_channels: int = Field(default=4, ge=1)
    """Latent channels of the VAE; the model returns twice as many: noise and variance."""
    caption_width: int = Field(default=4096, ge=1)
    """Width of the text encoder: 4096 for T5-XXL."""
    base_size: int = Field(default=32, ge=1)
    """Side in latent cells of the square that positions are measured on: 32 for 256 px, 64 for 512, 128 for 1024."""
    interpolation_scale: float = Field(default=1.0, gt=0)
    """Divides the positions (alpha's `lewei_scale`, Sigma's `pe_interpolation`): 1 for 256 and 512 px, 2 for 1024; of
    Sigma 0.5, 1 and 2, and 4 for 2048."""
    micro_conditioning: bool = False
    """Condition on the original size and the aspect ratio, as the reference's multi-scale models do."""
    condition: Literal["caption", "class"] = "caption"
    """`class` is DiT, which the paper starts from: a learned vector for each class, a modulation MLP in each block, no
    cross-attention."""
    num_classes: int = Field(default=1000, ge=1)
    """With `condition = "class"`: classes; DiT learns one more vector, for no class."""
    modulation: Literal["single", "blocks"] = "single"
    """`single` is the paper's adaLN-single: an MLP for all blocks and a table in each. `blocks` is its ablation
    "adaLN", where each block has an MLP of its own in place of the table. Of DiT it is not read."""
    qk_norm: bool = False
    """LayerNorm on the queries and keys of self-attention, as in PixArt-Sigma."""
    kv_compression: Literal["conv", "average", "uniform"] | None = None
    """How self-attention shortens its keys and values, as in PixArt-Sigma: a strided convolution, pooling, or taking
    every second row and column."""
    kv_compression_factor: int = Field(default=2, ge=2)
    """By how much on each side; read only with `kv_compression`."""
    kv_compression_from: int | None = Field(default=None, ge=0)
    """The first block that does so; unset, the second half of them, as in PixArt-Sigma."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if {"depth", "width", "heads"} <= given.keys():
            return {"size": None, **given}  # not the default's name on other numbers
        name = given.get("size", "xl-2")
        return {**SIZES[name]().model_dump(), **given} if name in SIZES else given

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for divisor, what in ((self.heads, "heads"), (4, "4, for positions in two axes")):
            if self.width % divisor:
                raise ValueError(f"width: expected a multiple of {divisor} ({what}), got {self.width}")
        if self.micro_conditioning and self.width % 3:
            step = math.lcm(3, 4, self.heads)
            raise ValueError(
                f"width: micro_conditioning needs a multiple of 3, got {self.width}; set width = "
                f"{self.width // step * step + step}, or take another size"
            )
        if self.base_size % self.patch:
            raise ValueError(f"base_size: expected a multiple of patch ({self.patch}), got {self.base_size}")
        return self

    @model_validator(mode="after")
    def _is_dit_or_pixart(self) -> Self:
        if self.condition == "caption":
            return self
        for key, value in (("micro_conditioning", self.micro_conditioning), ("kv_compression", self.kv_compression)):
            if value:
                raise ValueError(f"{key}: DiT (condition = 'class') has none, got {value!r}; leave it out")
        return self

    @model_validator(mode="after")
    def _compresses_some(self) -> Self:
        first = self.kv_compression_from
        if self.kv_compression is not None and first is not None and first >= self.depth:
            raise ValueError(
                f"kv_compression_from: expected a block of the {self.depth}, 0 to {self.depth - 1}, got {first}; give "
                "a lower number, or leave kv_compression out"
            )
        return self

    @property
    def compressing_blocks(self) -> range:
        """The numbers of the blocks whose self-attention shortens its keys and values."""
        if self.kv_compression is None:
            return range(0)
        first = self.depth // 2 if self.kv_compression_from is None else self.kv_compression_from
        return range(first, self.depth)


def pixart_xl_2() -> Model:
    """Return PixArt-XL/2, the paper's model: 610,856,096 parameters."""
    return Model(size="xl-2", depth=28, width=1152, heads=16)


def pixart_l_2() -> Model:
    """Return the size of DiT-L/2 (arXiv:2212.09748)."""
    return Model(size="l-2", depth=24, width=1024, heads=16)


def pixart_b_2() -> Model:
    """Return the size of DiT-B/2 (arXiv:2212.09748)."""
    return Model(size="b-2", depth=12, width=768, heads=12)


def pixart_s_2() -> Model:
    """Return the size of DiT-S/2 (arXiv:2212.09748)."""
    return Model(size="s-2", depth=12, width=384, heads=6)


def pixart_tiny() -> Model:
    """Return a model that trains on a laptop's CPU, for tests and demonstrations."""
    return Model(size="tiny", depth=2, width=96, heads=4)


SIZES = {"xl-2": pixart_xl_2, "l-2": pixart_l_2, "b-2": pixart_b_2, "s-2": pixart_s_2, "tiny": pixart_tiny}
