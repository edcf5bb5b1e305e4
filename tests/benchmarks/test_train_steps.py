"""The benchmark of training steps: that the three compute the same, that it would notice if not, and its limits."""

import pytest
import torch

from benchmarks import train_speed, train_steps
from benchmarks.networks import DIFFUSERS, OURS, REFERENCE, Inputs, contender
from pixart_model.sizes import Model

TINY = Model(depth=2, width=48, heads=4, caption_width=24, base_size=8)


@pytest.fixture(scope="module")
def contenders():
    rng = torch.Generator().manual_seed(0)
    captions = [torch.randn(n, 24, generator=rng) for n in (3, 120, 7)]
    inputs = Inputs(torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([0, 500, 999]), captions)
    return [contender(name, TINY, inputs) for name in (OURS, DIFFUSERS, REFERENCE)]


def test_the_three_compute_the_same(contenders):
    train_steps.check(contenders, torch.zeros(3, 8, 8, 8))
    outs = [one.forward().detach() for one in contenders]
    assert all(torch.allclose(outs[0], out, atol=1e-5) for out in outs[1:])
    assert outs[0].abs().max() > 0.01, "the comparison is not one of zeros"


@pytest.mark.parametrize("which", [1, 2])
def test_a_peer_that_computes_something_else_is_noticed(contenders, which):
    weight = next(p for name, p in contenders[which].network.named_parameters() if "blocks.1" in name and p.ndim == 2)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    try:
        with pytest.raises(RuntimeError, match=f"{contenders[which].name}: expected the same outputs as ours"):
            train_steps.check(contenders, torch.zeros(3, 8, 8, 8))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_memory_of_a_pass_grows_with_what_it_holds(contenders):
    target = torch.zeros(3, 8, 8, 8)
    train_steps.check(contenders, target)
    whole = train_steps.peak_bytes(contenders[0], target)
    contenders[0].network.grad_checkpointing = True
    try:
        assert train_steps.peak_bytes(contenders[0], target) < whole
    finally:
        contenders[0].network.grad_checkpointing = False
    assert whole > 3 * 16 * 48 * 4 * 20, "some twenty tensors of the tokens, at least"


def test_limits_are_held_and_shown():
    times = {OURS: [1.0, 1.0, 1.0], DIFFUSERS: [1.0, 1.06, 2.0], REFERENCE: [1.1, 0.9, 1.0]}
    memory = {OURS: 90_000_000, DIFFUSERS: 100_000_000, REFERENCE: 100_000_000}
    assert not train_steps.missed(times, memory)
    shown = train_steps.table(times, memory)
    assert "1.060 (1.000..2.000) PASS" in shown
    assert "0.90 times diffusers', less than 1 wanted: PASS" in shown
    assert train_steps.missed({**times, DIFFUSERS: [1.0, 1.04, 2.0]}, memory)
    assert train_steps.missed({**times, REFERENCE: [0.9, 0.99, 1.0]}, memory)
    assert train_steps.missed(times, {**memory, OURS: 100_000_000})
    assert "MISSED" in train_steps.table({**times, DIFFUSERS: [1.0, 1.04, 2.0]}, memory)


def test_the_comparison_on_a_gpu_runs_and_counts(monkeypatch):
    monkeypatch.setattr(train_speed, "_UNTIMED", 1)
    ours, theirs = train_speed.compare(TINY, 2, 1, compiled=False, device=torch.device("cpu"))
    assert (ours.split()[:3], theirs.split()[:3]) == (["64", "px", OURS], ["64", "px", DIFFUSERS])
    shown = train_speed.line(OURS, 256, 100, 0.5, 200e12, 800.0, 10**10)
    assert "200.0 images/s" in shown
    assert "400.0 TFLOP/s" in shown
    assert "50.0% of 800" in shown
    assert "10.0 GB" in shown
