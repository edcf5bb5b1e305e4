"""Our DiT against diffusers', on random tiny configurations.

Two of diffusers' numbers are not the published model's, whose weights both load: its sinusoid has frequencies
`10000 ** (-i / 127)` where the published code has `i / 128`, and its second LayerNorm adds 1e-5 where that adds 1e-6.
Both are set to the published ones here.
"""

import random

import pytest
import torch

from pixart_model.dit import DiT
from pixart_model.sizes import Model

diffusers = pytest.importorskip("diffusers")

torch.set_num_threads(1)
NAMES = {
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}
IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}


def under_diffusers_names(weights, depth):
    """The weights as diffusers has them: one copy of the embedders in each block."""
    names = dict(NAMES)
    for i in range(depth):
        inside = {f"blocks.{i}.{native}": parts for native, parts in IN_BLOCK.items()}
        names |= {native: tuple(f"transformer_blocks.{i}.{part}" for part in parts) for native, parts in inside.items()}
    for native, target in EMBEDDERS.items():
        names[native] = tuple(f"transformer_blocks.{i}.{target}" for i in range(depth))
    converted = {}
    for name, tensor in weights.items():
        native, kind = name.rsplit(".", 1)
        parts = names[native]
        values = [tensor] * depth if native in EMBEDDERS else tensor.chunk(len(parts))
        converted |= {f"{part}.{kind}": value for part, value in zip(parts, values, strict=True)}
    return converted


def draw(seed):
    numbers = random.Random(seed)
    heads, patch = numbers.choice([1, 2, 4]), numbers.choice([1, 2])
    return Model(
        size="tiny", depth=numbers.choice([1, 2, 3]), heads=heads, width=heads * 4 * numbers.randint(2, 6), patch=patch,
        in_channels=numbers.choice([3, 4, 16]), base_size=patch * numbers.randint(2, 6), condition="class",
        num_classes=numbers.randint(2, 20),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_outputs_and_gradients_agree(seed):
    config = draw(seed)
    torch.manual_seed(seed)
    ours = DiT(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, norm_eps=1e-6,
        in_channels=config.in_channels, out_channels=2 * config.in_channels, num_layers=config.depth,
        sample_size=config.base_size, patch_size=config.patch, num_embeds_ada_norm=config.num_classes,
    ).eval()  # fmt: skip
    theirs.load_state_dict(under_diffusers_names(ours.state_dict(), config.depth), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x = torch.randn(3, config.in_channels, config.base_size, config.base_size)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, config.num_classes, config.num_classes - 1])
    a, b = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert a.abs().mean() > 0.1
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for out in (a, b):
        (out * torch.arange(out.numel()).sin().view_as(out)).mean().backward()
    native = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    shared = {f"{target}.{kind}" for target in EMBEDDERS.values() for kind in ("weight", "bias")}
    for name, gradient in under_diffusers_names(native, config.depth).items():
        inner = name.split(".", 2)[-1]
        if inner not in shared:
            torch.testing.assert_close(gradient, found[name], atol=1e-6, rtol=0, msg=name)
        elif name.startswith("transformer_blocks.0."):
            copies = [found[f"transformer_blocks.{i}.{inner}"] for i in range(config.depth)]
            torch.testing.assert_close(gradient, torch.stack(copies).sum(0), atol=1e-6, rtol=0, msg=name)
