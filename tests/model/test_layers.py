import copy
import math
import pickle

import pytest
import torch

from pixart_model.attention import Padded
from pixart_model.layers import (
    Block,
    CrossAttention,
    NumberEmbed,
    Positions,
    SelfAttention,
    modulate,
    normalize,
    sinusoid,
)

CPU = torch.device("cpu")


def test_a_thousand_timesteps_stay_a_thousand_even_for_bf16_input_widths():
    embedded = sinusoid(torch.arange(1000))
    assert embedded.dtype == torch.float32
    assert len(torch.unique(embedded.bfloat16(), dim=0)) == 1000


def test_timesteps_sizes_and_ratios_stay_apart_in_bf16_weights_and_under_autocast():
    torch.manual_seed(0)
    embed = NumberEmbed(96)
    torch.nn.init.normal_(embed.mlp[0].weight, std=0.02)
    torch.nn.init.normal_(embed.mlp[2].weight, std=0.02)
    halved = copy.deepcopy(embed).bfloat16()
    for numbers in (
        torch.arange(1000),
        torch.arange(1000) + 0.5,
        torch.arange(64, 4097, 8),
        torch.linspace(0.25, 4, 76),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = embed(numbers)
        for out in (found, halved(numbers)):
            assert out.dtype == torch.bfloat16
            assert len(torch.unique(out, dim=0)) == len(numbers)


def test_the_sinusoid_is_its_formula():
    found = sinusoid(torch.tensor([0.0, 3.25]))
    for i in (0, 5, 127):
        angle = 3.25 * 10_000 ** (-i / 128)
        assert math.isclose(found[1, i], math.cos(angle), abs_tol=1e-6)
        assert math.isclose(found[1, 128 + i], math.sin(angle), abs_tol=1e-6)
    assert found[0].tolist() == [1.0] * 128 + [0.0] * 128


def test_positions_are_those_of_dit_on_the_reference_square_and_stretch_on_others():
    square = Positions(8, base=16, scale=1.0)(16, 16, CPU).view(16, 16, 8)
    row, column = 3, 7
    expected = [f(axis * w) for axis in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(square[row, column], torch.tensor(expected))
    wide = Positions(8, base=16, scale=2.0)(8, 32, CPU).view(8, 32, 8)
    assert math.isclose(wide[0, 31, 0], math.sin(31 / 2 / 2), abs_tol=1e-6)
    assert math.isclose(wide[7, 0, 4], math.sin(7 * 2 / 2), abs_tol=1e-6)


def test_sides_of_grids_are_computed_once_and_not_copied():
    positions = Positions(8, base=16, scale=1.0)
    with torch.inference_mode():
        first = positions.axis(4, CPU)
        positions(4, 6, CPU)
    assert not first.is_inference(), "what sampling made, training may use"
    assert positions.axis(4, CPU) is first
    assert positions.axis(6, CPU) is not first
    for twin in (copy.deepcopy(positions), pickle.loads(pickle.dumps(positions))):
        assert twin.axis(4, CPU) is not first
        assert torch.equal(twin(4, 6, CPU), positions(4, 6, CPU))


def test_modulation_is_its_formula():
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    mean, variance = x.mean(2, keepdim=True), x.var(2, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, shift, scale), expected)


def test_gradients_of_modulation_are_those_of_its_formula_and_less_is_kept():
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 1, 1)]
    assert torch.autograd.gradcheck(modulate, inputs)
    grad = torch.randn(2, 3, 8, dtype=torch.float64)

    def backward(function):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = function(*inputs)
        return torch.autograd.grad(out, inputs, grad), sum(t.numel() for t in kept if t.numel() == 48)

    plainly = backward(lambda x, shift, scale: normalize(x) * (1 + scale) + shift)
    ours = backward(modulate)
    torch.testing.assert_close(ours[0], plainly[0])
    assert ours[1] == 48 < plainly[1], "the input alone is kept"


def test_modulation_takes_what_autocast_and_sharded_models_hand_it():
    x = torch.randn(2, 3, 8, requires_grad=True)
    shift, scale = (torch.randn(2, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = modulate(x, shift, scale)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert (x.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16)


def textbook(q, k, v, heads):
    outs = []
    for part in torch.arange(q.shape[2]).chunk(heads):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5).softmax(-1)
        outs.append(weights @ v[..., part])
    return torch.cat(outs, 2)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention_is_the_textbook_formula(qk_norm):
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2, qk_norm), torch.randn(2, 6, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=2)
    if qk_norm:
        for norm in (layer.q_norm, layer.k_norm):
            torch.nn.init.normal_(norm.weight)
        q, k = layer.q_norm(q), layer.k_norm(k)
    torch.testing.assert_close(layer(x, (2, 3)), layer.proj(textbook(q, k, v, 2)))


@pytest.mark.parametrize("how", ["conv", "average", "uniform"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 4), (3, 7), (1, 2)])
def test_compressed_keys_are_those_of_windows_whose_last_cells_repeat(how, grid):
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2, compression=how, factor=2), torch.randn(2, grid[0] * grid[1], 8)
    q, *keys_and_values = layer.qkv(x).chunk(3, dim=2)
    shorter = []
    for tokens in keys_and_values:
        cells, windows = tokens.unflatten(1, grid), []
        for row in range(0, grid[0], 2):
            for column in range(0, grid[1], 2):
                places = [(min(row + i, grid[0] - 1), min(column + j, grid[1] - 1)) for i in (0, 1) for j in (0, 1)]
                window = torch.stack([cells[:, i, j] for i, j in places], -1)  # (B, D, 4)
                if how == "conv":
                    summed = (window * layer.sr.weight.flatten(1)).sum(-1) + layer.sr.bias
                    windows.append(layer.norm(summed))
                else:
                    windows.append(window.mean(-1) if how == "average" else window[..., 0])
        shorter.append(torch.stack(windows, 1))
    expected = layer.proj(textbook(q, *shorter, 2))
    torch.testing.assert_close(layer(x, grid), expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_sees_true_tokens_only():
    torch.manual_seed(0)
    layer, x, y = CrossAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    padded = layer(x, Padded(y, mask[:, None, None]))
    torch.testing.assert_close(padded[:1], layer(x[:1], Padded(y[:1, :2], None)))
    y[0, 2:] = 1e3
    torch.testing.assert_close(padded, layer(x, Padded(y, mask[:, None, None])))


def test_an_mlp_of_its_own_that_does_not_change_with_time_is_adaln_single():
    torch.manual_seed(0)
    single, own = (Block(8, 4.0, SelfAttention(8, 2), own_modulation) for own_modulation in (False, True))
    torch.nn.init.normal_(single.scale_shift_table)
    state = single.state_dict()
    bias = state.pop("scale_shift_table").flatten()
    own.load_state_dict({**state, "adaLN_modulation.1.weight": torch.zeros(48, 8), "adaLN_modulation.1.bias": bias})
    given = torch.randn(2, 6, 8), Padded(torch.randn(2, 3, 8), None), torch.randn(2, 8), torch.randn(2, 6, 8), (2, 3)
    torch.testing.assert_close(own(*given), single(*given))
    torch.nn.init.normal_(own.adaLN_modulation[1].weight)
    assert not torch.allclose(own(*given), own(given[0], given[1], given[2] + 1, *given[3:]))
