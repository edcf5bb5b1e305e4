"""Training by workers that Ray Train starts: the same run as anywhere else, through lost workers and a stop."""

import json
import logging
import os
import signal
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs import workers
from pixart_data.errors import ConfigError
from pixart_model import checkpoint
from pixart_model import train as training
from tests.model.conftest import _one_thread, _own_cache, features, make_job  # noqa: F401 - fixtures

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(autouse=True)
def _heard_here(monkeypatch, caplog):
    """What workers log is shown by the handlers of the root; pytest's is there when a test runs."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    caplog.set_level(logging.INFO)


def own_workers():
    """The processes of the Ray that this process has started."""
    return [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()]


class Hand:
    """Does something, once, as soon as a text was logged that often."""

    def __init__(self, caplog, text, count, act):
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(caplog, text, count, act), daemon=True)
        self._thread.start()

    def _watch(self, caplog, text, count, act):
        deadline_s = time.monotonic() + 400
        while time.monotonic() < deadline_s:
            if caplog.text.count(text) >= count:
                self._done.set()
                act()
                return
            time.sleep(0.02)

    def has_acted(self):
        self._thread.join(1)
        return self._done.is_set()


def steps_of(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_lost_a_worker_and_was_stopped_ends_as_that_of_one_process(make_job, tmp_path, caplog):  # noqa: F811
    data, run = {"batches_per_step": 2}, {"num_workers": 2, "save_every": 5, "log_every": 1}
    run_dir, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    killed = Hand(caplog, "saved", 1, lambda: own_workers()[-1].kill())
    stopped = Hand(caplog, "continuing from", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    left = workers.launch(make_job(data=data, run={**run, "num_steps": 5_000}))
    assert killed.has_acted()
    assert stopped.has_acted()
    assert f"died; all go on from {run_dir}/step_" in caplog.text
    assert "asked to stop: the workers save" in caplog.text
    assert "left at step" in caplog.text
    assert left == checkpoint.latest(run_dir)
    assert signal.getsignal(signal.SIGTERM) == before
    reached = checkpoint.read_meta(left).step
    assert reached < 5_000

    num_steps = reached + 2
    last = workers.launch(make_job(data=data, run={**run, "num_steps": num_steps}))
    straight = training.run(make_job(data=data, run={"num_steps": num_steps, "output": str(tmp_path / "straight")}))
    assert checkpoint.read_meta(last).step == num_steps
    for file in ("model.safetensors", "ema.safetensors"):
        ours, theirs = load_file(last / file), load_file(straight / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert steps_of(run_dir) == list(range(1, num_steps + 1))
    assert not list(run_dir.glob(".ray-*"))
    assert not (run_dir / "stop").exists()


def test_what_a_worker_finds_to_be_wrong_is_the_command_s_own_error_at_once(make_job, caplog):  # noqa: F811
    job = make_job(data={"batches_per_step": 3}, run={"num_workers": 2})
    with pytest.raises(ConfigError, match="data.batches_per_step: expected a multiple of the 2 processes"):
        workers.launch(job)
    assert caplog.text.count("starting the workers") == 1
    assert "[rank 1]" not in caplog.text
