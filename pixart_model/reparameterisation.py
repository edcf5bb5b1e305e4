"""A class-conditional DiT as the start of a PixArt: the same function at t = 500, with captions that do nothing yet.

Of a block, DiT makes shifts, scales and gates S_i(t) = W_i s(t) + b_i, with s(t) = SiLU(e(t) + y), e the embedding of
the timestep and y that of the class. PixArt has one MLP (W, b) for all blocks and a table E_i in each:
S_i(t) = W s(t) + b + E_i. At t = 500 the two are made equal:

    E_i = (W_i s(500) + b_i) - (W s(500) + b)

PixArt's final layer has no MLP, but adds the embedding itself to its table: E_F = W_F s(500) + b_F - e(500).

Legend: D width; W (6 D, D), b (6 D,); F the final layer, with two parts in place of six.
Source: PixArt-alpha (arXiv:2310.00426), section 2.3, which does not say what (W, b) is.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_data.errors import ConfigError
from pixart_model.layers import sinusoid
from pixart_model.sizes import Model

TIMESTEP = 500
TRUNK = ("depth", "width", "heads", "mlp_ratio", "patch", "qk_norm")
"""Keys of `model` that two models must share for the one to start from the other."""
_MLP = "adaLN_modulation.1"

SharedMlp = Literal["mean", "first"]
WithoutClass = Literal["zero", "null", "mean"]
Weights = dict[str, Tensor]


def reparameterise(
    weights: Weights, dit: Model, target: Model, shared_mlp: SharedMlp, without_class: WithoutClass, base: Weights
) -> Weights:
    """Return the weights of a PixArt that begins as a DiT without class.

    What stands for the class, y, becomes a part of the timestep's bias: s(t) is then DiT's at every t. So with
    `modulation = "blocks"`, where each block keeps an MLP of its own, the modulation is DiT's at every t too. With the
    one MLP of `"single"` its error at t is (W - W_i) (s(t) - s(500)), in whatever b: the mean of the W_i minimises the
    sum of its squares over the blocks, and does so for every s(t), hence for all t at once. The first block's W_i is
    exact there, and worse elsewhere.

    Args:
        weights: DiT's, under its names.
        dit: What they are of.
        target: Differs from it in conditioning and positions only.
        shared_mlp: W and b: the mean of the blocks', or the first block's.
        without_class: y: zero, DiT's vector of no class, or the mean of its classes' vectors.
        base: A freshly drawn PixArt of `target`. The result has its tensors where DiT has none: the embedding of
            captions, and queries, keys and values of cross-attention. Its outputs are zero, and those of the sizes'
            embeddings; both learn from the first step on.

    Returns:
        All weights of `target`.

    Raises:
        ConfigError: If a size differs, naming its key.
    """
    require_same(dit, target, (*TRUNK, "in_channels"), "the DiT to start from")
    y = _class_vector(weights, dit.num_classes, without_class)  # (D,)
    made = {name: weights[name] for name in base if name in weights}
    bias = made["t_embedder.mlp.2.bias"]
    made["t_embedder.mlp.2.bias"] = (bias.double() + y).to(bias)
    e = _embed(made, TIMESTEP)  # (D,), with y in it
    s = F.silu(e)  # (D,)
    blocks = [f"blocks.{i}" for i in range(target.depth)]
    made |= _modulation(weights, blocks, s, base, shared_mlp)
    table = base["final_layer.scale_shift_table"]
    made["final_layer.scale_shift_table"] = (_apply(weights, f"final_layer.{_MLP}", s).view_as(table) - e).to(table)
    made |= _zeros(base, (f"{block}.cross_attn.proj" for block in blocks))
    if target.micro_conditioning:
        made |= silent_sizes(base)
    return base | made


def silent_sizes(base: Weights) -> Weights:
    """Return the last layers of the embeddings of size and ratio as zeros: the model is the same as without them."""
    return _zeros(base, ("csize_embedder.mlp.2", "ar_embedder.mlp.2"))


def require_same(found: Model, wanted: Model, keys: Iterable[str], where: str, advice: str = "") -> None:
    """Check that a job's model agrees with weights.

    Args:
        found: Of the weights.
        wanted: Of the job.
        keys: Of the `model` section.
        where: Names the weights, for messages.
        advice: What to do besides setting the key, as the end of a sentence.

    Raises:
        ConfigError: Naming the first key that differs.
    """
    for key in keys:
        has, asked = getattr(found, key), getattr(wanted, key)
        if has != asked:
            raise ConfigError(
                f"model.{key}: expected {_toml(has)}, as {where} has it, found {_toml(asked)}; set model.{key} = "
                f"{_toml(has)}{advice}"
            )


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _class_vector(weights: Weights, num_classes: int, without_class: WithoutClass) -> Tensor:
    table = weights["y_embedder.embedding_table.weight"].double()  # (num_classes + 1, D)
    if without_class == "null":
        return table[num_classes]
    return table[:num_classes].mean(0) if without_class == "mean" else torch.zeros_like(table[0])


def _embed(weights: Weights, timestep: int) -> Tensor:
    """The timestep's embedding, float64 (D,), from the sinusoid that the model sees, which is fp32."""
    frequencies = sinusoid(torch.tensor([timestep], device=weights["t_embedder.mlp.0.weight"].device))[0]  # (256,)
    return _apply(weights, "t_embedder.mlp.2", F.silu(_apply(weights, "t_embedder.mlp.0", frequencies.double())))


def _apply(weights: Weights, layer: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{layer}.weight"].double(), weights[f"{layer}.bias"].double())


def _modulation(weights: Weights, blocks: list[str], s: Tensor, base: Weights, shared_mlp: SharedMlp) -> Weights:
    """The blocks' MLPs stay as they are and the shared one is zero, or the shared one and the tables are made."""
    if f"{blocks[0]}.{_MLP}.weight" in base:
        return _zeros(base, ("t_block.1",))
    from_blocks = blocks[:1] if shared_mlp == "first" else blocks
    made = {}
    for kind in ("weight", "bias"):
        total = torch.zeros_like(weights[f"{blocks[0]}.{_MLP}.{kind}"], dtype=torch.float64)
        for block in from_blocks:
            total += weights[f"{block}.{_MLP}.{kind}"]
        made[f"t_block.1.{kind}"] = (total / len(from_blocks)).to(base[f"t_block.1.{kind}"].dtype)
    of_all = _apply(made, "t_block.1", s)  # (6 D,), of the rounded weights, so that the tables take their rounding back
    for block in blocks:
        table = base[f"{block}.scale_shift_table"]
        made[f"{block}.scale_shift_table"] = (_apply(weights, f"{block}.{_MLP}", s) - of_all).view_as(table).to(table)
    return made


def _zeros(base: Weights, layers: Iterable[str]) -> Weights:
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return {name: torch.zeros_like(base[name]) for name in names}
