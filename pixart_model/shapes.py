"""What model weights are of, read off their names and shapes: the `model` section that they fit.

Legend: D width, C latent channels, p patch, Dc width of the text encoder, r the MLP's hidden channels over D.
Heads leave no trace in shapes, and positions only where the file has its `pos_embed`: those come from what lies beside
the weights, from whoever asks, or, for heads, from the sizes that have been published.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixart_data.errors import ConfigError, DataError
from pixart_model.conversion import num_blocks
from pixart_model.layers import Positions
from pixart_model.sizes import SIZES, Model

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
"""Attention heads by width, of DiT's XL, L, B and S, and of PixArt."""
_CONVOLUTION = re.compile(r"blocks\.(\d{1,9})\.attn\.sr\.weight")
_SCALES = (0.5, 1.0, 2.0, 4.0)  # of all published models; one that is measured is right to 0.5% only in bf16
_TOLERANCE = 0.02  # of a sine; bf16 errs by 0.004

UNSEEN = {"heads", "base_size", "interpolation_scale", "kv_compression", "kv_compression_factor", "kv_compression_from"}
"""Keys of `model` that names and shapes do not tell, or not always."""


def config_of(where: str, weights: Mapping[str, Tensor], told: Mapping[str, Any]) -> Model:
    """Return the configuration of a model from its weights, under the reference's or DiT's names.

    Args:
        where: Names the file, for messages.
        weights: Without `pos_embed`.
        told: What is known of the keys in `UNSEEN`.

    Raises:
        DataError: If these are not weights of PixArt or DiT.
        ConfigError: If the number of heads is neither told nor that of a published size.
    """
    width, in_channels, patch = _shape(where, weights, "x_embedder.proj.weight", 4)[:3]
    known: dict[str, Any] = {
        "depth": num_blocks(where, weights),
        "width": width,
        "in_channels": in_channels,
        "patch": patch,
    }
    known["mlp_ratio"] = _ratio(_shape(where, weights, "blocks.0.mlp.fc1.weight", 2)[0], width)
    known["qk_norm"] = "blocks.0.attn.q_norm.weight" in weights
    if "y_embedder.embedding_table.weight" in weights:
        rows = _shape(where, weights, "y_embedder.embedding_table.weight", 2)[0]
        known |= {"condition": "class", "num_classes": rows - 1}
    else:
        known["caption_width"] = _shape(where, weights, "y_embedder.y_proj.fc1.weight", 2)[1]
        known["micro_conditioning"] = any(name.startswith("csize_embedder.") for name in weights)
        known["modulation"] = "blocks" if any(".adaLN_modulation." in name for name in weights) else "single"
    known |= {**_compression(where, weights), **told}
    known["heads"] = known.get("heads") or HEADS.get(width)
    if known["heads"] is None:
        raise ConfigError(
            f"{where}: expected a width of which the number of heads is known ({', '.join(map(str, sorted(HEADS)))}), "
            f"found {width}; give heads, {_heads_like(width)}"
        )
    known["size"] = _size(known)
    try:
        return Model.model_validate(known)
    except ValueError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise DataError(f"{where}: expected weights of PixArt or DiT, found {'; '.join(lines[1:3])}") from error


def grid_of(where: str, positions: Tensor, patch: int) -> dict[str, Any]:
    """Return `base_size` and `interpolation_scale` of a stored position embedding (1, N, D) of a square.

    Raises:
        DataError: If the embedding is not the formula's, for any scale.
    """
    side = math.isqrt(positions.shape[-2]) if positions.ndim == 3 else 0
    if side < 2 or side * side != positions.shape[-2] or positions.shape[-1] % 4:
        raise DataError(
            f"{where}: pos_embed: expected the positions of a square, (1, N, D), found shape {tuple(positions.shape)}; "
            "give base_size and interpolation_scale"
        )
    table, width = positions.float(), positions.shape[-1]
    second = torch.atan2(table[0, 1, 0], table[0, 1, width // 4])  # where the second column of tokens lies, in radians
    measured = round(1 / max(float(second), 1e-3), 2)

    def error_of(scale: float) -> float:
        return float((Positions(width, side, scale)(side, side, table.device) - table).abs().max())

    error, scale = min((error_of(scale), scale) for scale in {*_SCALES, max(measured, 0.01)})
    if not error < _TOLERANCE:
        raise DataError(
            f"{where}: pos_embed: expected the sine-cosine positions of {side} x {side} tokens, found others (off by "
            f"{error:.2g}); give base_size and interpolation_scale to use the formula's"
        )
    return {"base_size": side * patch, "interpolation_scale": scale}


def _shape(where: str, weights: Mapping[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    if name not in weights:
        found = ", ".join(sorted(weights)[:2]) or "none"
        raise DataError(f"{where}: {name} is missing; expected weights of PixArt or DiT, found {found} ...")
    shape = tuple(weights[name].shape)
    if len(shape) != num_axes or 0 in shape:
        raise DataError(
            f"{where}: {name}: expected {num_axes} axes of at least 1, found shape {shape}; is it of another model?"
        )
    return shape


def _ratio(hidden: int, width: int) -> float:
    """r, such that `int(width * r)` is the number of hidden channels in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _compression(where: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sigma's convolutions over keys and values; pooling and taking every second one have no weights."""
    blocks = [int(match[1]) for match in map(_CONVOLUTION.fullmatch, weights) if match]
    if not blocks:
        return {}
    factor = _shape(where, weights, f"blocks.{min(blocks)}.attn.sr.weight", 4)[3]
    return {"kv_compression": "conv", "kv_compression_factor": factor, "kv_compression_from": min(blocks)}


def _heads_like(width: int) -> str:
    """Say which heads to try: those of our size of that width, or any that divide it."""
    named = next(((name, size().heads) for name, size in SIZES.items() if size().width == width), None)
    return f"--set heads=N, a divisor of {width}" + (f" ({named[1]} if it is of size {named[0]})" if named else "")


def _size(known: dict[str, Any]) -> str | None:
    """The name of the size with these numbers, if there is one."""
    keys = ("depth", "width", "heads")
    same = (name for name, size in SIZES.items() if all(getattr(size(), key) == known[key] for key in keys))
    return next(same, None)
