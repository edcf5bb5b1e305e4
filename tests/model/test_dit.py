import math

import pytest
import torch

from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.networks import build
from pixart_model.sizes import Model, pixart_tiny, pixart_xl_2


def tiny(**numbers):
    torch.manual_seed(0)
    config = pixart_tiny().model_copy(update={"condition": "class", "num_classes": 10, "base_size": 8, **numbers})
    return build(config)


def shake(model):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_section_says_which_transformer_is_built():
    assert type(tiny()) is DiT
    assert type(build(pixart_tiny())) is PixArt
    assert build(pixart_tiny(), grad_checkpointing=True).grad_checkpointing


def test_dit_xl_2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = build(pixart_xl_2().model_copy(update={"condition": "class"}))
    assert sum(p.numel() for p in model.parameters()) == 674_834_720
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_parameters_have_the_published_names_and_shapes():
    config = Model(size="tiny", depth=1, width=24, heads=2, condition="class", num_classes=7)
    assert {name: tuple(p.shape) for name, p in DiT(config).named_parameters() if not name.endswith("bias")} == {
        "x_embedder.proj.weight": (24, 4, 2, 2),
        "t_embedder.mlp.0.weight": (24, 256),
        "t_embedder.mlp.2.weight": (24, 24),
        "y_embedder.embedding_table.weight": (8, 24),
        "blocks.0.attn.qkv.weight": (72, 24),
        "blocks.0.attn.proj.weight": (24, 24),
        "blocks.0.mlp.fc1.weight": (96, 24),
        "blocks.0.mlp.fc2.weight": (24, 96),
        "blocks.0.adaLN_modulation.1.weight": (144, 24),
        "final_layer.linear.weight": (32, 24),
        "final_layer.adaLN_modulation.1.weight": (48, 24),
    }


def test_the_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = DiT(Model(size="tiny", depth=1, width=192, heads=4, condition="class", num_classes=100))
    for name, parameter in model.named_parameters():
        std = float(parameter.detach().std())
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not parameter.any(), name
        elif name.split(".")[0] in ("t_embedder", "y_embedder"):
            assert math.isclose(std, 0.02, rel_tol=0.1), name
        else:
            fan_out, fan_in = parameter.flatten(1).shape
            assert math.isclose(std, math.sqrt(2 / (fan_in + fan_out)), rel_tol=0.1), name


@pytest.mark.parametrize("canvas", [(8, 8), (4, 16), (12, 6)])
def test_a_batch_is_its_samples_and_their_classes(canvas):
    model = tiny()
    x, t, y = torch.randn(3, 4, *canvas), torch.tensor([0.0, 500.5, 999.0]), torch.tensor([3, 0, 10])
    assert not model(x, t, y).any(), "a fresh model returns zeros"
    together = shake(model)(x, t, y, None, torch.ones(3, 2), torch.ones(3))
    assert together.shape == (3, 8, *canvas)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], t[i : i + 1], y[i : i + 1]))
    other = model(x, t, torch.tensor([3, 1, 10]))
    assert torch.equal(other[::2], together[::2])
    assert not torch.allclose(other[1], together[1])


def test_checkpointed_gradients_are_the_gradients():
    gradients = []
    for flag in (False, True):
        model = shake(tiny(qk_norm=True))
        model.grad_checkpointing = flag
        torch.manual_seed(1)
        out = model(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10]))
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
