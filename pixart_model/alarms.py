"""The alarm of a loss or a gradient that is not finite: which step it was, and which samples it trained on.

The numbers of a step are looked at when the next one has been queued, so that the device never waits for the host. By
then one more step has been done on weights that may be spoilt, which does no harm: no checkpoint is written before the
last step has been looked at.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixart_data.errors import JobError, PixArtError

if TYPE_CHECKING:
    from pixart_model.batches import Names

NONFINITE = "nonfinite.json"
_MOST_NAMED = 16


class Reading:
    """The loss and the norm of the gradient of a step, on their way to the host."""

    def __init__(self, loss: Tensor, grad_norm: Tensor) -> None:
        both = torch.stack([loss.detach().float(), grad_norm.detach().float()])  # (2,)
        self._event: torch.cuda.Event | None = None
        if both.device.type == "cuda":
            self._host = torch.empty(2, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = both.clone()

    def values(self) -> tuple[float, float]:
        """Wait until they are there, and return them."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm = self._host.tolist()
        return loss, grad_norm


def are_finite(values: tuple[float, float]) -> bool:
    """Tell whether training can go on."""
    return all(map(math.isfinite, values))


def suspects(rank: int, numbers: Sequence[int], losses: Sequence[Tensor], names: "Sequence[Names]") -> list[Any]:
    """Return what is known of the batches of one process, for JSON; waits for the device.

    Args:
        rank: Of the process.
        numbers: Of the batches, in the global order.
        losses: Of each batch: one number, or (B,), one for each sample.
        names: Of the samples of each batch.
    """
    found = []
    for number, loss, one in zip(numbers, losses, names, strict=True):
        values = loss.detach().float().flatten().tolist()
        try:
            keys = one.keys()
        except (PixArtError, OSError) as error:  # all processes have to hear of the step, whatever this one can read
            keys = [f"(the keys of batch {number} cannot be read: {error})"]
        bad = [key for key, value in zip(keys, values, strict=False) if not math.isfinite(value)]
        narrowed = len(values) == len(keys) and bool(bad)
        found.append(
            {
                "rank": rank,
                "batch": number,
                "finite": all(map(math.isfinite, values)),
                "loss": _plain(values if len(values) > 1 else values[0]),
                "keys": bad if narrowed else keys,
                "batch_keys": keys,
            }
        )
    return found


def advice(dtype: torch.dtype, has_checkpoint: bool) -> str:
    """Return what to do about it.

    Args:
        dtype: Of the run's arithmetic.
        has_checkpoint: Whether there is one to go on from.
    """
    change = "lower optim.lr or set run.dtype = 'fp32'"
    if dtype == torch.float32:
        change = "lower optim.lr, raise optim.warmup_steps, or look at the samples that are named"
    where = "go on from the last checkpoint" if has_checkpoint else "begin anew, for it has no checkpoint yet"
    return f"{change}, and run the same command again to {where}"


def failure(
    run_dir: Path, step: int, values: tuple[float, float], lr: float | None, batches: list[Any], advised: str
) -> tuple[JobError, bytes]:
    """Return the error to stop with, and all that is known, for `nonfinite.json`.

    Args:
        run_dir: The run's directory.
        step: Which step it was.
        values: Its loss and the norm of its gradient.
        lr: Its learning rate, where it is known.
        batches: What `suspects` found on all processes.
        advised: What to do about it.
    """
    bad = [batch for batch in batches if not batch["finite"]] or batches  # a gradient alone: any of them
    keys = [key for batch in bad for key in batch["keys"]]
    known = {
        "step": step, "loss": _plain(values[0]), "grad_norm": _plain(values[1]), "lr": lr, "advice": advised,
        "time_unix_s": round(time.time(), 3), "keys": keys, "batches": batches,
    }  # fmt: skip
    named = ", ".join(keys[:_MOST_NAMED]) + (f" and {len(keys) - _MOST_NAMED:,} more" if keys[_MOST_NAMED:] else "")
    error = JobError(
        f"step {step}: expected a finite loss and gradient, found {values[0]} and {values[1]}, of {named} (all in "
        f"{run_dir / NONFINITE}); {advised}"
    )
    return error, json.dumps(known, indent=1).encode()


def _plain(values: Any) -> Any:
    """What JSON has no number for, as text."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return values if math.isfinite(values) else str(values)
