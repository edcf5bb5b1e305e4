"""`pixart status`: how far a run is, from any machine that sees its storage, while it goes on or long after."""

import json
import logging
import os
import shlex
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.config import Status as StatusJob
from jobs.trainings import Training, is_checkpoint, is_training
from pixart_data.commits import COMMITS, Record, read_records
from pixart_data.errors import ConfigError, DataError
from pixart_data.pages import printable
from pixart_data.runs import STATUS_FILE, SUMMARY_FILE, Status, advice, duration, event_lines, read_status, size
from pixart_data.storage import exists, list_files, location
from pixart_data.verdicts import Verdicts

log = logging.getLogger(__name__)

_NUM_FAILED = 20
_NUM_SLOWEST = 3


def status(job: StatusJob, dry_run: bool) -> None:
    """Print where the runs at a path stand; `dry_run` says only which there are. Nothing is written.

    Raises:
        ConfigError: If there is no run at the path.
        DataError: If a commit record or a status file is damaged.
    """
    now_unix_s = time.time()
    seen = []
    for root in _roots(job.path):
        if dry_run:
            print(f"status: would read {root}")
            continue
        figures, title, lines = _told(root, now_unix_s)
        seen.append(figures)
        if not job.as_json:
            print(f"{title} -> {root}")
            for label, text in lines:
                print(f"  {label:9} {printable(text)}")
    if job.as_json and not dry_run:
        print(json.dumps({"runs": seen}, indent=1))


def _told(root: Path, now_unix_s: float) -> tuple[dict[str, Any], str, Iterator[tuple[str, str]]]:
    """Return what there is to say of a run: its figures, a title and lines."""
    if is_training(root):
        training = Training.read(root)
        return training.figures(now_unix_s), "train", training.lines(now_unix_s)
    view = _look(root)
    return _figures(view, now_unix_s), _title(view), _lines(view, now_unix_s)


@dataclass(frozen=True)
class _View:
    """What is found in one output directory; `status` is None where no driver of this toolkit's age was at work."""

    root: Path
    status: Status | None
    records: dict[str, Record]


def _roots(path: str) -> list[Path]:
    """Return the output directories at a path: itself, those of a dataset's feature sets, or those of a job file."""
    root = location(_output(Path(path)) if path.endswith(".toml") else path)
    if _is_run(root):
        return [root]
    if is_checkpoint(root):
        run = shlex.quote(str(root.parent))
        raise ConfigError(f"{path}: expected a run, found a checkpoint of one; type pixart status {run}")
    try:
        found = [child for child in sorted(root.iterdir()) if child.is_dir() and _is_run(child)]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    if not found:
        raise ConfigError(
            f"{path}: expected the output of a run, found neither {STATUS_FILE} nor {COMMITS}/ at {root}; give the "
            "directory that the job file names as output, or the job file; of a run that has just begun, try again in "
            "a moment"
        )
    return found


def _output(path: Path) -> str:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a job file: {error}; check the path") from error
    output = tree.get("output", tree.get("path"))  # of a stage's job file, or of this command's own
    if output is None and isinstance(tree.get("run"), dict):
        output = tree["run"].get("output")  # of training's
    if not isinstance(output, str):
        raise ConfigError(f"{path}: output: required, and missing; give the job file of a stage, or a directory")
    return output if "://" in output else os.path.abspath(os.path.expanduser(output))


def _is_run(root: Path) -> bool:
    return exists(root / STATUS_FILE) or bool(list_files(root / COMMITS)) or is_training(root)


def _look(root: Path) -> _View:
    """Read the status before the records: then none of its units lacks a record that is there."""
    try:
        found = read_status(root)
    except DataError as error:
        log.warning("%s", error)
        found = None
    records = read_records(root)
    if found is not None and not found.num_foreign:
        # The records are the truth: a driver that was killed wrote its status up to five seconds before the last one.
        found = found.model_copy(update={"num_done": 0, "rows_in": 0, "rows_out": 0, "rejected": {}, "gate": {}})
        for record in records.values():
            found.count(record)
        failed = {name: unit for name, unit in found.failed.items() if name not in records}
        found = found.model_copy(update={"failed": failed, "num_units": max(found.num_units, len(records))})
    return _View(root, found, records)


def _figures(view: _View, now_unix_s: float) -> dict[str, Any]:
    if view.status is None:
        return {"output": str(view.root), "state": "unknown", **_account(view.records)}
    told = view.status.model_dump(exclude={"timeline", "timeline_every_s", "format", "version"})
    return {"output": str(view.root), **told, **view.status.figures(now_unix_s)}


def _account(records: dict[str, Record]) -> dict[str, Any]:
    status = Status(stage="", first_started_unix_s=0, started_unix_s=0, updated_unix_s=0, num_units=0)
    for record in records.values():
        status.count(record)
    return status.model_dump(include={"num_done", "rows_in", "rows_out", "rejected"})


def _title(view: _View) -> str:
    return view.status.stage if view.status else "a run"


def _lines(view: _View, now_unix_s: float) -> Iterator[tuple[str, str]]:
    status = view.status
    if status is None:
        known = _account(view.records)
        yield "state", f"no {STATUS_FILE} here: only what is committed is known"
        yield "shards", f"{known['num_done']:,} done"
        yield "rows", _rows(known["rows_in"], known["rows_out"], known["rejected"])
        return
    alive = status.is_alive(now_unix_s)
    yield from _state(status, now_unix_s, alive)
    yield from _done(status, alive)
    yield from _pace(status, now_unix_s, alive)
    yield from _trouble(status)
    if exists(view.root / SUMMARY_FILE) and not alive:
        yield "page", f"{view.root / SUMMARY_FILE}"
    steps = advice(status, str(view.root), alive)
    yield from zip(["next", *[""] * len(steps)], steps, strict=False)


def _state(status: Status, now_unix_s: float, alive: bool) -> Iterator[tuple[str, str]]:
    silent = duration(status.silent_s(now_unix_s))
    if status.state == "running":
        seen = f"last sign of life {silent} ago, from {status.driver}"
        doing = "running" if status.num_left or status.num_set_aside else "finishing: every shard is done"
        yield "state", f"{doing}, {seen}" if alive else f"dead: {seen}, at {_time(status.updated_unix_s)}"
    else:
        yield "state", f"{status.state} {silent} ago, at {_time(status.updated_unix_s)}, on {status.driver}"
    if status.error:
        yield "error", status.error
    first = f", the first started at {_time(status.first_started_unix_s)}" if status.num_runs > 1 else ""
    yield "runs", f"{status.num_runs}{first}, the last at {_time(status.started_unix_s)}"


def _done(status: Status, alive: bool) -> Iterator[tuple[str, str]]:
    aside = f", {status.num_set_aside:,} set aside" if status.num_set_aside else ""
    yield "shards", f"{status.num_done:,} of {status.num_units:,} done, {status.num_left:,} left{aside}"
    live = f"; {status.live_rows:,} more in flight" if alive and status.live_rows else ""
    yield "rows", _rows(status.rows_in, status.rows_out, status.rejected) + live
    if status.rejected:
        counts = sorted(status.rejected.items(), key=lambda item: -item[1])
        yield "rejected", ", ".join(f"{reason} {count:,}" for reason, count in counts)
    if status.gate:
        yield "gate", Verdicts.from_facts(status.gate).line().removeprefix("gate: ")
    if status.num_foreign:
        yield "", f"not counted: {status.num_foreign:,} records of other sources, or to be redone"


def _rows(rows_in: int, rows_out: int, rejected: dict[str, int]) -> str:
    return f"{rows_in:,} in = {rows_out:,} out + {sum(rejected.values()):,} rejected"


def _pace(status: Status, now_unix_s: float, alive: bool) -> Iterator[tuple[str, str]]:
    total, left = status.total, status.seconds_left()
    parts = [f"{total.rows_per_s:,.1f} rows/s over {duration(total.elapsed_s)} of work"]
    if alive:
        parts.insert(0, f"{status.ran.rows_per_s:,.1f} in this run")
        if status.rows_per_s_now is not None:
            parts.insert(0, f"{status.rows_per_s_now:,.1f} rows/s now")
    yield "rate", ", ".join(parts)
    if alive and status.num_left:
        until = "unknown yet" if left is None else f"{duration(left)}, until about {_time(now_unix_s + left)}"
        yield "time left", until
    if alive:
        yield "workers", f"{status.num_working} up, {status.num_waiting} starting or waiting for room"
    if total.busy_share is not None:
        yield "model", f"busy {total.busy_share:.0%} of the workers' time, idle {1 - total.busy_share:.0%}"
    peaks = status.peaks
    yield (
        "memory",
        f"at most {size(peaks.worker_bytes)} in a worker, {size(peaks.driver_bytes)} in the driver, "
        f"{size(peaks.object_store_bytes)} in object stores",
    )
    cost, in_all = status.cost(), status.cost_in_all()
    if cost is not None:
        expected = "" if in_all is None or not status.num_left else f", about ${in_all:,.2f} in all"
        hours = f"{total.worker_s / 3600:,.2f} worker-hours at ${status.price_per_hour:,.2f}"
        yield "cost", f"${cost:,.2f} so far{expected} ({hours})"


def _trouble(status: Status) -> Iterator[tuple[str, str]]:
    for label, slow in zip(["slowest", *[""] * _NUM_SLOWEST], status.slowest[:_NUM_SLOWEST], strict=False):
        yield label, f"{slow.unit}: {duration(slow.seconds)} for {slow.rows:,} rows, on {slow.worker}"
    failed = sorted(status.failed.values(), key=lambda unit: (not unit.set_aside, unit.unit))
    for label, unit in zip(["failed", *[""] * _NUM_FAILED], failed[:_NUM_FAILED], strict=False):
        what = "set aside" if unit.set_aside else "to be tried again"
        yield label, f"{unit.unit}: {what} after {unit.attempts} attempt(s): {unit.reason}"
    if len(failed) > _NUM_FAILED:
        yield "", f"and {len(failed) - _NUM_FAILED:,} more"
    for label, line in zip(["events", *[""] * len(status.events)], event_lines(status), strict=False):
        yield label, line


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")
