import pytest
import torch
import torch.nn.functional as F

from pixart_data.errors import ConfigError
from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.packing import pack
from pixart_model.reparameterisation import reparameterise
from pixart_model.sizes import Model

DEPTH, WIDTH = 4, 24
SIZES = {"size": "tiny", "depth": DEPTH, "width": WIDTH, "heads": 2, "base_size": 8}


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    made = DiT(Model(**SIZES, condition="class", num_classes=3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def target(**more):
    return Model(**{**SIZES, "caption_width": 8, **more})


def start(dit, shared_mlp="mean", without_class="zero", base=None, **more):
    config = target(**more)
    base = PixArt(config).state_dict() if base is None else base
    return reparameterise(dit.state_dict(), dit.config, config, shared_mlp, without_class, base)


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "more", [{}, {"micro_conditioning": True}, {"modulation": "blocks"}, {"kv_compression": "conv"}], ids=str
)
def test_what_dit_has_is_taken_and_the_rest_is_fresh(dit, more):
    torch.manual_seed(1)
    base = {name: tensor + 0.01 for name, tensor in PixArt(target(**more)).state_dict().items()}  # no zeros in it
    found = start(dit, base=base, **more)
    assert shapes(found) == shapes(base)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    taken = {name for name in found if name in dit.state_dict()}
    assert {"x_embedder.proj.weight", "blocks.3.attn.qkv.bias", "blocks.0.mlp.fc2.weight"} < taken
    assert ("blocks.1.adaLN_modulation.1.weight" in taken) == (more == {"modulation": "blocks"})
    for name in taken:
        assert torch.equal(found[name], dit.state_dict()[name]), name
    fresh = {name for name in found if any(f".{part}." in name for part in ("y_proj", "q_linear", "kv_linear", "sr"))}
    assert len(fresh) >= 4 + 4 * DEPTH
    for name in fresh:
        assert torch.equal(found[name], base[name]), name
    for i in range(DEPTH):
        assert not found[f"blocks.{i}.cross_attn.proj.weight"].any()
        assert not found[f"blocks.{i}.cross_attn.proj.bias"].any()


def test_nothing_is_changed_in_place(dit):
    base = PixArt(target()).state_dict()
    before = {name: tensor.clone() for name, tensor in (base | dit.state_dict()).items()}
    start(dit, without_class="null", base=base)
    for name, tensor in (base | dit.state_dict()).items():
        assert torch.equal(tensor, before[name]), name


def conditions(dit, timesteps, y=0.0):
    """s(t), (T, D)."""
    with torch.no_grad():
        return F.silu(dit.t_embedder(torch.tensor(timesteps)) + y)


def errors(dit, weights, timesteps, y=0.0):
    """By how much each block's modulation misses DiT's: (depth, T, 6 D)."""
    config = target()
    model = PixArt(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        s = conditions(dit, timesteps, y)
        t0 = model.t_block(model.t_embedder(torch.tensor(timesteps)))  # (T, 6 D)
        found = torch.stack([t0 + block.scale_shift_table.flatten() for block in model.blocks])
        wanted = torch.stack([block.adaLN_modulation[1](s) for block in dit.blocks])
    return found - wanted


TIMES = [0.0, 100.0, 300.0, 499.0, 500.0, 650.0, 999.0]


@pytest.mark.parametrize("without_class", ["zero", "null", "mean"])
@pytest.mark.parametrize("shared_mlp", ["mean", "first"])
def test_modulation_is_dits_at_500_and_the_first_blocks_at_every_timestep(dit, shared_mlp, without_class):
    table = dit.state_dict()["y_embedder.embedding_table.weight"]
    y = {"zero": 0.0, "null": table[3], "mean": table[:3].mean(0)}[without_class]
    found = errors(dit, start(dit, shared_mlp, without_class), TIMES, y).abs().amax(-1)  # (depth, T)
    assert (found[:, TIMES.index(500.0)] < 1e-5).all()
    exact = (found < 1e-5).all(1).tolist()
    assert exact == [shared_mlp == "first", False, False, False]


def test_the_mean_is_the_least_squares_optimum_at_every_timestep(dit):
    """Against the solution for all timesteps together, and that for each alone."""
    timesteps = [float(t) for t in range(0, 1000, 10)]
    ours = errors(dit, start(dit, "mean"), timesteps).square().sum((0, 2))  # (T,)
    first = errors(dit, start(dit, "first"), timesteps).square().sum((0, 2))  # (T,)

    offsets = (conditions(dit, timesteps) - conditions(dit, [500.0])).double()  # (T, D): what W acts on
    wanted = [block.adaLN_modulation[1].weight.detach().double() for block in dit.blocks]  # (6 D, D) each
    targets = torch.cat([offsets @ w.T for w in wanted])  # (depth T, 6 D)
    shared = torch.linalg.lstsq(offsets.repeat(DEPTH, 1), targets, driver="gelsd").solution  # (D, 6 D)
    misses = (offsets @ shared).repeat(DEPTH, 1) - targets
    best = misses.square().view(DEPTH, len(timesteps), -1).sum((0, 2)).float()  # (T,)
    torch.testing.assert_close(ours, best, rtol=1e-3, atol=1e-6)
    alone = targets.view(DEPTH, len(timesteps), -1).var(0, correction=0).sum(1).float() * DEPTH  # (T,)
    torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-6)
    apart = [i for i, t in enumerate(timesteps) if abs(t - 500) > 20]
    assert (first[apart] > 1.1 * ours[apart]).all()


def test_captions_and_sizes_do_nothing_at_first_and_then_learn(dit):
    torch.manual_seed(3)
    model = PixArt(target(micro_conditioning=True))
    model.load_state_dict(start(dit, micro_conditioning=True))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 700.0])
    size_px, ratio = torch.tensor([[300.0, 411.0], [64.0, 64.0]]), torch.tensor([0.72, 1.0])
    captions, others = (pack([torch.randn(n, 8) for n in lengths]) for lengths in ((3, 5), (1, 2)))
    out = model(x, t, captions, None, size_px, ratio)
    assert torch.equal(out, model(x, t, others, None, 2 * size_px, ratio + 1))
    out.square().mean().backward()
    for name in ("blocks.0.cross_attn.proj.weight", "csize_embedder.mlp.2.weight", "ar_embedder.mlp.2.bias"):
        assert model.get_parameter(name).grad.any(), name


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depth", 3, r"model\.depth: expected 4, .* found 3; set model\.depth = 4"),
        ("width", 48, r"model\.width: expected 24, .* found 48"),
        ("heads", 4, r"model\.heads: expected 2, .* found 4"),
        ("mlp_ratio", 2.0, r"model\.mlp_ratio: expected 4\.0, .* found 2\.0"),
        ("patch", 4, r"model\.patch: expected 2, .* found 4"),
        ("in_channels", 16, r"model\.in_channels: expected 4, .* found 16"),
        ("qk_norm", True, r"model\.qk_norm: expected false, .* found true; set model\.qk_norm = false"),
    ],
)
def test_another_size_is_refused_by_its_key(dit, key, value, said):
    with pytest.raises(ConfigError, match=said):
        start(dit, **{key: value})
