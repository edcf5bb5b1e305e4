"""Where a run of `pixart train` stands, for `pixart status`: read from its directory, without torch."""

import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pixart_data.errors import DataError
from pixart_data.leases import Holder, last_holder
from pixart_data.runs import duration, size
from pixart_data.storage import exists, matching, read_bytes
from pixart_model.costs import Spent
from pixart_model.journal import METRICS, Journal

_CONFIG, _META, _NONFINITE = "config.toml", "meta.json", "nonfinite.json"
_GO_ON = "go on from the last checkpoint"
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_MOST_ON_A_MACHINE = 8  # GPUs; a run of more processes was on several, and how many is not known here


def is_training(root: Path) -> bool:
    """Tell whether a directory is that of a run of `pixart train`; a checkpoint in it is none."""
    return (exists(root / METRICS) or exists(root / _CONFIG)) and not exists(root / _META)


def is_checkpoint(root: Path) -> bool:
    """Tell whether a directory is a checkpoint in that of a run."""
    return _CHECKPOINT.fullmatch(root.name) is not None and exists(root / _META)


@dataclass(frozen=True)
class Training:
    """A run of `pixart train`.

    Attributes:
        root: Its directory.
        num_steps: That it is to do; None where its job file is not there yet.
        line: The last one of `metrics.jsonl`; empty before there is one.
        saved_step: Of the last checkpoint; None where there is none.
        alarm: What `nonfinite.json` says of the step whose loss or gradient was not finite, if that is how it ended;
            empty otherwise.
        dollars_per_gpu_hour: As its job file has it; None where that is not there yet.
        has_workers: Whether the command itself starts its processes, by its job file: `torchrun` is not needed.
        holder: Who trains, or did last.
    """

    root: Path
    num_steps: int | None
    line: dict[str, Any]
    saved_step: int | None
    alarm: dict[str, Any]
    dollars_per_gpu_hour: float | None
    has_workers: bool
    holder: Holder | None

    @classmethod
    def read(cls, root: Path) -> "Training":
        """Read what a directory says.

        Raises:
            DataError: If a file in it is damaged.
        """
        lines = Journal(root).lines()
        line = lines[-1] if lines else {}
        found = (_CHECKPOINT.fullmatch(path.name) for path in matching(root, "step_*"))
        saved = max((int(match[1]) for match in found if match), default=None)
        job = _table(root / _CONFIG, tomllib.loads)
        alarm = _table(root / _NONFINITE, json.loads)
        is_past = alarm.get("step", 0) <= max(line.get("step", 0), saved or 0)
        is_older = alarm.get("time_unix_s", math.inf) < line.get("time_unix_s", 0.0)
        return cls(
            root,
            job.get("run", {}).get("num_steps"),
            line,
            saved,
            {} if is_past or is_older else alarm,
            job.get("cost", {}).get("dollars_per_gpu_hour"),
            bool(job.get("run", {}).get("num_workers")),
            last_holder(root),
        )

    @property
    def state(self) -> str:
        """`running`, `done`, `failed`, `stopped`, or `dead` where a run was killed."""
        if self.holder is not None and self.holder.is_alive:
            return "running"
        if self.num_steps is not None and (self.saved_step or 0) >= self.num_steps:
            return "done"
        if self.alarm:
            return "failed"
        return "stopped" if self.holder is None or self.holder.released else "dead"

    @property
    def step(self) -> int:
        """The last one that is known to be done."""
        return max(int(self.line.get("step", 0)), self.saved_step or 0)

    def figures(self, now_unix_s: float) -> dict[str, Any]:
        """Return all that is known, for programs: the last line of `metrics.jsonl` and more, units in the names."""
        more = {
            "output": str(self.root),
            "stage": "train",
            "state": self.state,
            "alive": self.state == "running",
            "driver": self.holder.name if self.holder else "",
            "silent_s": self._silent_s(now_unix_s),
            "step": self.step,
            "num_steps": self.num_steps,
            "saved_step": self.saved_step,
            "nonfinite_step": self.alarm.get("step"),
            "dollars_in_all": self._dollars_in_all(),
        }
        return {**self.line, **more}

    def lines(self, now_unix_s: float) -> Iterator[tuple[str, str]]:
        """Yield labels and texts, for people."""
        yield "state", self._state(now_unix_s)
        if self.state == "failed":
            where = self.root / _NONFINITE
            yield (
                "error",
                f"the loss or the gradient of step {self.alarm['step']:,} is not finite; its samples are in {where}",
            )
        of = "" if self.num_steps is None else f" of {self.num_steps:,} ({self.step / self.num_steps:.1%})"
        saved = "no checkpoint yet" if self.saved_step is None else f"the last checkpoint at {self.saved_step:,}"
        yield "steps", f"{self.step:,}{of} done, {saved}"
        if self.line:
            yield from self._last_line(now_unix_s)
        again = self._again()
        if self.state == "failed":
            yield "next", f"{self.alarm.get('advice', 'lower optim.lr, and run the same command again')}: {again}"
        elif self.state == "dead":
            how = "begin anew, for it has no checkpoint yet" if self.saved_step is None else _GO_ON
            yield "next", f"it was killed; to {how}: {again}"
        elif self.state == "stopped":
            yield "next", f"it was stopped; to go on where it was: {again}"

    def _again(self) -> str:
        """Return what to type to go on, with as many processes as it had."""
        command = f"pixart train {shlex.quote(str(self.root / _CONFIG))}"
        count = int(self.line.get("num_processes", 1))
        if self.has_workers or count == 1:
            return command
        if count > _MOST_ON_A_MACHINE:
            return f"{command}, with torchrun on each machine as before: it had {count:,} processes"
        return f"torchrun --nproc-per-node {count} --no-python {command}"

    def _state(self, now_unix_s: float) -> str:
        silent_s = self._silent_s(now_unix_s)
        last = "nothing measured yet" if silent_s is None else f"last line {duration(silent_s)} ago"
        holder = f", {'' if self.state == 'running' else 'last '}by {self.holder.name}" if self.holder else ""
        return f"{self.state}, {last}{holder}"

    def _last_line(self, now_unix_s: float) -> Iterator[tuple[str, str]]:
        line = self.line
        yield "loss", f"{line['loss']:.4f}, gradient {line['grad_norm']:.3g}, learning rate {line['lr']:.2g}"
        pace = [f"{line['step_ms']:,.0f} ms a step", f"{line['images_per_s']:,.1f} images/s"]
        if "data_share" in line:
            pace.append(f"{line['data_share']:.0%} of the time waiting for data")
        if "mfu" in line:
            pace.append(f"MFU {line['mfu']:.1%}")
        if "num_processes" in line:
            pace.append(f"{line['num_processes']:,} process(es)")
        yield "rate", ", ".join(pace)
        if self.state == "running" and "seconds_left" in line:
            left_s = line["seconds_left"]
            until = datetime.fromtimestamp(now_unix_s + left_s).strftime("%Y-%m-%d %H:%M:%S")
            yield "time left", f"{duration(left_s)}, until about {until}"
        if "memory_bytes" in line:
            yield "memory", f"at most {size(line['memory_bytes'])} in a process"
        if "gpu_hours" in line:
            in_all = self._dollars_in_all()
            expected = "" if in_all is None or self.state == "done" else f", about ${in_all:,.2f} in all"
            yield "cost", f"{Spent.read(line).text(line.get('device', 'cuda'))} so far{expected}"
        if line.get("skipped"):
            yield "skipped", f"{line['skipped']:,} damaged samples in the last steps were replaced by others"

    def _silent_s(self, now_unix_s: float) -> float | None:
        told = self.line.get("time_unix_s")
        return None if told is None else max(0.0, now_unix_s - float(told))

    def _dollars_in_all(self) -> float | None:
        """What it will have cost: what is spent, and the rest at the pace and on the devices of the last line."""
        line, rate = self.line, self.dollars_per_gpu_hour
        if rate is None or not {"dollars", "seconds_left", "num_processes"} <= line.keys():
            return None
        return float(line["dollars"] + line["seconds_left"] / 3600 * line["num_processes"] * rate)


def _table(path: Path, parse: Any) -> dict[str, Any]:
    """Return what is in a file; nothing where there is none."""
    if not exists(path):
        return {}
    try:
        found = parse(read_bytes(path).decode())
        if not isinstance(found, dict):
            raise TypeError(f"expected a table, found {type(found).__name__}")
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); move it away, and a run writes it anew") from error
    return found
