import random

import pytest
import torch

from pixart_data.errors import ConfigError, DataError
from pixart_model.conversion import native, to_diffusers
from pixart_model.model import PixArt
from pixart_model.packing import pack
from pixart_model.sizes import Model

diffusers = pytest.importorskip("diffusers")

CANVASES = [(32, 32), (24, 40), (40, 24), (8, 64)]
torch.set_num_threads(1)


def make(micro, base_size=32, scale=1.0):
    config = Model(
        size="tiny", depth=2, width=96, heads=4, caption_width=32, base_size=base_size, interpolation_scale=scale,
        micro_conditioning=micro,
    )  # fmt: skip
    return config, *pair(config)


def pair(config):
    torch.manual_seed(1)
    ours = PixArt(config)
    with torch.no_grad():  # nothing may hide behind the zeros of the initialisation
        for name, parameter in ours.named_parameters():
            if "proj" in name or name.endswith("bias") or "final" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    weights, arguments = to_diffusers(ours.state_dict(), config)
    theirs = diffusers.PixArtTransformer2DModel(**arguments)
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


def inputs(height, width):
    torch.manual_seed(2)
    mask = torch.arange(12) < torch.tensor([[5], [12], [1]])
    return {
        "x": torch.randn(3, 4, height, width),
        "t": torch.tensor([0.0, 499.5, 999.0]),
        "y": torch.randn(3, 12, 32),
        "mask": mask,
        "size_px": torch.tensor([[300.0, 411.0], [1024.0, 512.0], [64.0, 64.0]]),
        "ratio": torch.tensor([0.72, 2.0, 1.0]),
    }


def run_theirs(model, x, t, y, mask, size_px, ratio):
    conditions = {"resolution": size_px, "aspect_ratio": ratio[:, None]}
    if not model.use_additional_conditions:
        conditions = {"resolution": None, "aspect_ratio": None}
    return model(
        x, encoder_hidden_states=y, timestep=t, added_cond_kwargs=conditions, encoder_attention_mask=mask
    ).sample


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("micro", [False, True], ids=["single", "micro"])
@pytest.mark.parametrize(("base_size", "scale"), [(32, 1.0), (64, 2.0)])
def test_outputs_agree(micro, canvas, base_size, scale):
    _, ours, theirs = make(micro, base_size, scale)
    batch = inputs(*canvas)
    with torch.no_grad():
        a, b = ours(**batch), run_theirs(theirs, **batch)
    assert a.abs().mean() > 0.1
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def draw(seed):
    """A configuration, a canvas that it has not been measured on, and captions of different lengths."""
    numbers = random.Random(seed)
    heads, patch, micro = numbers.choice([1, 2, 3]), numbers.choice([1, 2]), bool(seed % 2)
    config = Model(
        size="tiny", depth=numbers.choice([1, 2, 3]), heads=heads, width=heads * 12 * numbers.randint(1, 3),
        patch=patch, in_channels=numbers.choice([3, 4, 16]), caption_width=numbers.randint(5, 40),
        base_size=patch * numbers.randint(2, 16), interpolation_scale=numbers.choice([0.5, 1.0, 2.0, 4.0]),
        micro_conditioning=micro,
    )  # fmt: skip
    canvas = [patch * numbers.randint(1, 12) for _ in range(2)]
    batch = numbers.randint(1, 4)
    torch.manual_seed(seed)
    return config, {
        "x": torch.randn(batch, config.in_channels, *canvas),
        "t": torch.rand(batch) * 999,
        "y": pack([torch.randn(numbers.randint(1, 20), config.caption_width) for _ in range(batch)]),
        "mask": None,
        "size_px": torch.rand(batch, 2) * 2000,
        "ratio": torch.rand(batch) * 4,
    }


@pytest.mark.parametrize("seed", range(16))
def test_random_models_agree_on_captions_of_any_length_in_outputs_and_gradients(seed):
    config, batch = draw(seed)
    ours, theirs = pair(config)
    ragged = ours(**batch)
    padded, mask = batch["y"].padded()
    batch |= {"y": padded, "mask": mask}
    expected = run_theirs(theirs, **batch)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ragged, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(**batch), expected, atol=1e-5, rtol=0)
    for out in (ragged, expected):
        (out * torch.arange(out.numel()).sin().view_as(out)).mean().backward()
    gradients = native("gradients", {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("micro", [False, True], ids=["single", "micro"])
def test_gradients_agree(micro):
    config, ours, theirs = make(micro)
    batch = inputs(24, 40)
    target = torch.randn(3, 8, 24, 40)
    (ours(**batch) * target).mean().backward()
    (run_theirs(theirs, **batch) * target).mean().backward()
    gradients = native("gradients", {name: p.grad for name, p in theirs.named_parameters()})
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        worst = max(worst, float((parameter.grad - gradients[name]).abs().max()))
    assert worst < 1e-6


@pytest.mark.parametrize("micro", [False, True], ids=["single", "micro"])
def test_the_round_trip_is_exact(micro, tmp_path):
    config, ours, theirs = make(micro)
    weights, _ = to_diffusers(ours.state_dict(), config)
    assert weights.keys() == theirs.state_dict().keys()
    back = native("theirs", theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    theirs.save_pretrained(tmp_path)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_missing_and_surplus_weights_are_named():
    config, ours, _ = make(False)
    weights = ours.state_dict()
    with pytest.raises(DataError, match="blocks.1.attn.qkv.bias is missing"):
        to_diffusers({k: v for k, v in weights.items() if k != "blocks.1.attn.qkv.bias"}, config)
    with pytest.raises(DataError, match="pos_embed is one too many"):
        to_diffusers({**weights, "pos_embed": torch.zeros(1)}, config)
    with pytest.raises(DataError, match="is missing"):
        native("ours", weights)
    with pytest.raises(ConfigError, match="mlp_ratio"):
        to_diffusers(weights, config.model_copy(update={"mlp_ratio": 2.0}))
