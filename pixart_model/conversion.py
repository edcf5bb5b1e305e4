"""Weights under the reference's names to those of diffusers' `PixArtTransformer2DModel`, and back, exactly.

Nothing is computed: tensors are renamed, and fused projections are cut along their first axis or joined again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pixart_data.errors import ConfigError, DataError
from pixart_model.sizes import Model

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
_MICRO = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
_INSIDE: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def to_diffusers(weights: dict[str, Tensor], config: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights under diffusers' names, and the configuration to build its model with.

    Raises:
        DataError: If a weight is missing or surplus, naming it.
        ConfigError: If diffusers' class cannot express the model.
    """
    if config.mlp_ratio != 4:
        raise ConfigError(f"model.mlp_ratio: diffusers' PixArtTransformer2DModel has 4, got {config.mlp_ratio}")
    names = dict(_names(config))
    require_keys("weights", set(names), set(weights))
    converted = {}
    for native, targets in names.items():
        for target, part in zip(targets, weights[native].chunk(len(targets)), strict=True):
            converted[target] = part.clone(memory_format=torch.contiguous_format)
    return converted, _diffusers_config(config)


def from_diffusers(weights: dict[str, Tensor], config: Model) -> dict[str, Tensor]:
    """Return diffusers' weights under the reference's names.

    Raises:
        DataError: If a weight is missing or surplus, naming it.
    """
    names = dict(_names(config))
    require_keys("weights of diffusers", {target for targets in names.values() for target in targets}, set(weights))
    return {native: torch.cat([weights[target] for target in targets]) for native, targets in names.items()}


def require_keys(where: str, expected: set[str], found: set[str]) -> None:
    """Check that two sets of weight names are the same.

    Raises:
        DataError: Naming the first that is missing, or else the first that is surplus.
    """
    for what, names in (("is missing", expected - found), ("is one too many", found - expected)):
        if names:
            raise DataError(f"{where}: {min(names)} {what} ({len(names)} such); is it of another model configuration?")


def _names(config: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    outside = _OUTSIDE | (_MICRO if config.micro_conditioning else {})
    pairs: list[tuple[str, tuple[str, ...]]] = [(native, (target,)) for native, target in outside.items()]
    for i in range(config.depth):
        for native, targets in _INSIDE.items():
            pairs.append((f"blocks.{i}.{native}", tuple(f"transformer_blocks.{i}.{target}" for target in targets)))
        table = f"blocks.{i}.scale_shift_table"
        yield table, (f"transformer_blocks.{i}.scale_shift_table",)
    yield "final_layer.scale_shift_table", ("scale_shift_table",)
    for native, targets in pairs:
        for kind in ("weight", "bias"):
            yield f"{native}.{kind}", tuple(f"{target}.{kind}" for target in targets)


def _diffusers_config(config: Model) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": 2 * config.in_channels,
        "num_layers": config.depth,
        "cross_attention_dim": config.width,
        "attention_bias": True,
        "sample_size": config.base_size,
        "patch_size": config.patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": config.interpolation_scale,
        "use_additional_conditions": config.micro_conditioning,
        "caption_channels": config.caption_width,
    }
