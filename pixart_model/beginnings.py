"""What a new run starts from: other weights, brought to the model that the job describes, or a refusal.

What goes: the same kind of model at any resolution (positions are computed, so nothing is resized), a model without
micro-conditioning into one with it, full attention into compressed, a DiT into a PixArt. What differs in size does not.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixart_data.errors import ConfigError, DataError
from pixart_model.config import Init
from pixart_model.networks import Network
from pixart_model.nulls import NullCaption, is_repeated
from pixart_model.reparameterisation import TIMESTEP, TRUNK, reparameterise, require_same, silent_sizes
from pixart_model.sizes import SIZES, Model
from pixart_model.weights import NULL_TABLE, Weights, read

_COMPRESSION = ("kv_compression", "kv_compression_factor", "kv_compression_from")
_FACTS = (
    ("image", "scaling_factor", "VAE"),
    ("image", "shift_factor", "VAE"),
    ("image", "id", "VAE"),
    ("text", "width", "text encoder"),
    ("text", "id", "text encoder"),
)
_OF_SIZE = ("depth", "width", "heads")  # keys that `model.size` stands for
_MEET_LATENTS = ("x_embedder.proj.", "final_layer.linear.")
_MEET_CAPTIONS = ("y_embedder.y_proj.",)
_log = logging.getLogger(__name__)


def begin(init: Init, model: Network, features: Mapping[str, Any]) -> NullCaption | None:
    """Load what a new run starts from into its model, and say in the log what was taken and what was drawn anew.

    Args:
        init: `init.weights` unset leaves the model as it was drawn.
        model: Freshly drawn, on any device, not yet distributed; changed in place.
        features: `Dataset.facts` of what it will be trained on: which VAE and which text encoder made it.

    Returns:
        The null caption that `init.null_caption = "reference"` asks for; otherwise None: the dataset's is to be used.

    Raises:
        ConfigError: If the weights are of another size, of a kind that does not become the job's, or of features of
            another VAE or text encoder than the dataset's; or if they lack the null caption that is asked for. The
            message names the key.
        DataError: If the weights are damaged, or one is not a finite number.
    """
    if init.weights is None:
        if init.null_caption == "reference":
            raise ConfigError(
                'init.null_caption: expected init.weights, for "reference" is a table in a .pth of PixArt-alpha, found '
                'none; name the file, or set init.null_caption = "empty"'
            )
        return None
    heads = {"heads": model.config.heads}  # for files that do not tell: they leave no trace in shapes
    weights = read(init.weights, init.use_ema, heads)
    _require_finite(weights)
    changed = _compare_features(weights, features, init.other_features)
    state = model.state_dict()
    taken, how = _adapt(weights, model.config, state, init)
    null_caption = _null_caption(weights, features) if init.null_caption == "reference" else None
    model.load_state_dict(state | taken, strict=True)
    account = _account(weights, model.config, how, state.keys() - taken.keys(), changed)
    if weights.null_table is not None and null_caption is None and not is_repeated(weights.null_table):
        account += "; null caption: of the empty string from now on, not the table that they were trained with"
    _log.info("%s", account)
    return null_caption


def _require_finite(weights: Weights) -> None:
    table = {} if weights.null_table is None else {NULL_TABLE: weights.null_table}
    for name, tensor in {**weights.tensors, **table}.items():
        if not tensor.isfinite().all():
            raise DataError(
                f"{weights.where}: {name}: expected finite numbers, found NaN or infinity; start from a checkpoint "
                "before training diverged, or copy the file again"
            )


def _adapt(weights: Weights, wanted: Model, state: dict[str, Tensor], init: Init) -> tuple[dict[str, Tensor], str]:
    """Return the weights that are not as they were drawn, and a word on them."""
    found, where = weights.config, weights.where
    _require_same_trunk(found, wanted, where)
    if (found.condition, wanted.condition) == ("class", "caption"):
        made = reparameterise(weights.tensors, found, wanted, init.shared_mlp, init.without_class, state)
        options = f"without_class = {init.without_class}"
        if wanted.modulation == "single":  # with "blocks", each keeps its own MLP
            options = f"shared_mlp = {init.shared_mlp}, {options}"
        taken = {name: tensor for name, tensor in made.items() if tensor is not state[name]}
        return taken, f"DiT, re-parameterised at t = {TIMESTEP} ({options}), captions without effect yet"
    if found.condition != wanted.condition:
        raise ConfigError(
            f"init.weights: expected weights of a DiT, for model.condition = 'class', found a PixArt's in {where}; no "
            "model of classes starts from one of captions: set model.condition = 'caption', or leave init.weights out"
        )
    _require_same_size(found, wanted, where, init.other_features)
    taken = {name: tensor for name, tensor in weights.tensors.items() if tensor.shape == state[name].shape}
    if found.in_channels != wanted.in_channels:
        taken = _without(taken, _MEET_LATENTS)
    if wanted.condition == "class":
        return taken, "DiT"
    if found.caption_width != wanted.caption_width:
        taken = _without(taken, _MEET_CAPTIONS)
    if wanted.micro_conditioning and not found.micro_conditioning:
        return taken | silent_sizes(state), "PixArt, sizes without effect yet"
    return taken, "PixArt"


def _require_same_trunk(found: Model, wanted: Model, where: str) -> None:
    """Refuse another size with all that differs, and by its name where it has one."""
    keys = [key for key in TRUNK if getattr(found, key) != getattr(wanted, key)]
    name = _name_of_size(found, wanted)
    if len(keys) < 2:
        require_same(found, wanted, keys, where)
        return
    rest = [key for key in keys if name is None or key not in _OF_SIZE]
    settings = ([f'model.size = "{name}"'] if name else []) + [f"model.{key} = {_toml(found, key)}" for key in rest]
    raise ConfigError(
        f"{', '.join(f'model.{key}' for key in keys)}: expected {', '.join(_toml(found, key) for key in keys)}, as "
        f"{where} has it, found {', '.join(_toml(wanted, key) for key in keys)}; set {', '.join(settings)}"
    )


def _name_of_size(found: Model, wanted: Model) -> str | None:
    """The size to ask for, if that alone makes the job's model one of the weights' depth, width and heads.

    Numbers that stand beside `size` in the job would win. Heads that a file does not tell were taken from the job.
    """
    if wanted.size is None or any(getattr(SIZES[wanted.size](), key) != getattr(wanted, key) for key in _OF_SIZE):
        return None
    keys = _OF_SIZE[:2] if found.heads == wanted.heads else _OF_SIZE
    same = (name for name, size in SIZES.items() if all(getattr(size(), key) == getattr(found, key) for key in keys))
    name = next(same, None)
    return None if name == wanted.size else name


def _toml(model: Model, key: str) -> str:
    value = getattr(model, key)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _require_same_size(found: Model, wanted: Model, where: str, other_features: bool) -> None:
    if wanted.condition == "class":
        require_same(found, wanted, ("num_classes",), where)
        meets: tuple[str, ...] = ("in_channels",)
    else:
        require_same(found, wanted, ("modulation",), where)
        if found.kv_compression is not None:
            require_same(_with_first_block(found), _with_first_block(wanted), _COMPRESSION, where)
        if found.micro_conditioning:
            require_same(found, wanted, ("micro_conditioning",), where)
        meets = ("in_channels", "caption_width")
    if not other_features:
        advice = ", or init.other_features = true to draw the layers anew that it decides"
        require_same(found, wanted, meets, where, advice)


def _with_first_block(model: Model) -> Model:
    return model.model_copy(update={"kv_compression_from": model.compressing_blocks.start})


def _without(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


@dataclass(frozen=True)
class _Difference:
    what: str
    fact: str
    before: object
    now: object


def _compare_features(weights: Weights, features: Mapping[str, Any], other_features: bool) -> list[_Difference]:
    """Compare the encoders that weights were trained on with those of the dataset, as far as both are known."""
    differences = []
    for part, fact, what in _FACTS:
        before, now = (_model_facts(facts, part) for facts in (weights.features or {}, features))
        if fact == "id":
            fact = _deciding(before, now)
        if before and now and (before.get(fact) or 0.0) != (now.get(fact) or 0.0):
            differences.append(_Difference(what, fact, before.get(fact), now.get(fact)))
    if differences and not other_features:
        first = differences[0]
        raise ConfigError(
            f"init.weights: expected weights that were trained on features of the dataset's {first.what} "
            f"({first.fact} {first.now}), found {weights.where}, trained with {first.fact} {first.before}; take other "
            "features, or, to adapt the weights or if both are the same model, set init.other_features = true"
        )
    return differences


def _deciding(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which fact tells whether two encoders are one: what is in the folders, or else what they are called.

    A folder may be copied to another place, or get other weights; the revision of a hub id is no other encoder.
    """
    contents = [str(facts.get("identity") or "") for facts in (before, now)]
    are_folders = all(content.startswith("folder:") for content in contents)
    return "identity" if are_folders or (contents[0] and contents[0] == contents[1]) else "id"


def _model_facts(facts: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    model: Mapping[str, Any] = (facts.get(part) or {}).get("model") or {}
    return model


def _null_caption(weights: Weights, features: Mapping[str, Any]) -> NullCaption:
    table, where = weights.null_table, weights.where
    if table is None:
        raise ConfigError(
            f"init.null_caption: expected the reference's null caption, y_embedder.y_embedding, found none in {where}; "
            'set init.null_caption = "empty"'
        )
    text = features.get("text") or {}
    width, max_tokens = _model_facts(features, "text").get("width"), (text.get("policy") or {}).get("max_tokens")
    if width is not None and table.shape[1] != width:
        raise ConfigError(
            f"init.null_caption: expected a null caption of the text features' width {width}, found {table.shape[1]} "
            f'in {where}; set init.null_caption = "empty"'
        )
    if max_tokens is not None and max_tokens > len(table):
        raise ConfigError(
            f"init.null_caption: expected captions of at most {len(table)} tokens, which the null caption in {where} "
            f"covers, found features of up to {max_tokens}; take features with text.max_tokens = {len(table)}, or set "
            'init.null_caption = "empty"'
        )
    return NullCaption(table.to(torch.bfloat16, copy=True), follows_caption=True)


def _account(weights: Weights, wanted: Model, how: str, fresh: Iterable[str], changed: list[_Difference]) -> str:
    """Say in one line what the run starts from."""
    found = weights.config
    parts = [f"starts from {weights.where}", how]
    parts.append("its moving average" if weights.is_ema else "its weights")
    layers = sorted({re.sub(r"\.(weight|bias)$", "", re.sub(r"^blocks\.\d+", "blocks.*", name)) for name in fresh})
    parts.append(f"drawn anew: {', '.join(layers) or 'nothing'}")
    for key in ("base_size", "interpolation_scale"):
        before, now = getattr(found, key), getattr(wanted, key)
        if key in weights.assumed:
            parts.append(f"{key} {now}, theirs is not told")
        elif before != now:
            parts.append(f"{key} {before} -> {now}")
    if weights.features is None:
        parts.append("trained on features of encoders that it does not name")
    parts += [f"{one.what}: {one.fact} {one.before} -> {one.now}" for one in changed]
    return "; ".join(parts)
