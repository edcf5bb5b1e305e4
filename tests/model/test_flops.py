"""Our count of the matrix products against torch's own, which watches every operation of a real step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_model.flops import forward_flops, image_tokens, peak_tflops, train_flops
from pixart_model.networks import build
from pixart_model.packing import pack
from pixart_model.sizes import Model, pixart_xl_2

SMALL = {"size": "tiny", "depth": 2, "width": 96, "heads": 4, "caption_width": 40, "base_size": 8}
HEIGHT, WIDTH = 16, 8  # latent cells
LENGTHS = (3, 20, 1)


def counted(config, grad_checkpointing=False):
    """What torch counts of a forward and a backward pass, and of the forward pass alone."""
    torch.manual_seed(0)
    model = build(config, grad_checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # no zeros, behind which nothing would be computed
    count = len(LENGTHS)
    x, t = torch.randn(count, config.in_channels, HEIGHT, WIDTH), torch.tensor([1.0, 500.0, 999.0])
    if config.condition == "class":
        inputs = (x, t, torch.tensor([0, 5, config.num_classes]))
    else:
        text = pack([torch.randn(n, config.caption_width) for n in LENGTHS])
        inputs = (x, t, text, None, torch.full((count, 2), 512.0), torch.ones(count))
    # The fused kernel is not in torch's count on a CPU; as plain products, attention is.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as whole:
            model(*inputs).sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(*inputs)
    return whole.get_total_flops() - surplus_of_groups(config), forward.get_total_flops()


def surplus_of_groups(config):
    """Torch counts the weights' gradient of a depthwise convolution as if each channel were made of all of them."""
    if config.kv_compression != "conv":
        return 0
    tokens = len(LENGTHS) * HEIGHT * WIDTH // config.patch**2
    forward = 2 * 2 * tokens * config.width  # keys and values
    return len(config.compressing_blocks) * forward * (config.width - 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_conditioning": True},
        {"modulation": "blocks"},
        {"qk_norm": True, "mlp_ratio": 2.5, "heads": 8},
        {"kv_compression": "conv", "kv_compression_from": 1},
        {"kv_compression": "average"},
        {"condition": "class", "num_classes": 7},
        {"in_channels": 16, "patch": 4, "depth": 1},
    ],
    ids=str,
)
def test_a_step_costs_what_torch_counts(options):
    config = Model.model_validate({**SMALL, **options})
    image = (HEIGHT // config.patch) * (WIDTH // config.patch)
    whole, forward = counted(config)
    ours = forward_flops(config, len(LENGTHS), image, sum(LENGTHS))
    assert ours.blocks + ours.rest == pytest.approx(forward, rel=0.01)
    assert train_flops(config, len(LENGTHS), image, sum(LENGTHS)) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("factor", [2, 4])
def test_shorter_keys_and_values_save_what_torch_counts(factor):
    """Alone, for attention is a small part of a small model."""
    full = Model.model_validate(SMALL)
    short = Model.model_validate({**SMALL, "kv_compression": "average", "kv_compression_factor": factor})
    image = (HEIGHT // full.patch) * (WIDTH // full.patch)
    ours = [forward_flops(config, len(LENGTHS), image, sum(LENGTHS)).blocks for config in (full, short)]
    theirs = [counted(config)[1] for config in (full, short)]
    assert ours[0] - ours[1] == pytest.approx(theirs[0] - theirs[1], rel=0.01)


def test_gradient_checkpointing_computes_the_blocks_twice():
    config = Model.model_validate(SMALL)
    args = (config, len(LENGTHS), HEIGHT * WIDTH // config.patch**2, sum(LENGTHS))
    whole, _ = counted(config, grad_checkpointing=True)
    assert train_flops(*args, grad_checkpointing=True) == pytest.approx(whole, rel=0.01)
    assert train_flops(*args, grad_checkpointing=True) - train_flops(*args) == forward_flops(*args).blocks


def test_published_sizes():
    """DiT-XL/2 has 118.64 billion multiply-adds at 256 px and 524.60 at 512 (arXiv:2212.09748, tables 4 and 9)."""
    dit = Model.model_validate({"size": "xl-2", "condition": "class"})
    for side_px, gmacs in ((256, 118.64), (512, 524.60)):
        forward = forward_flops(dit, 1, image_tokens(dit, side_px, side_px), 0)
        assert (forward.blocks + forward.rest) / 2e9 == pytest.approx(gmacs, rel=0.001)
    assert image_tokens(pixart_xl_2(), 768, 1344) == 48 * 84


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_gpu(name, tflops):
    assert peak_tflops(name) == tflops
