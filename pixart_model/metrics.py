"""What a run says of itself: one line of `metrics.jsonl` and one of the log, every few steps.

A step is measured without waiting for the device. Over several processes, a line holds the mean of the losses, the sums
of images and tokens, the largest memory, and the wait for data of the process that waited longest, which all others
then wait for. Only the first process writes.
"""

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_data.storage import delete, write_atomic
from pixart_model import trackers
from pixart_model.alarms import NONFINITE, Reading, advice, are_finite, failure, suspects
from pixart_model.batches import Names
from pixart_model.checkpoint import latest
from pixart_model.config import Train
from pixart_model.costs import Spent
from pixart_model.devices import resolve_dtype
from pixart_model.flops import peak_tflops, train_flops
from pixart_model.journal import METRICS, Journal
from pixart_model.parallel import World

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of an optimizer step, in one process.

    Attributes:
        loss: The mean over all batches of the step, of all processes; on the device.
        grad_norm: Over all parameters, before clipping; on the device.
        losses: Of the batches of this process: one number, or (B,), one for each sample, which lets a message name the
            samples whose loss is not finite.
        names: The samples of these batches.
        tokens: Of each of these batches B, the image tokens N of one sample, and the text tokens of all of them.
        images: Samples of this process.
        data_s: How long it waited for data.
        lr: The learning rate of the step.
        skipped: Damaged samples that it had to replace.
    """

    loss: Tensor
    grad_norm: Tensor
    losses: Sequence[Tensor]
    names: Sequence[Names]
    tokens: Sequence[tuple[int, int, int]]
    images: int
    data_s: float
    lr: float
    skipped: int = 0


@dataclass
class _Sums:
    """What one process did since the last line."""

    images: int = 0
    image_tokens: int = 0
    text_tokens: int = 0
    skipped: int = 0
    data_s: float = 0.0
    flops: float = 0.0
    memory_bytes: int = 0


class Meter:
    """Collects steps and writes their means. All processes make one and ask the same of it.

    Args:
        run_dir: Where `metrics.jsonl` is.
        job: Of the run.
        world: Where this process stands among all.
        step: Steps done before.

    Raises:
        ConfigError: If a tracker that the job asks for is not installed.
    """

    def __init__(self, run_dir: Path, job: Train, world: World, step: int) -> None:
        trackers.require(job.run)
        self.step = step
        self._job, self._world = job, world
        self._journal = Journal(run_dir)
        self._trackers = trackers.Trackers(job, run_dir, step) if world.is_first else None
        self._peak_tflops = job.cost.peak_tflops or _peak_tflops(world)
        self._pending: tuple[Reading, Outcome] | None = None
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._lr = 0.0  # of the last step
        self._sums = _Sums()
        self._spent = Spent()
        self._skipped = 0
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)  # of what is no longer there, such as a text encoder
        self._since_s = self._paid_until_s = time.perf_counter()

    def rewind(self) -> None:
        """Drop the lines of steps after this one, which a run that was cut short wrote and this run will repeat.

        What was spent on them stays spent. `nonfinite.json` is about such a step, too, and goes.

        Raises:
            DataError: If the file is not one of metrics.
        """
        with self._world.agreed():
            lines = self._journal.lines()
            kept = [line for line in lines if line["step"] <= self.step]
            self._skipped = sum(line.get("skipped", 0) for line in kept)
            spent = map(Spent.read, [*lines, self._journal.carried()])
            self._spent = max(spent, key=lambda one: one.gpu_hours)
            if self._world.is_first:
                if len(kept) < len(lines):
                    self._journal.carry(asdict(self._spent))  # before its lines are gone
                self._journal.keep(kept)
                delete([self._journal.run_dir / NONFINITE])

    def add(self, outcome: Outcome) -> None:
        """Collect a step, and look at the one before.

        Raises:
            JobError: If the loss or the gradient of that one is not finite.
        """
        self._settle()
        self.step += 1
        self._pending = Reading(outcome.loss, outcome.grad_norm), outcome
        sums = self._sums
        for size, image_tokens, text_tokens in outcome.tokens:
            sums.image_tokens += size * image_tokens
            sums.text_tokens += text_tokens
            sums.flops += train_flops(self._job.model, size, image_tokens, text_tokens)
        sums.images += outcome.images
        sums.data_s += outcome.data_s
        sums.skipped += outcome.skipped

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, such as saving, out of the time of a step; it costs all the same."""
        began_s = time.perf_counter()
        yield
        self._since_s += time.perf_counter() - began_s

    def check(self) -> None:
        """Wait for the device and look at the last step; to be called before a checkpoint is written.

        Raises:
            JobError: If its loss or gradient is not finite, naming the step and the samples.
        """
        self._settle()

    def write(self) -> None:
        """Write the means since the last call.

        Raises:
            JobError: As `check` does, or if the storage fails.
        """
        self._settle()
        if not self._losses:
            return
        self._sums.memory_bytes = _memory_bytes(self._world.device)
        now_s = time.perf_counter()
        line = self._line(self._world.gather(self._sums), now_s - self._since_s)
        with self._world.agreed():
            if self._trackers is not None:
                self._journal.append(line)
                figures = {name: value for name, value in line.items() if name not in ("step", "device")}
                self._trackers.figures(self.step, figures)
                _log.info(self._text(line), extra={"fields": line})
        self._losses, self._grad_norms, self._sums = [], [], _Sums()
        self._since_s = time.perf_counter()

    def show(self, path: Path | None) -> None:
        """Pass a grid on to the trackers, if it could be drawn."""
        if self._trackers is not None and path is not None:
            self._trackers.picture(self.step, path)

    def conclude(self) -> None:
        """Say what the run has cost so far, the parts before a restart included, and what it had to do without."""
        spent = self._pay()
        if self._trackers is None:
            return
        self._trackers.close()
        run_dir, device = self._journal.run_dir, self._world.device.type
        _log.info(
            "%s: %d of %d steps done; %s in all",
            run_dir, self.step, self._job.run.num_steps, spent.text(device), extra={"fields": asdict(spent)},
        )  # fmt: skip
        if self._skipped:
            _log.warning(
                "%s: damaged samples came up %d times, and others of their batches took their places; `skipped` in %s "
                "says in which steps, `pixart verify` on the features names them",
                run_dir, self._skipped, METRICS,
            )  # fmt: skip

    def _settle(self) -> None:
        """Take the numbers of the last step, for which its end is waited for."""
        if self._pending is None:
            return
        reading, outcome = self._pending
        self._pending = None
        values = reading.values()
        if not are_finite(values):
            raise self._failure(values, outcome)
        self._losses.append(values[0])
        self._grad_norms.append(values[1])
        self._lr = outcome.lr

    def _failure(self, values: tuple[float, float], outcome: Outcome) -> Exception:
        world, step = self._world, self.step
        first = (step - 1) * self._job.data.batches_per_step + world.rank
        numbers = [first + i * world.size for i in range(len(outcome.losses))]
        own = suspects(world.rank, numbers, outcome.losses, outcome.names)
        batches = [batch for batches in world.gather(own) for batch in batches]
        run_dir = self._journal.run_dir
        has_checkpoint = world.gather(latest(run_dir) is not None)[0]  # as the first process has it, for all to say
        advised = advice(resolve_dtype(self._job.run.dtype, world.device), has_checkpoint)
        error, known = failure(run_dir, step, values, outcome.lr, batches, advised)
        if world.is_first:
            write_atomic(run_dir / NONFINITE, known)
        return error

    def _pay(self) -> Spent:
        """Bring what was spent up to now."""
        now_s = time.perf_counter()
        hours = self._world.size * (now_s - self._paid_until_s) / 3600
        self._spent, self._paid_until_s = self._spent + Spent.of(hours, self._job.cost), now_s
        return self._spent

    def _line(self, parts: list[_Sums], seconds: float) -> dict[str, Any]:
        steps = len(self._losses)
        total = _Sums(**{one.name: sum(getattr(part, one.name) for part in parts) for one in fields(_Sums)})
        waited_s = max(part.data_s for part in parts)
        tflops = total.flops / seconds / self._world.size / 1e12
        self._skipped += total.skipped
        return {
            "step": self.step,
            "loss": sum(self._losses) / steps,
            "grad_norm": sum(self._grad_norms) / steps,
            "lr": self._lr,
            "step_ms": 1000 * seconds / steps,
            "data_ms": 1000 * waited_s / steps,
            "data_share": waited_s / seconds,
            "images_per_s": total.images / seconds,
            "images": total.images,
            "image_tokens": total.image_tokens,
            "text_tokens": total.text_tokens,
            "skipped": total.skipped,
            "tflops_per_gpu": tflops,
            **({"mfu": tflops / self._peak_tflops} if self._peak_tflops else {}),
            "memory_bytes": max(part.memory_bytes for part in parts),
            "num_processes": self._world.size,
            "device": self._world.device.type,
            "seconds_left": (self._job.run.num_steps - self.step) * seconds / steps,
            "time_unix_s": round(time.time(), 3),
            **asdict(self._pay()),
        }

    def _text(self, line: dict[str, Any]) -> str:
        num_steps = self._job.run.num_steps
        digits = max(6, len(str(num_steps)))
        parts = [
            f"step {self.step:0{digits}d}/{num_steps:0{digits}d} {self.step / num_steps:.1%}",
            f"loss {line['loss']:.4f}",
            f"grad {line['grad_norm']:.3g}",
            f"lr {line['lr']:.1e}",
            f"{line['step_ms']:.0f} ms",
            f"data {line['data_share']:.0%}",
            f"{_pace(line['images_per_s'])} img/s",
            *([f"mfu {line['mfu']:.1%}"] if "mfu" in line else []),
            f"{line['memory_bytes'] / 1e9:.1f} GB",
            f"eta {_duration(line['seconds_left'])}",
        ]
        return " | ".join(parts)


def _peak_tflops(world: World) -> float | None:
    """Of the GPU by its name; says where it is not known, for then there is no MFU."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    known = peak_tflops(name)
    if known is None and world.is_first:
        _log.info("mfu: the peak of %s is not known; set cost.peak_tflops to its dense bf16 TFLOP/s to see it", name)
    return known


def _memory_bytes(device: torch.device) -> int:
    """The most that this process has had allocated on its GPU, or, on a CPU, resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _pace(number: float) -> str:
    if number >= 100:  # noqa: PLR2004 - three digits
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2g}"  # noqa: PLR2004


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
