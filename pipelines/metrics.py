"""Figures of a run for Ray's dashboard and for Prometheus, which both read them from Ray's metrics endpoint.

Ray prefixes every name with `ray_` and counters end in `_total`: `ray_pixart_rows_total`. All carry the tags `stage`
and `output`. They are published by the driver: a handful of series for a run, whatever the number of workers.
"""

from collections import Counter as Counts
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge

from pixart_data.runs import Status

_TAGS = ("stage", "output")
_GAUGES = {
    "shards": ("Shards by state: done, left, set_aside", ("state",)),
    "workers": ("Workers by state: working, waiting", ("state",)),
    "rows_per_second": ("Rows per second over the last minute", ()),
    "model_busy_share": ("Share of their time that workers spend inside the model, 0 to 1", ()),
    "seconds_left": ("Seconds until the run is done, at its present pace", ()),
    "cost_dollars": ("What the workers of all runs of this output have cost so far", ()),
    "object_store_bytes": ("Bytes in Ray's object stores, all nodes", ()),
    "peak_memory_bytes": ("Largest resident memory seen, by process: worker, driver", ("process",)),
}
_COUNTERS = {
    "rows": ("Rows done by this driver, rejected ones included", ()),
    "rejected_rows": ("Rows rejected in this driver's units, by reason", ("reason",)),
    "events": ("What went wrong and was mended, by kind", ("kind",)),
}


class Metrics:
    """The metrics of one run. Nothing is published while this process is not connected to Ray."""

    def __init__(self, stage: str, output: str) -> None:
        self._tags = {"stage": stage, "output": output}
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        self._counted: Counts[tuple[str, str]] = Counts()

    def publish(self, status: Status, rejected: Mapping[str, int], events: Mapping[str, int]) -> None:
        """Bring Ray's metrics up to the status.

        Args:
            rejected: Rows rejected in the units of this driver, by reason.
            events: Events of this driver, by kind.
        """
        if not ray.is_initialized():
            return
        if not self._gauges:
            self._gauges = {name: _metric(Gauge, name, *about) for name, about in _GAUGES.items()}
            self._counters = {name: _metric(Counter, name, *about) for name, about in _COUNTERS.items()}
        for state, count in (
            ("done", status.num_done),
            ("left", status.num_left),
            ("set_aside", status.num_set_aside),
        ):
            self._set("shards", count, state=state)
        self._set("workers", status.num_working, state="working")
        self._set("workers", status.num_waiting, state="waiting")
        self._set("rows_per_second", status.rows_per_s_now or 0.0)
        self._set("model_busy_share", status.this_run.busy_share)
        self._set("seconds_left", status.seconds_left())
        self._set("cost_dollars", status.cost())
        self._set("peak_memory_bytes", status.peaks.worker_bytes, process="worker")
        self._set("peak_memory_bytes", status.peaks.driver_bytes, process="driver")
        self._set("object_store_bytes", object_store_bytes())
        self._count("rows", "", status.this_run.rows)
        for reason, count in rejected.items():
            self._count("rejected_rows", reason, count, reason=reason)
        for kind, count in events.items():
            self._count("events", kind, count, kind=kind)

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        if value is not None:
            self._gauges[name].set(value, {**self._tags, **tags})

    def _count(self, name: str, which: str, count: int, **tags: str) -> None:
        """Raise a counter to `count`: Ray's own take increments."""
        increment = count - self._counted[name, which]
        if increment > 0:
            self._counters[name].inc(increment, {**self._tags, **tags})
            self._counted[name, which] = count


def object_store_bytes() -> int | None:
    """Return the bytes in the object stores of all nodes; None while Ray does not say."""
    if not ray.is_initialized():
        return None
    try:
        in_all = ray.cluster_resources().get("object_store_memory", 0.0)
        free = ray.available_resources().get("object_store_memory", 0.0)
    except (RayError, RuntimeError, OSError):  # the head is away: a figure is no reason to stop
        return None
    return max(int(in_all - free), 0)


def _metric(kind: Any, name: str, description: str, tags: tuple[str, ...]) -> Any:
    return kind(f"pixart_{name}", description, tag_keys=(*_TAGS, *tags))
