"""Weights under the reference's names to those of diffusers' `PixArtTransformer2DModel`, and back, exactly.

Nothing is computed: tensors are renamed, and fused projections are cut along their first axis or joined again.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
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
_BLOCK = re.compile(r"((?:transformer_)?blocks\.)(\d{1,9})\.(.*)", re.DOTALL)
_DIFFUSERS = "diffusers' PixArtTransformer2DModel"


def to_diffusers(weights: Mapping[str, Tensor], config: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights under diffusers' names, and the configuration to build its model with.

    The tensors are views of those given: nothing is copied.

    Raises:
        DataError: If a weight is missing or surplus, naming it.
        ConfigError: If diffusers' class cannot express the model.
    """
    require_expressible(config)
    names = dict(_names(config.depth, config.micro_conditioning))
    require_keys("weights", set(names), set(weights))
    converted: dict[str, Tensor] = {}
    for native, targets in names.items():
        converted.update(zip(targets, weights[native].chunk(len(targets)), strict=True))
    return converted, _diffusers_config(config)


def native(where: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' weights under the reference's names; what model they are of is read off their own names.

    Raises:
        DataError: If a weight is missing or surplus, naming it.
    """
    depth = num_blocks(where, weights)
    return _joined(where, weights, depth, any(".resolution_embedder." in name for name in weights))


def is_diffusers(names: Iterable[str]) -> bool:
    """Tell diffusers' names from the reference's."""
    return any(name.startswith(("transformer_blocks.", "adaln_single.", "pos_embed.proj.")) for name in names)


def num_blocks(where: str, names: Iterable[str]) -> int:
    """Return how many blocks weights with such names have.

    Raises:
        DataError: If their numbers have gaps, before anybody builds a model of thousands of blocks for a stray name.
    """
    blocks: dict[int, list[tuple[str, str]]] = {}
    for match in filter(None, map(_BLOCK.match, names)):
        blocks.setdefault(int(match[2]), []).append((match[1], match[3]))
    depth = 1 + max(blocks, default=-1)
    if len(blocks) < depth:
        gap = next(i for i in range(depth) if i not in blocks)
        alike = blocks[min(blocks)]
        prefix, rest = min(alike)
        count = len(alike) * (depth - len(blocks))
        raise DataError(
            f"{where}: {prefix}{gap}.{rest} is missing ({count} such), though block {depth - 1} is there; is it of "
            "another model configuration?"
        )
    return depth


def require_expressible(config: Model) -> None:
    """Check that diffusers' class can hold a model.

    Raises:
        ConfigError: Naming the first key of it that it has no place for.
    """
    for key, has, found in (
        ("condition", "captions", config.condition == "class" and "classes (DiT)"),
        ("mlp_ratio", "4", config.mlp_ratio != 4 and config.mlp_ratio),
        ("modulation", '"single"', config.modulation != "single" and f'"{config.modulation}"'),
        ("qk_norm", "none", config.qk_norm and "one"),
        ("kv_compression", "none", config.kv_compression is not None and f'"{config.kv_compression}"'),
    ):
        if found:
            raise ConfigError(f"model.{key}: {_DIFFUSERS} has {has}, got {found}; convert with --to pth or safetensors")


def require_keys(where: str, expected: set[str], found: set[str]) -> None:
    """Check that two sets of weight names are the same.

    Raises:
        DataError: Naming the first that is missing, or else the first that is surplus.
    """
    for what, names in (("is missing", expected - found), ("is one too many", found - expected)):
        if names:
            raise DataError(f"{where}: {min(names)} {what} ({len(names)} such); is it of another model configuration?")


def require_weights(where: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check that weights are those of a model, each of its shape, and floating-point numbers.

    Args:
        where: Names the file, for messages.
        expected: The model's own, which may be on the meta device.
        found: What is to be loaded into it.

    Raises:
        DataError: Naming the first that is missing, surplus, of another shape or of another kind.
    """
    require_keys(where, set(expected), set(found))
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, found {tuple(found[name].shape)}"
            raise DataError(f"{where}: {name}: expected shape {shapes}; is it of another model configuration?")
        if not found[name].is_floating_point() or found[name].layout is not torch.strided:
            kind = str(found[name].dtype if found[name].layout is torch.strided else found[name].layout)
            raise DataError(
                f"{where}: {name}: expected floating-point numbers, found {kind.removeprefix('torch.')}; "
                "give weights that are neither quantised nor sparse"
            )


def _joined(where: str, weights: Mapping[str, Tensor], depth: int, micro: bool) -> dict[str, Tensor]:
    names = dict(_names(depth, micro))
    require_keys(where, {target for targets in names.values() for target in targets}, set(weights))
    joined = {}
    for name, targets in names.items():
        parts = [weights[target] for target in targets]
        if any(part.shape != parts[0].shape for part in parts):
            shapes = f"{tuple(parts[0].shape)} as {targets[0]}, found {[tuple(part.shape) for part in parts[1:]]}"
            raise DataError(f"{where}: {targets[1]}: expected shape {shapes}; is it of another model configuration?")
        joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def _names(depth: int, micro: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    outside = _OUTSIDE | (_MICRO if micro else {})
    pairs: list[tuple[str, tuple[str, ...]]] = [(name, (target,)) for name, target in outside.items()]
    for i in range(depth):
        for name, targets in _INSIDE.items():
            pairs.append((f"blocks.{i}.{name}", tuple(f"transformer_blocks.{i}.{target}" for target in targets)))
        table = f"blocks.{i}.scale_shift_table"
        yield table, (f"transformer_blocks.{i}.scale_shift_table",)
    yield "final_layer.scale_shift_table", ("scale_shift_table",)
    for name, targets in pairs:
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", tuple(f"{target}.{kind}" for target in targets)


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
