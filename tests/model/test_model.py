import math

import pytest
import torch

from pixart_model.model import PixArt
from pixart_model.sizes import Model, pixart_tiny, pixart_xl_2


def tiny(**numbers):
    torch.manual_seed(0)
    return PixArt(pixart_tiny().model_copy(update={"caption_width": 16, "base_size": 8, **numbers}))


def inputs(height=8, width=8, batch=2):
    torch.manual_seed(1)
    sizes = torch.tensor([[64.0, 64.0]] * batch)
    return {
        "x": torch.randn(batch, 4, height, width), "t": torch.arange(batch) * 400.0, "y": torch.randn(batch, 5, 16),
        "mask": torch.ones(batch, 5, dtype=torch.bool), "size_px": sizes, "ratio": torch.ones(batch),
    }  # fmt: skip


def wake(model):
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
        for block in model.blocks:
            block.cross_attn.proj.weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize(("micro", "count"), [(False, 610_856_096), (True, 611_349_152)])
def test_the_papers_model_has_the_references_number_of_parameters(micro, count):
    with torch.device("meta"):
        model = PixArt(pixart_xl_2().model_copy(update={"micro_conditioning": micro}))
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 21_255_552
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_parameters_have_the_references_names_and_shapes():
    config = Model(size="tiny", depth=1, width=24, heads=2, caption_width=16, micro_conditioning=True)
    found = {
        name: tuple(p.shape) for name, p in PixArt(config).named_parameters() if name.endswith(("weight", "table"))
    }
    assert found == {
        "x_embedder.proj.weight": (24, 4, 2, 2),
        "t_embedder.mlp.0.weight": (24, 256),
        "t_embedder.mlp.2.weight": (24, 24),
        "t_block.1.weight": (144, 24),
        "y_embedder.y_proj.fc1.weight": (24, 16),
        "y_embedder.y_proj.fc2.weight": (24, 24),
        "csize_embedder.mlp.0.weight": (8, 256),
        "csize_embedder.mlp.2.weight": (8, 8),
        "ar_embedder.mlp.0.weight": (8, 256),
        "ar_embedder.mlp.2.weight": (8, 8),
        "blocks.0.scale_shift_table": (6, 24),
        "blocks.0.attn.qkv.weight": (72, 24),
        "blocks.0.attn.proj.weight": (24, 24),
        "blocks.0.cross_attn.q_linear.weight": (24, 24),
        "blocks.0.cross_attn.kv_linear.weight": (48, 24),
        "blocks.0.cross_attn.proj.weight": (24, 24),
        "blocks.0.mlp.fc1.weight": (96, 24),
        "blocks.0.mlp.fc2.weight": (24, 96),
        "final_layer.linear.weight": (32, 24),
        "final_layer.scale_shift_table": (2, 24),
    }


def test_the_initialisation_is_the_references():
    torch.manual_seed(0)
    model = PixArt(Model(size="tiny", depth=1, width=192, heads=4, caption_width=64, micro_conditioning=True))
    std = {name: float(p.detach().std()) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name in ("blocks.0.cross_attn.proj.weight", "final_layer.linear.weight"):
            assert not parameter.any(), name
        elif name.split(".")[0] in ("t_embedder", "t_block", "y_embedder", "csize_embedder", "ar_embedder"):
            assert math.isclose(std[name], 0.02, rel_tol=0.1), name
    for name, expected in {
        "blocks.0.scale_shift_table": 192**-0.5,
        "final_layer.scale_shift_table": 192**-0.5,
        "blocks.0.attn.qkv.weight": math.sqrt(2 / (192 + 576)),
        "x_embedder.proj.weight": math.sqrt(2 / (192 + 16)),
    }.items():
        assert math.isclose(std[name], expected, rel_tol=0.1), name


def test_a_fresh_model_predicts_zero_and_the_same_seed_gives_the_same_model():
    assert not tiny()(**inputs()).any()
    a, b = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("canvas", [(8, 8), (4, 16), (12, 6)])
@pytest.mark.parametrize("micro", [False, True])
def test_a_batch_is_its_samples(canvas, micro):
    model, batch = wake(tiny(micro_conditioning=micro)), inputs(*canvas, batch=3)
    batch["mask"][1, 2:] = False
    together = model(**batch)
    assert together.shape == (3, 8, *canvas)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        true = int(one["mask"].sum())
        alone = model(**{**one, "y": one["y"][:, :true], "mask": None})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_micro_conditioning_is_heeded_and_demanded():
    model, batch = wake(tiny(micro_conditioning=True)), inputs()
    plain = model(**batch)
    assert not torch.allclose(plain, model(**{**batch, "ratio": batch["ratio"] * 2}))
    assert not torch.allclose(plain, model(**{**batch, "size_px": batch["size_px"] * torch.tensor([2.0, 1.0])}))
    with pytest.raises(ValueError, match="needs size_px and ratio"):
        model(**{**batch, "ratio": None})


def test_timesteps_stay_apart_in_bf16():
    model = wake(tiny()).to(torch.bfloat16)
    embedded = model.t_embedder(torch.arange(1000))
    assert embedded.dtype == torch.bfloat16
    batch = inputs(batch=1)
    outs = [model(**{**batch, "t": torch.tensor([t])}) for t in (998.0, 999.0)]
    assert not torch.equal(*outs)


def test_positions_are_made_once_for_each_grid_and_type():
    model = tiny()
    first = model.positions(4, 8, model.device)
    assert model.positions(4, 8, model.device) is first
    assert model.positions(8, 4, model.device) is not first
    assert model.to(torch.bfloat16).positions(4, 8, model.device).dtype == torch.bfloat16
    assert not any("position" in name for name in model.state_dict())


def test_checkpointed_gradients_are_the_gradients():
    gradients, runs = [], []
    for flag in (False, True):
        model, calls = wake(tiny()), []
        model.grad_checkpointing = flag
        model.blocks[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(**inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        runs.append(len(calls))
    assert runs == [1, 2], "the second time is the recomputation"
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
