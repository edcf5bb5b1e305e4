"""What a run says of itself: one line of `metrics.jsonl` and one log line every few steps."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pixart_data.errors import DataError, JobError
from pixart_data.retries import storage
from pixart_data.storage import write_atomic

METRICS = "metrics.jsonl"
_log = logging.getLogger(__name__)


@dataclass
class Meter:
    """Collects steps without waiting for the device, and writes their means.

    Attributes:
        run_dir: Where `metrics.jsonl` is.
        step: The last step collected.
        num_steps: Of the whole run.
    """

    run_dir: Path
    step: int
    num_steps: int
    _losses: list[Tensor] = field(default_factory=list)
    _grad_norms: list[Tensor] = field(default_factory=list)
    _images: int = 0
    _data_s: float = 0.0
    _skipped: int = 0
    _skipped_before: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def rewind(self) -> None:
        """Drop the lines of steps after this one, which a run that was cut short wrote and this run will repeat.

        Raises:
            DataError: If the file is not one of metrics.
        """
        path = self.run_dir / METRICS
        if not path.exists():
            return
        try:
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last line
            kept = [line for line in whole if json.loads(line)["step"] <= self.step]
            self._skipped_before = sum(json.loads(line).get("skipped", 0) for line in kept)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a file of metrics ({error}); move it away and run again") from error
        if len(kept) < len(lines):
            write_atomic(path, "".join(kept).encode())

    def add(self, loss: Tensor, grad_norm: Tensor, images: int, data_s: float, skipped: int = 0) -> None:
        """Collect a step: tensors of one number each, the seconds it waited for data, and samples it had to replace."""
        self.step += 1
        self._losses.append(loss.detach())
        self._grad_norms.append(grad_norm.detach())
        self._images += images
        self._data_s += data_s
        self._skipped += skipped

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, such as saving, out of the time of a step."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def check(self) -> None:
        """Wait for the device and look at what was collected.

        Raises:
            JobError: Naming the first step whose loss or gradient is not finite.
        """
        if not self._losses:
            return
        both = torch.stack([torch.stack(self._losses), torch.stack(self._grad_norms)]).float().cpu()  # (2, steps)
        bad = (~both.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            loss, grad_norm = both[:, bad[0]].tolist()
            step = self.step - len(self._losses) + 1 + bad[0]
            raise JobError(
                f"step {step}: expected a finite loss and gradient, found {loss} and {grad_norm}; "
                "lower optim.lr or set run.dtype = 'fp32', and continue from the last checkpoint"
            )

    def write(self, lr: float) -> None:
        """Write the means since the last call; raises JobError as `check` does, or if the storage fails."""
        self.check()
        seconds, steps = time.perf_counter() - self._since, len(self._losses)
        line = {
            "step": self.step,
            "loss": float(torch.stack(self._losses).mean()),
            "grad_norm": float(torch.stack(self._grad_norms).mean()),
            "lr": lr,
            "step_ms": 1000 * seconds / steps,
            "data_ms": 1000 * self._data_s / steps,
            "images_per_s": self._images / seconds,
            "skipped": self._skipped,
        }
        path = self.run_dir / METRICS
        with storage(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._say(line)
        self._skipped_before += self._skipped
        self._losses, self._grad_norms, self._images, self._data_s, self._skipped = [], [], 0, 0.0, 0
        self._since = time.perf_counter()

    def conclude(self) -> None:
        """Say what the whole run, the parts before a restart included, had to do without."""
        if self._skipped_before:
            _log.warning(
                "%s: damaged samples came up %d times, and others of their batches took their places; `skipped` in %s "
                "says in which steps, `pixart verify` on the features names them",
                self.run_dir, self._skipped_before, METRICS,
            )  # fmt: skip

    def _say(self, line: dict[str, float]) -> None:
        left_s = (self.num_steps - self.step) * line["step_ms"] / 1000
        digits = max(6, len(str(self.num_steps)))
        parts = (
            f"step {self.step:0{digits}d}/{self.num_steps:0{digits}d} {self.step / self.num_steps:.1%}",
            f"loss {line['loss']:.4f}",
            f"grad {line['grad_norm']:.3g}",
            f"lr {line['lr']:.1e}",
            f"{line['step_ms']:.0f} ms",
            f"data {line['data_ms']:.0f} ms",
            f"{line['images_per_s']:.3g} img/s",
            f"eta {_duration(left_s)}",
        )
        _log.info(" | ".join(parts))


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
