"""The transformer's weights as other programs read them: diffusers' folder, the reference's `.pth`, safetensors."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart_data.errors import JobError
from pixart_data.models import versions
from pixart_data.retries import storage
from pixart_model.conversion import to_diffusers
from pixart_model.layers import Positions
from pixart_model.weights import (
    AVERAGE_KEY,
    CONFIG_KEY,
    DIFFUSERS_CONFIG,
    DIFFUSERS_WEIGHTS,
    FEATURES_KEY,
    NULL_CAPTION,
    NULL_TABLE,
    POSITIONS,
    Weights,
)

log = logging.getLogger(__name__)

_REFERENCE_TOKENS = 120  # rows of PixArt-alpha's null caption
MICRO_SIDE = 128
"""Side in latent cells of the only models that `PixArtAlphaPipeline` gives sizes and ratios to."""


def write_transformer(weights: Weights, folder: Path) -> None:
    """Write what diffusers' `PixArtTransformer2DModel.from_pretrained` loads; needs no diffusers.

    Raises:
        ConfigError: If diffusers' class cannot express the model.
        JobError: If the storage fails.
    """
    tensors, arguments = to_diffusers(weights.tensors, weights.config)
    config = {"_class_name": "PixArtTransformer2DModel", **arguments}
    if "diffusers" in (installed := versions("diffusers")):
        config["_diffusers_version"] = installed["diffusers"]
    with _writing(folder):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / DIFFUSERS_WEIGHTS, {"format": "pt"})
        (folder / DIFFUSERS_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if weights.config.micro_conditioning and weights.config.base_size != MICRO_SIDE:
        log.warning(
            "PixArtAlphaPipeline gives sizes and ratios to models of sample_size 128 only, and this one has %d: "
            "give it `added_cond_kwargs` in a loop of your own",
            weights.config.base_size,
        )


def write_safetensors(weights: Weights, folder: Path) -> None:
    """Write one file under the reference's names, with all that `weights.read` finds in a checkpoint.

    The `model` section and what the features were made with are its metadata, the null caption a tensor.

    Raises:
        JobError: If the storage fails.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    if weights.null_table is not None:
        tensors[NULL_TABLE] = weights.null_table.contiguous()
    if weights.null_caption is not None:
        tensors[NULL_CAPTION] = weights.null_caption.contiguous()
    config = weights.config.model_dump(exclude=set(weights.assumed))
    told = {CONFIG_KEY: config, FEATURES_KEY: weights.features, AVERAGE_KEY: weights.is_ema}
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in told.items() if value is not None}}
    with _writing(folder):
        save_file(tensors, folder / "model.safetensors", metadata)


def write_pth(plain: Weights, average: Weights | None, folder: Path) -> None:
    """Write what the reference's `load_checkpoint` reads, or DiT's `find_model`: `model.pth`, of a DiT `model.pt`.

    Args:
        plain: The weights.
        average: Their moving average, where there is one.
        folder: Where to write the file.

    Raises:
        JobError: If the storage fails.
    """
    is_dit = plain.config.condition == "class"
    if not is_dit and null_table(plain) is None:
        log.warning(
            "%s tells no null caption: model.pth is without %s, and the reference's samplers would draw one at random",
            plain.where,
            NULL_TABLE,
        )
    names = ("model", "ema") if is_dit else ("state_dict", "state_dict_ema")
    states: dict[str, Any] = {
        name: _state(one) for name, one in zip(names, (plain, average), strict=True) if one is not None
    }
    states[CONFIG_KEY] = plain.config.model_dump(exclude=set(plain.assumed))  # heads above all; they ignore the key
    with _writing(folder):
        torch.save(states, folder / ("model.pt" if is_dit else "model.pth"))


def _state(weights: Weights) -> dict[str, Tensor]:
    """Return weights with what the reference keeps beside them: positions, and the null caption where it is known."""
    config, side = weights.config, weights.config.base_size // weights.config.patch
    positions = Positions(config.width, side, config.interpolation_scale)
    state = {POSITIONS: positions(side, side, torch.device("cpu"))}
    null = null_table(weights)
    if null is not None:
        state[NULL_TABLE] = null
    for name, tensor in weights.tensors.items():
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes  # torch.save writes storages, not views of them
        state[name] = tensor if whole else tensor.clone()
    return state


def null_table(weights: Weights) -> Tensor | None:
    """Return the null caption as the reference's `y_embedding`, fp32 (L, caption_width), or None if none is known.

    The reference cuts it at the length of the caption. The features of the empty caption are therefore repeated: of
    T5 they are one token, and attention to copies of a token is attention to the token, so that the reference's
    samplers see the null caption that the model was trained with, at any length.
    """
    if weights.null_table is not None:
        return weights.null_table
    if weights.null_caption is None:
        return None
    policy = (weights.features or {}).get("text", {}).get("policy", {})
    length = policy.get("max_tokens") or _REFERENCE_TOKENS
    copies = math.ceil(length / len(weights.null_caption))
    return weights.null_caption.float().repeat(copies, 1)[:length].contiguous()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Like `storage`, also where safetensors or torch put the operating system's error into one of their own."""
    with storage(folder):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:
            why = str(error).split("\n")[0]
            raise JobError(f"{folder}: cannot write: {why}; check the storage, then run again") from error
