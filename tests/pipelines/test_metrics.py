"""Figures as Prometheus reads them: from the metrics endpoint of a real Ray."""

import re
import time
import urllib.request

import numpy as np
import pytest

from pipelines.metrics import Metrics, object_store_bytes
from pixart_data.runs import FailedUnit, Peaks, Status, Tally


def status(**known):
    times = {"first_started_unix_s": 0, "started_unix_s": 0, "updated_unix_s": 0}
    return Status(stage="caption", num_units=10, **times, **known)


def scrape():
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def value(text, name, **tags):
    """The value of the one series with this name and these tags; None if it is not there."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"{name}{{(.*)}} (\S+)$", line)
        if match and all(f'{tag}="{value}"' in match[1] for tag, value in tags.items()):
            found.append(float(match[2]))
    assert len(found) <= 1, found
    return found[0] if found else None


def test_prometheus_reads_the_figures_from_ray(ray_here):
    metrics = Metrics("caption", "out/a")
    metrics.publish(status(), {}, {})
    told = status(
        num_done=3,
        num_working=2,
        num_waiting=1,
        rows_per_s_now=12.5,
        price_per_hour=2.0,
        rows_expected=1000,
        rows_in=300,
        this_run=Tally(rows=300, units=3, elapsed_s=30, worker_s=60, busy_s=45, span_s=60),
        failed={"b": FailedUnit(unit="b", attempts=3, reason="x", set_aside=True)},
        peaks=Peaks(worker_bytes=5_000_000),
    )
    metrics.publish(told, {"too_large": 4}, {"worker_died": 2})
    metrics.publish(told, {"too_large": 6}, {"worker_died": 2})  # counters hold totals, not sums of what was told
    Metrics("caption", "out/b").publish(status(num_done=9), {}, {})

    wanted = {
        ("ray_pixart_shards", "state", "done"): 3,
        ("ray_pixart_shards", "state", "left"): 6,
        ("ray_pixart_shards", "state", "set_aside"): 1,
        ("ray_pixart_workers", "state", "working"): 2,
        ("ray_pixart_workers", "state", "waiting"): 1,
        ("ray_pixart_rows_per_second", "stage", "caption"): 12.5,
        ("ray_pixart_model_busy_share", "stage", "caption"): 0.75,
        ("ray_pixart_seconds_left", "stage", "caption"): told.seconds_left(),
        ("ray_pixart_cost_dollars", "stage", "caption"): told.cost(),
        ("ray_pixart_peak_memory_bytes", "process", "worker"): 5_000_000,
        ("ray_pixart_rows_total", "stage", "caption"): 300,
        ("ray_pixart_rejected_rows_total", "reason", "too_large"): 6,
        ("ray_pixart_events_total", "kind", "worker_died"): 2,
    }
    deadline_s = time.monotonic() + 60  # Ray's processes report every ten seconds
    while True:
        text = scrape()
        found = {key: value(text, key[0], output="out/a", **{key[1]: key[2]}) for key in wanted}
        if found == pytest.approx(wanted):
            break
        assert time.monotonic() < deadline_s, found
        time.sleep(0.5)
    assert value(text, "ray_pixart_shards", output="out/b", state="done") == 9
    assert value(text, "ray_pixart_object_store_bytes", output="out/a") >= 0


def test_bytes_in_the_object_store_are_those_of_its_objects(ray_here):
    import ray

    before = object_store_bytes()
    reference = ray.put(np.zeros(20 << 20, np.uint8))
    deadline_s = time.monotonic() + 20
    while object_store_bytes() - before < 20 << 20:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert object_store_bytes() - before < 21 << 20
    del reference


def test_without_ray_nothing_is_published(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    metrics = Metrics("caption", "out")
    metrics.publish(status(), {}, {})
    assert metrics._gauges == {}
    assert object_store_bytes() is None
