import copy
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from pixart_model import dit as dit_module
from pixart_model import layers
from pixart_model import model as model_module
from pixart_model.attention import Spread
from pixart_model.model import PixArt
from pixart_model.networks import build
from pixart_model.packing import pack
from pixart_model.sizes import Model, pixart_tiny, pixart_xl_2


def tiny(grad_checkpointing=False, **numbers):
    torch.manual_seed(0)
    return PixArt(pixart_tiny().model_copy(update={"caption_width": 16, "base_size": 8, **numbers}), grad_checkpointing)


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


def captions(*lengths):
    torch.manual_seed(3)
    return pack([torch.randn(length, 16) for length in lengths])


def shake(model):
    """Nothing may hide behind the zeros of the initialisation."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    ("numbers", "count"),
    [({}, 610_856_096), ({"micro_conditioning": True}, 611_349_152), ({"modulation": "blocks"}, 833_809_568)],
)
def test_the_papers_models_have_the_references_number_of_parameters(numbers, count):
    with torch.device("meta"):
        model = build(pixart_xl_2().model_copy(update=numbers))
    assert sum(p.numel() for p in model.parameters()) == count
    in_block = 21_255_552 if count < 700_000_000 else 21_255_552 - 6 * 1152 + 1152 * 6912 + 6912
    assert sum(p.numel() for p in model.blocks[0].parameters()) == in_block
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


OPTIONS = [
    {}, {"micro_conditioning": True}, {"modulation": "blocks"}, {"qk_norm": True}, {"kv_compression": "conv"},
    {"kv_compression": "average", "kv_compression_from": 0}, {"kv_compression": "uniform"},
]  # fmt: skip


@pytest.mark.parametrize("numbers", OPTIONS, ids=str)
def test_captions_without_padding_are_the_padded_ones(numbers):
    model, y = shake(tiny(**numbers)), captions(5, 1, 9)
    batch = {**inputs(10, 14, batch=3), "y": y, "mask": None}
    ragged = model(**batch)
    padded, mask = y.padded()
    padded = padded.masked_fill(~mask[..., None], 1e3)
    torch.testing.assert_close(model(**{**batch, "y": padded, "mask": mask}), ragged, atol=1e-5, rtol=0)
    other = model(**{**batch, "y": pack([y.tokens[:5] + 1, *y.split()[1:]])})
    assert not torch.allclose(other[0], ragged[0]), "the caption is heeded"
    assert torch.equal(other[1:], ragged[1:]), "by its own image only"


def test_linear_layers_compute_on_true_tokens_only():
    model, seen = tiny(), {}
    for name in ("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "blocks.0.cross_attn.kv_linear"):
        model.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: seen.update({name: given}))
    model(**{**inputs(batch=3), "y": captions(5, 1, 9), "mask": None})
    assert [given[0].shape[:-1] for given in seen.values()] == [(15,)] * 3


def test_sigmas_options_have_sigmas_names_and_begin_as_it_does():
    torch.manual_seed(0)
    config = Model(size="tiny", depth=4, width=24, heads=2, caption_width=16, qk_norm=True, kv_compression="conv")
    model = PixArt(config)
    state = model.state_dict()
    compressing = {name.split(".")[1] for name in state if ".attn.sr." in name}
    assert compressing == {"2", "3"}, "the second half of the blocks"
    expected = {"q_norm.weight": 1, "q_norm.bias": 0, "k_norm.weight": 1, "k_norm.bias": 0}
    expected |= {"norm.weight": 1, "norm.bias": 0, "sr.weight": 0.25, "sr.bias": 0}
    assert state["blocks.3.attn.sr.weight"].shape == (24, 1, 2, 2)
    for name, value in expected.items():
        assert torch.all(state[f"blocks.3.attn.{name}"] == value), name
    first = PixArt(config.model_copy(update={"kv_compression": "average", "kv_compression_from": 1}))
    assert [block.attn.compression for block in first.blocks] == [None, *["average"] * 3]


def test_the_ablations_modulation_begins_as_zero_and_heeds_time():
    model = tiny(modulation="blocks")
    for block in model.blocks:
        assert not any(p.any() for p in block.adaLN_modulation.parameters())
        assert not hasattr(block, "scale_shift_table")
    assert model.state_dict()["blocks.1.adaLN_modulation.1.weight"].shape == (6 * 96, 96)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_all_thousand_timesteps_stay_apart_in_bf16(autocast):
    model, seen = tiny(), []
    model = model if autocast else model.to(torch.bfloat16)
    model.t_embedder.register_forward_hook(lambda _, __, out: seen.append(out))
    batch = inputs(2, 2, batch=1000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**{**batch, "t": torch.arange(1000)})
    assert seen[0].dtype == torch.bfloat16
    assert len(torch.unique(seen[0], dim=0)) == 1000


@pytest.mark.parametrize("numbers", OPTIONS, ids=str)
def test_bf16_is_the_same_model_but_for_rounding(numbers):
    model, batch = shake(tiny(**numbers)), {**inputs(10, 6, batch=3), "y": captions(5, 1, 9), "mask": None}
    exact, seen = model(**batch), []
    model.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**{**batch, "y": batch["y"]._replace(tokens=batch["y"].tokens.bfloat16())})
    mixed.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    halved = model.to(torch.bfloat16)(**batch)
    assert seen == [torch.float32, torch.bfloat16], "under autocast the sums that run through all blocks stay fp32"
    for out in (mixed, halved):
        assert out.dtype == torch.bfloat16
        assert (out - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize(
    "numbers", [{}, {"modulation": "blocks"}, {"condition": "class", "num_classes": 5}], ids=["single", "blocks", "DiT"]
)
def test_modulation_is_summed_as_exactly_as_what_it_modulates(numbers, monkeypatch):
    """Also where the weights are bf16 for as long as they are used, as with FSDP2."""
    torch.manual_seed(0)
    numbers = {"caption_width": 16, "base_size": 8, **numbers}
    model = shake(build(pixart_tiny().model_copy(update=numbers)).to(torch.bfloat16))
    shared, seen, given = [], [], []

    def watched(x, shift, scale):
        seen.append((x.dtype, shift.dtype, scale.dtype))
        given.append(shift)
        return layers.normalize(x) * (1 + scale) + shift

    monkeypatch.setattr(layers, "modulate", watched)
    monkeypatch.setattr(dit_module, "modulate", watched)
    model.blocks[0].register_forward_pre_hook(lambda _, given: shared.append(given))
    batch = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 700]), "y": captions(5, 2)}
    batch["y"] = torch.tensor([1, 4]) if isinstance(model, dit_module.DiT) else batch["y"]
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert set(seen) == {(torch.float32,) * 3}
    assert len(seen) == 5, "two of each block, and one before the last layer"
    if not numbers.keys() & {"modulation", "condition"}:
        expected = model.blocks[0].scale_shift_table[:1].float() + shared[0][3][:, :1].float()
        assert torch.equal(given[0], expected)
        assert not torch.equal(given[0], given[0].bfloat16().float()), "it was not rounded"
    seen.clear()
    model(**batch)
    assert set(seen) == {(torch.bfloat16,) * 3}, "who asks for bf16 throughout gets it"


def test_a_model_is_copied_and_pickled_without_its_positions_and_they_are_no_state():
    model, batch = wake(tiny()), inputs(4, 16)
    expected = model(**batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch), expected)
    assert not any("position" in name for name in model.state_dict())
    assert not list(model.buffers())


def test_sampling_before_training_does_no_harm():
    model, batch = wake(tiny()), inputs(6, 10)
    with torch.inference_mode():
        expected = model(**batch)
    out = model(**batch)
    out.square().mean().backward()
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it on its way
@pytest.mark.parametrize(
    ("backend", "numbers"),  # with and without differentiating what was traced; no C++ is made of it
    [("aot_eager", {}), ("eager", {"kv_compression": "conv", "modulation": "blocks", "qk_norm": True})],
)
def test_blocks_compute_the_same_compiled_once_for_all_canvases_and_captions(backend, numbers, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    plain = shake(tiny(width=24, **numbers))
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks(backend)
    ways = []
    monkeypatch.setattr(
        model_module, "arrange", lambda *given, arrange=model_module.arrange: ways.append(arrange(*given)) or ways[-1]
    )
    cases = [((8, 8), (5, 1, 9)), ((12, 6), (3, 3, 7)), ((6, 14), (12, 10, 7)), ((10, 10), (2, 5, 2))]
    for canvas, lengths in cases:
        batch = {**inputs(*canvas, batch=3), "y": captions(*lengths), "mask": None}
        outs = []
        for model in (plain, compiled):
            model.zero_grad()
            outs.append(model(**batch))
            outs[-1].square().mean().backward()
        torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0, msg=name)
    assert {type(text) for text in ways[1::2]} == {Spread}, "one program for all lengths"
    kinds = len({block.attn.compression for block in plain.blocks})
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    assert not copy.deepcopy(compiled).compiled, "the average of the weights is not trained"
    torch._dynamo.reset()


@pytest.fixture
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it on its way
def test_compiled_blocks_stay_whole_among_ddps_buckets():
    """Those of PixArt-XL/2 are larger than a bucket: 85 MB of gradients and 25."""
    torch._dynamo.reset()
    programs = []
    model = shake(tiny(width=24))
    with torch._dynamo.config.patch(optimize_ddp=True):  # torch's default, whatever ran before
        model.compile_blocks(lambda module, inputs: programs.append(module) or module)
        spread = DistributedDataParallel(model, bucket_cap_mb=0.001)
        spread(**inputs()).square().mean().backward()
    torch._dynamo.reset()
    assert sum(p.numel() * 4 for p in model.blocks[0].parameters()) > 10_000, "it has buckets in it"
    assert len(programs) == 1


def test_recomputing_does_not_ask_generators_for_their_state(monkeypatch):
    """A GPU would have to be waited for, in every block."""
    model = shake(tiny(grad_checkpointing=True))
    monkeypatch.delattr(torch, "get_rng_state")
    model(**inputs()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("numbers", OPTIONS, ids=str)
def test_checkpointed_gradients_are_the_gradients(numbers):
    gradients, runs = [], []
    for flag in (False, True):
        model = shake(tiny(grad_checkpointing=flag, **numbers))
        calls = Counter()
        for i, block in enumerate(model.blocks):
            block.attn.register_forward_hook(lambda *_, i=i, calls=calls: calls.update([i]))
        batch = {**inputs(10, 6, batch=3), "y": captions(5, 1, 9), "mask": None}
        model(**batch).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        runs.append(calls)
    assert runs == [{0: 1, 1: 1}, {0: 2, 1: 2}], "the second time is the recomputation"
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
