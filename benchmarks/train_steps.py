"""Forward and backward pass of the transformer, beside diffusers' and the reference's: time and memory.

    python -m benchmarks.train_steps [--rounds K] [--depth N] [--json FILE]

Width 1152, 256 px, four captions of 50 to 120 tokens (85 in the mean), fp32, one thread. Outputs and gradients of the
three are compared first. Then they take turns in one process, which is measured by its CPU time; a ratio is the median
of the ratios inside each round. Peak memory is what torch's allocator holds at most during one pass, weights and
gradients not counted. The exit code is 1 if a limit is missed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import DIFFUSERS, OURS, REFERENCE, Contender, Inputs, contender
from benchmarks.read_shards import machine
from pixart_model.sizes import Model

LENGTHS = (50, 75, 95, 120)
"""Tokens of the captions: 85 in the mean."""

FASTER_THAN = {DIFFUSERS: 1.05, REFERENCE: 1.0}
"""At least so many times as fast as each."""

_FIRST_WEIGHTS = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # under the two naming schemes
_TOLERANCE = 1e-4
_CAPTION_WIDTH, _CELLS = 4096, 32

Rounds = dict[str, list[float]]
"""CPU seconds of each round, by contender."""


def inputs_of(config: Model) -> Inputs:
    """Return a batch; always the same one."""
    rng = torch.Generator().manual_seed(1)
    captions = [torch.randn(length, config.caption_width, generator=rng) for length in LENGTHS]
    x = torch.randn(len(LENGTHS), config.in_channels, config.base_size, config.base_size, generator=rng)
    return Inputs(x, torch.randint(1000, (len(LENGTHS),), generator=rng), captions)


def take_turn(one: Contender, target: Tensor) -> float:
    """Do one forward and backward pass; return its CPU seconds."""
    one.network.zero_grad(set_to_none=True)
    began = time.process_time()
    (one.forward() - target).square().mean().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - began


def check(contenders: list[Contender], target: Tensor) -> None:
    """Compare outputs, and the gradient of the first weight that an input meets.

    Raises:
        RuntimeError: If they differ.
    """
    found = {}
    for one in contenders:
        one.network.zero_grad(set_to_none=True)
        out = one.forward()
        (out - target).square().mean().backward()  # type: ignore[no-untyped-call]
        parameters = dict(one.network.named_parameters())
        patch = next(parameters[name] for name in _FIRST_WEIGHTS if name in parameters)
        assert patch.grad is not None
        found[one.name] = (out.detach(), patch.grad / patch.grad.abs().max())
    for name, pair in found.items():
        for what, ours, theirs in zip(("outputs", "gradients"), found[OURS], pair, strict=True):
            difference = float((ours - theirs).abs().max())
            if difference > _TOLERANCE:
                raise RuntimeError(
                    f"{name}: expected the same {what} as ours, found a difference of {difference:.1e}; do not trust "
                    "these times, and report this line"
                )


def peak_bytes(one: Contender, target: Tensor) -> int:
    """Return the most that torch's allocator holds during a pass, beyond what it held before: weights, gradients.

    A pass went before this one, so that the gradients are there.
    """
    one.network.zero_grad(set_to_none=False)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (one.forward() - target).square().mean().backward()  # type: ignore[no-untyped-call]
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(contenders: list[Contender], target: Tensor, rounds: int) -> Rounds:
    """Let the contenders take turns, in an order that turns too."""
    times: Rounds = {one.name: [] for one in contenders}
    for number in range(rounds):
        sys.stderr.write(f"round {number + 1} of {rounds}\n")
        shift = number % len(contenders)
        for one in contenders[shift:] + contenders[:shift]:
            times[one.name].append(take_turn(one, target))
    return times


def ratio(times: Rounds, peer: str) -> tuple[float, float, float]:
    """Return the median of how many times as fast as a peer ours is in a round, the lowest and the highest."""
    values = [theirs / ours for ours, theirs in zip(times[OURS], times[peer], strict=True)]
    return statistics.median(values), min(values), max(values)


def table(times: Rounds, memory: dict[str, int]) -> str:
    """Return times, memory, ratios and limits as text."""
    lines = [f"{'':<12}{'CPU s':>8}{'peak MB':>10}{'at least':>10}{'ours is times as fast':>30}"]
    for name, values in times.items():
        line = f"{name:<12}{statistics.median(values):>8.2f}{memory[name] / 1e6:>10.0f}"
        if name != OURS:
            median, lowest, highest = ratio(times, name)
            verdict = "PASS" if median >= FASTER_THAN[name] else "MISSED"
            line += f"{FASTER_THAN[name]:>10.2f}{f'{median:.3f} ({lowest:.3f}..{highest:.3f}) {verdict:<6}':>30}"
        lines.append(line.rstrip())
    verdict = "PASS" if memory[OURS] < memory[DIFFUSERS] else "MISSED"
    lines.append(f"peak memory: {memory[OURS] / memory[DIFFUSERS]:.2f} times diffusers', less than 1 wanted: {verdict}")
    return "\n".join(lines)


def missed(times: Rounds, memory: dict[str, int]) -> bool:
    """Tell whether a limit is not kept."""
    slow = any(ratio(times, peer)[0] < limit for peer, limit in FASTER_THAN.items())
    return slow or memory[OURS] >= memory[DIFFUSERS]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = Model(depth=options.depth, width=1152, heads=16, caption_width=_CAPTION_WIDTH, base_size=_CELLS)
    inputs = inputs_of(config)
    target = torch.zeros(len(LENGTHS), 2 * config.in_channels, _CELLS, _CELLS)
    contenders = [contender(name, config, inputs) for name in (OURS, DIFFUSERS, REFERENCE)]
    check(contenders, target)
    memory = {one.name: peak_bytes(one, target) for one in contenders}
    times = measure(contenders, target, options.rounds)
    print(f"{machine()}\n{table(times, memory)}")  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps({"cpu_s": times, "peak_bytes": memory}, indent=1))
    return int(missed(times, memory))


if __name__ == "__main__":
    sys.exit(main())
