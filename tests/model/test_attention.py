import itertools

import pytest
import torch
from torch.nn.attention import varlen

from pixart_model import attention
from pixart_model.attention import Padded, Ragged, Split, Spread, arrange, choose
from pixart_model.packing import pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (5, 1, 12, 7)
HEADS = 3


def textbook(q, kv, offsets):
    """Softmax attention written out, caption by caption and head by head: (B, N, H, d) and (M, 2, H, d)."""
    out = torch.empty_like(q)
    for i, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        k, v = kv[offsets[i] : offsets[i + 1], :, h].unbind(1)
        out[i, :, h] = (q[i, :, h] @ k.T / q.shape[3] ** 0.5).softmax(-1) @ v
    return out.flatten(2)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    q = torch.randn(len(LENGTHS), 6, HEADS, 8, requires_grad=True)
    kv = torch.randn(sum(LENGTHS), 2, HEADS, 8, requires_grad=True)
    return q, kv


@pytest.fixture
def slow_kernel(monkeypatch):
    """The varlen kernel's arguments, checked, and its result by the textbook, for a machine without it."""
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert query.shape[1:] == key.shape[1:] == value.shape[1:]
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "the kernel needs whole heads"
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
        calls.append(query)
        out = textbook(query.unflatten(0, (-1, max_q)), torch.stack([key, value], 1), cu_seq_k)
        return out.view_as(query)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    return calls


def of(way, tokens_wide, monkeypatch):
    monkeypatch.setattr(attention, "choose", lambda *_: way)
    captions = pack(tokens_wide.split(LENGTHS))
    return arrange(captions, image_tokens=6, heads=HEADS, compiled=False)


@pytest.mark.parametrize("way", [Split, Ragged, Spread])
def test_each_way_is_the_textbook_formula_and_so_are_its_gradients(way, tensors, slow_kernel, monkeypatch):
    q, kv = tensors
    text = of(way, kv[:, 0].flatten(1), monkeypatch)
    assert type(text) is way
    assert torch.equal(text.tokens, kv[:, 0].flatten(1)), "linear layers see true tokens, and these only"
    found, expected = text.attend(q, kv), textbook(q, kv, pack(kv.split(LENGTHS)).offsets)
    assert len(slow_kernel) == (way is Ragged)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((o * weights).sum(), (q, kv)) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_padded_captions_are_the_packed_ones(tensors):
    q, kv = tensors
    captions = pack(kv.flatten(1).split(LENGTHS))
    padded, mask = captions.padded()
    padded = padded.masked_fill(~mask[..., None], 1e3).unflatten(2, kv.shape[1:])
    found = Padded(padded[:, :, 0].flatten(2), mask[:, None, None]).attend(q, padded)
    torch.testing.assert_close(found, textbook(q, kv, captions.offsets), atol=1e-5, rtol=0)
    alike = kv[:12].unflatten(0, (4, 3))
    unmasked = Padded(alike[:, :, 0].flatten(2), None).attend(q, alike)
    torch.testing.assert_close(unmasked, textbook(q, kv[:12], [0, 3, 6, 9, 12]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("device", "dtype", "head_channels", "compiled", "capability", "way"),
    [
        (CPU, torch.float32, 72, False, None, Split),
        (CPU, torch.bfloat16, 72, False, None, Split),
        (CPU, torch.float32, 72, True, None, Spread),
        (torch.device("meta"), torch.bfloat16, 72, False, None, Split),
        (CUDA, torch.bfloat16, 72, False, (9, 0), Ragged),
        (CUDA, torch.float16, 64, True, (8, 0), Ragged),
        (CUDA, torch.float32, 72, False, (9, 0), Spread),
        (CUDA, torch.bfloat16, 12, False, (9, 0), Spread),
        (CUDA, torch.bfloat16, 512, False, (9, 0), Spread),
        (CUDA, torch.float16, 72, False, (7, 5), Spread),
    ],
)
def test_the_way_is_chosen_by_device_type_and_heads(
    device, dtype, head_channels, compiled, capability, way, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose(device, dtype, head_channels, compiled) is way


def test_a_torch_without_the_kernel_goes_the_padded_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choose(CUDA, torch.bfloat16, 72, compiled=False) is Spread


def test_autocast_decides_the_type_that_the_way_is_chosen_for(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "choose", lambda *given: seen.append(given) or Split)
    captions = pack([torch.randn(2, 24)])
    arrange(captions, 4, HEADS, compiled=False)
    with torch.autocast("cpu", torch.bfloat16):
        arrange(captions, 4, HEADS, compiled=True)
    assert seen == [(CPU, torch.float32, 8, False), (CPU, torch.bfloat16, 8, True)]
