import math

import torch

from pixart_model.layers import CrossAttention, SelfAttention, position_table, sinusoid


def test_a_thousand_timesteps_stay_a_thousand_even_for_bf16_input_widths():
    embedded = sinusoid(torch.arange(1000))
    assert embedded.dtype == torch.float32
    assert len(torch.unique(embedded.bfloat16(), dim=0)) == 1000


def test_the_sinusoid_is_its_formula():
    found = sinusoid(torch.tensor([0.0, 3.25]))
    for i in (0, 5, 127):
        angle = 3.25 * 10_000 ** (-i / 128)
        assert math.isclose(found[1, i], math.cos(angle), abs_tol=1e-6)
        assert math.isclose(found[1, 128 + i], math.sin(angle), abs_tol=1e-6)
    assert found[0].tolist() == [1.0] * 128 + [0.0] * 128


def test_positions_are_those_of_dit_on_the_reference_square_and_stretch_on_others():
    square = position_table(16, 16, 8, base=16, scale=1.0).view(16, 16, 8)
    row, column = 3, 7
    expected = [f(axis * w) for axis in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(square[row, column], torch.tensor(expected, dtype=torch.float64))
    wide = position_table(8, 32, 8, base=16, scale=2.0).view(8, 32, 8)
    assert math.isclose(wide[0, 31, 0], math.sin(31 / 2 / 2))
    assert math.isclose(wide[7, 0, 4], math.sin(7 * 2 / 2))


def test_self_attention_is_the_textbook_formula():
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2), torch.randn(2, 5, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=2)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, 2)))


def test_cross_attention_sees_true_tokens_only():
    torch.manual_seed(0)
    layer, x, y = CrossAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    padded = layer(x, y, mask[:, None, None])
    torch.testing.assert_close(padded[:1], layer(x[:1], y[:1, :2], None))
    y[0, 2:] = 1e3
    torch.testing.assert_close(padded, layer(x, y, mask[:, None, None]))
