"""The arithmetic of training: floating-point operations of all matrix products, and what GPUs can do of them.

A multiply-add is two operations. The backward pass costs what the forward pass does for the gradients of the weights
and as much again for those of the inputs, which the layers that read the data do not need. Norms, softmax and the like
are left out, as everywhere. What gradient checkpointing computes a second time counts for the hardware, and not for
the utilisation of it (MFU; PaLM, arXiv:2204.02311, appendix B).

Legend: B samples, N image tokens of one of them, M text tokens of all; D width.
"""

import re
from dataclasses import dataclass

from pixart_model.sizes import Model

_FREQUENCIES = 256  # of a timestep's embedding
_PARTS, _FINAL_PARTS = 6, 2  # shifts, scales and gates of a block; shift and scale of the last layer

# Dense bf16 TFLOP/s with fp32 sums, from NVIDIA's and AMD's data sheets; of several names that fit, the longest counts.
_PEAK_TFLOPS = {
    "A10": 125.0, "A10G": 70.0, "A30": 165.0, "A40": 149.7, "A100": 312.0, "A800": 312.0, "L4": 121.0, "L40": 181.0,
    "L40S": 362.0, "H100": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H800": 989.4, "H800 PCIe": 756.0,
    "H200": 989.4, "H200 NVL": 835.0, "H20": 148.0, "GH200": 989.4, "B100": 1750.0, "B200": 2250.0, "GB200": 2500.0,
    "RTX A6000": 154.8, "RTX 3090": 71.0, "RTX 3090 Ti": 80.0, "RTX 4090": 165.2, "MI250X": 191.5, "MI300X": 1307.4,
}  # fmt: skip
# What may follow such a name: the size and kind of the memory, the socket. Other words (Laptop GPU, D, Ti, MIG 1g.10gb)
# make it another device.
_SAME_DEVICE = re.compile(r"( (\d+GB?|HBM\d\w?|SXM\d?|PCIe))* ", re.IGNORECASE)
A100_TFLOPS = _PEAK_TFLOPS["A100"]


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass.

    Attributes:
        blocks: In the blocks, which gradient checkpointing computes twice.
        rest: In the embedders and the last layer.
        leaves: Of `rest`, in layers whose input is data, so that no gradient of it is needed.
    """

    blocks: float
    rest: float
    leaves: float


def train_flops(
    config: Model, batch: int, image_tokens: int, text_tokens: int, grad_checkpointing: bool = False
) -> float:
    """Return the operations of a forward and a backward pass.

    Args:
        config: The model.
        batch: B.
        image_tokens: N.
        text_tokens: M; not read of DiT.
        grad_checkpointing: Count the blocks' forward pass twice, as the hardware then does.
    """
    once = forward_flops(config, batch, image_tokens, text_tokens)
    return 3 * (once.blocks + once.rest) - once.leaves + (once.blocks if grad_checkpointing else 0.0)


def forward_flops(config: Model, batch: int, image_tokens: int, text_tokens: int) -> Forward:
    """Return the operations of a forward pass; the arguments are those of `train_flops`."""
    width, tokens = config.width, batch * image_tokens
    has_captions = config.condition == "caption"
    patch_in, patch_out = (config.patch**2 * channels for channels in (config.in_channels, 2 * config.in_channels))
    leaves = _linear(tokens, patch_in, width) + _linear(batch, _FREQUENCIES, width)
    rest = _linear(batch, width, width) + _linear(tokens, width, patch_out)
    if has_captions:
        rest += _linear(batch, width, _PARTS * width) + _linear(text_tokens, width, width)
        leaves += _linear(text_tokens, config.caption_width, width)
    else:
        rest += _linear(batch, width, _FINAL_PARTS * width)
    if config.micro_conditioning:
        numbers, part = 3 * batch, width // 3  # height, width, ratio
        rest += _linear(numbers, part, part)
        leaves += _linear(numbers, _FREQUENCIES, part)
    compressed = len(config.compressing_blocks)
    blocks = config.depth * _block(config, batch, image_tokens, text_tokens if has_captions else 0, compresses=False)
    if compressed:
        full, short = (_block(config, batch, image_tokens, text_tokens, compresses) for compresses in (False, True))
        blocks += compressed * (short - full)
    return Forward(blocks, rest + leaves, leaves)


def image_tokens(config: Model, height_px: int, width_px: int, cell_px: int = 8) -> int:
    """Return N of a canvas."""
    side_px = config.patch * cell_px
    return (height_px // side_px) * (width_px // side_px)


def peak_tflops(name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU by the name that CUDA gives it.

    None of one that is not known, such as a part of a GPU (MIG) or a laptop's: `cost.peak_tflops` is for those.
    """
    words = f" {name.replace('-', ' ')} "
    fits = [known for known in _PEAK_TFLOPS if f" {known} " in words]
    if not fits:
        return None
    longest = max(fits, key=len)
    return _PEAK_TFLOPS[longest] if _SAME_DEVICE.fullmatch(words.partition(f" {longest}")[2]) else None


def _block(config: Model, batch: int, image_tokens: int, text_tokens: int, compresses: bool) -> float:
    width, tokens = config.width, batch * image_tokens
    factor = config.kv_compression_factor**2 if compresses else 1
    flops = _linear(tokens, width, 3 * width) + _linear(tokens, width, width)  # q, k, v and the way out
    flops += 2 * _linear(tokens, width, image_tokens // factor)  # scores, and the sum they weigh
    flops += 2 * _linear(tokens, width, int(width * config.mlp_ratio))
    if compresses and config.kv_compression == "conv":
        flops += 2 * _linear(tokens // factor, factor, width)  # of keys and values
    if config.condition == "caption":
        flops += 2 * _linear(tokens, width, width) + _linear(text_tokens, width, 2 * width)
        flops += 2 * _linear(text_tokens, width, image_tokens)  # each sample's image tokens look at its own text
    if config.condition == "class" or config.modulation == "blocks":
        flops += _linear(batch, width, _PARTS * width)
    return flops


def _linear(rows: int, channels_in: int, channels_out: int) -> float:
    """Operations of a matrix product (rows, channels_in) x (channels_in, channels_out)."""
    return 2.0 * rows * channels_in * channels_out
