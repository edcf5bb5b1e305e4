"""Weight files as PixArt and DiT published them: their keys and shapes, small, with random numbers."""

import numpy as np
import torch


def linear(out_width, in_width, *name):
    return {f"{'.'.join(name)}.weight": (out_width, in_width), f"{'.'.join(name)}.bias": (out_width,)}


def pixart_shapes(depth, width, caption_width, micro):
    """The reference's state dict without `pos_embed` and `y_embedding`, written down from its published files."""
    shapes = {"x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,)}
    shapes |= linear(width, 256, "t_embedder.mlp.0") | linear(width, width, "t_embedder.mlp.2")
    shapes |= linear(6 * width, width, "t_block.1")
    shapes |= linear(width, caption_width, "y_embedder.y_proj.fc1") | linear(width, width, "y_embedder.y_proj.fc2")
    for name in ("csize_embedder", "ar_embedder") if micro else ():
        third = width // 3
        shapes |= linear(third, 256, f"{name}.mlp.0") | linear(third, third, f"{name}.mlp.2")
    for i in range(depth):
        block = f"blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (6, width)
        shapes |= linear(3 * width, width, f"{block}.attn.qkv") | linear(width, width, f"{block}.attn.proj")
        shapes |= linear(width, width, f"{block}.cross_attn.q_linear")
        shapes |= linear(2 * width, width, f"{block}.cross_attn.kv_linear")
        shapes |= linear(width, width, f"{block}.cross_attn.proj")
        shapes |= linear(4 * width, width, f"{block}.mlp.fc1") | linear(width, 4 * width, f"{block}.mlp.fc2")
    return shapes | linear(32, width, "final_layer.linear") | {"final_layer.scale_shift_table": (2, width)}


def dit_shapes(depth, width, num_classes):
    """DiT's state dict without `pos_embed`; the table has one row more than there are classes."""
    shapes = {"x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,)}
    shapes |= linear(width, 256, "t_embedder.mlp.0") | linear(width, width, "t_embedder.mlp.2")
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, width)
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= linear(3 * width, width, f"{block}.attn.qkv") | linear(width, width, f"{block}.attn.proj")
        shapes |= linear(4 * width, width, f"{block}.mlp.fc1") | linear(width, 4 * width, f"{block}.mlp.fc2")
        shapes |= linear(6 * width, width, f"{block}.adaLN_modulation.1")
    shapes |= linear(2 * width, width, "final_layer.adaLN_modulation.1")
    return shapes | linear(32, width, "final_layer.linear")


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def positions(side, width, lewei_scale=1.0):
    """`pos_embed` as the reference computes it: `get_2d_sincos_pos_embed`, in numpy."""
    places = np.arange(side, dtype=np.float32) / (side / side) / lewei_scale
    columns, rows = np.meshgrid(places, places)

    def along(axis):
        omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        angles = np.einsum("m,d->md", axis.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return torch.from_numpy(np.concatenate([along(columns), along(rows)], axis=1)).float()[None]


def pixart_pth(side=16, lewei_scale=1.0, micro=False, width=96, depth=2, caption_width=32, seed=0):
    """The `state_dict` of a published file; 16, 32 and 64 tokens a side are 256, 512 and 1024 px."""
    table = drawn({"y_embedder.y_embedding": (120, caption_width)}, seed + 1)
    weights = drawn(pixart_shapes(depth, width, caption_width, micro), seed)
    return {"pos_embed": positions(side, width, lewei_scale), **weights, **table}


def dit_pt(width=96, depth=2, num_classes=10, seed=0):
    return {"pos_embed": positions(16, width), **drawn(dit_shapes(depth, width, num_classes), seed)}
