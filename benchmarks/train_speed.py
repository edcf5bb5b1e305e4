"""Training PixArt-XL/2 on a GPU, beside diffusers' model under the same loop: images per second and utilisation.

    python -m benchmarks.train_speed [--px 256 512] [--batch N] [--steps K] [--no-compile]

A step is what the training loop does with a batch that lies on the GPU: forward pass in bf16 by autocast over fp32
weights, backward pass, clipping, fused AdamW. Captions are of 85 tokens in the mean, ours without padding, diffusers'
padded to 120. Ours is compiled as `run.compile` compiles it, unless told otherwise; diffusers' model as its users do,
block by block. Models take turns in one process; a figure is the median of the turns, by CUDA's clock. Utilisation
(MFU) counts the operations of our model, without padding, against the GPU's dense bf16 peak; half of it is the goal.

It needs a GPU, so it is not part of `make bench`. `--device cpu` with a small `--depth` only shows that it runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.networks import DIFFUSERS, OURS, Contender, Inputs, contender
from benchmarks.read_shards import machine
from pixart_model.flops import peak_tflops, train_flops
from pixart_model.sizes import Model

_CELL_PX = 8
_BATCHES = {256: 96, 512: 24, 1024: 4}
_LENGTHS = (50, 75, 95, 120)  # 85 in the mean
_TURNS = 3
_UNTIMED = 5  # steps: compilation, allocation, the choice of kernels
_CLIP = 0.01


def inputs_of(config: Model, batch: int, device: torch.device) -> Inputs:
    """Return a batch; always the same one."""
    rng = torch.Generator().manual_seed(1)
    captions = [
        torch.randn(_LENGTHS[i % len(_LENGTHS)], config.caption_width, generator=rng).bfloat16() for i in range(batch)
    ]
    x = torch.randn(batch, config.in_channels, config.base_size, config.base_size, generator=rng)
    return Inputs(x, torch.randint(1000, (batch,), generator=rng), captions).to(device)


def stepper(one: Contender, device: torch.device) -> Callable[[], None]:
    """Return what does one training step."""
    parameters = list(one.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.05, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = one.forward()
        out.float().square().mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Return how long a step takes, over `count` of them."""
    _settle(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _settle(device)
    return (time.perf_counter() - began) / count


def compare(config: Model, batch: int, steps: int, compiled: bool, device: torch.device) -> list[str]:
    """Let the models take turns at one resolution; return a line for each."""
    inputs = inputs_of(config, batch, device)
    steppers, memory = {}, {}
    for name in (OURS, DIFFUSERS):
        one = contender(name, config, inputs)
        _prepare(one, compiled)
        steppers[name] = stepper(one, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(_UNTIMED):
            steppers[name]()
        memory[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(_TURNS):
        for name, step in steppers.items():
            times[name].append(seconds(step, steps, device))
    tokens = (config.base_size // config.patch) ** 2
    flops = train_flops(config, batch, tokens, sum(len(one) for one in inputs.captions))
    peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return [
        line(name, config.base_size * _CELL_PX, batch, statistics.median(taken), flops, peak, memory[name])
        for name, taken in times.items()
    ]


def _prepare(one: Contender, compiled: bool) -> None:
    network: Any = one.network
    if compiled and one.name == OURS:
        network.compile_blocks()
    elif compiled:
        for block in network.transformer_blocks:
            block.compile(dynamic=True)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def line(name: str, px: int, batch: int, step_s: float, flops: float, peak: float | None, memory: int) -> str:
    """Return what a model came to as text; `flops` of a step, `peak` in TFLOP/s, None where it is not known."""
    used = flops / step_s / 1e12
    share = f"{used / peak:>7.1%} of {peak:,.0f}" if peak else "   (peak not known)"
    return (
        f"{px:>5} px {name:<10}{batch:>5} a step{1000 * step_s:>10.1f} ms{batch / step_s:>10.1f} images/s"
        f"{used:>9.1f} TFLOP/s{share}{memory / 1e9:>8.1f} GB"
    )


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, nargs="+", choices=sorted(_BATCHES), default=[256, 512])
    parser.add_argument("--batch", type=int, help="samples in a step (default: what fits into 80 GB)")
    parser.add_argument("--steps", type=int, default=20, help="of each turn")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("train_speed: expected a GPU, found none; run it on a machine that has one", file=sys.stderr)  # noqa: T201
        return 2
    print(machine())  # noqa: T201
    for px in options.px:
        scale = 2.0 if px == max(_BATCHES) else 1.0
        config = Model(depth=options.depth, width=1152, heads=16, base_size=px // _CELL_PX, interpolation_scale=scale)
        batch = options.batch or _BATCHES[px]
        print(*compare(config, batch, options.steps, not options.no_compile, device), sep="\n", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
