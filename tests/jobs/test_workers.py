"""What the launcher of workers does about clusters and losses; with real workers: tests/e2e/test_train_ray.py."""

import logging
import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from torch.distributed import DistBackendError

from jobs import workers
from jobs.train import train
from pipelines.ending import Stopped
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_model.config import Run
from pixart_model.parallel import Abandoned
from tests.model.conftest import _own_cache, features, make_job  # noqa: F401 - fixtures

LOST = WorkerGroupError("lost", {0: Abandoned("process 0 of 2: one of them is gone"), 1: ActorDiedError()})


@pytest.fixture
def persist(tmp_path, monkeypatch):
    """Go through a list of ends: an error, or a number of steps after which a checkpoint is there and a worker is lost.

    None is the end of the run; returns what `_persist` does and the number of starts.
    """
    (tmp_path / "run").mkdir()
    saved = []
    monkeypatch.setattr(workers, "latest", lambda run_dir: saved[-1] if saved else None)

    def go(*ends):
        left = list(ends)

        def start(trainer):
            end, future = left.pop(0), Future()
            if isinstance(end, int):
                saved.append(tmp_path / "run" / f"step_{end:08d}")
                end = LOST
            if end is None:
                future.set_result(tmp_path / "last")
            else:
                future.set_exception(end)
            return future

        monkeypatch.setattr(workers, "_start", start)
        voices = SimpleNamespace(began=True)
        try:
            return workers._persist(lambda: None, tmp_path / "run", voices), len(ends) - len(left)
        except BaseException as error:  # noqa: BLE001 - it is what is asked for
            return error, len(ends) - len(left)

    return go


def test_lost_workers_start_again_as_long_as_something_is_saved_between(persist, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jobs")
    ends = [LOST, LOST, 10, LOST, 20, LOST, 30, None]
    assert persist(*ends) == (tmp_path / "last", len(ends))
    assert "worker 1 died; all go on from the beginning" in caplog.text
    assert "worker 1 died; all go on from " + str(tmp_path / "run/step_00000030") in caplog.text


def test_losses_without_progress_end_the_run(persist, tmp_path):
    error, starts = persist(10, LOST, LOST, LOST, None)
    assert starts == 3
    assert isinstance(error, JobError)
    assert str(error).startswith(f"{tmp_path}/run: workers were lost 3 times and nothing was saved between")
    assert "worker 1 died" in str(error)


@pytest.mark.parametrize(
    "failure",
    [
        ConfigError("model.depth: wrong"), DataError("x"), JobError("x"), KeyError("bug"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_would_fail_again_is_not_tried_again(persist, failure):
    error, starts = persist(WorkerGroupError("why", {0: Abandoned("x"), 1: failure}), None)
    assert (error, starts) == (failure, 1)


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("CUDA error: an illegal memory access"), torch.AcceleratorError("CUDA error: unspecified failure"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DistBackendError("the watchdog gave up"),
        RuntimeError("NCCL communicator was aborted"), RuntimeError("[gloo/transport/tcp/pair.cc:547] reset by peer"),
        OSError("input/output error"), ActorDiedError(),
    ],
    ids=repr,
)  # fmt: skip
def test_what_may_pass_is_tried_again(persist, failure):
    assert persist(WorkerGroupError("why", {1: failure}), None)[1] == 2
    assert persist(ControllerError(RuntimeError("workers did not start in time")), None)[1] == 2


def test_a_stop_before_there_is_anything_to_save_leaves_the_run_alone(tmp_path):
    """Its directory may be another run's."""
    asked = Future()
    asked.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        workers._attend(asked, tmp_path, SimpleNamespace(began=False))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def stopping(monkeypatch):
    """A run that is asked to stop as soon as it is waited for; `asked` says what with."""
    handler = signal.getsignal(signal.SIGTERM)
    future = Future()
    result = future.result

    def interrupted(timeout=None):
        if future.asked is not None:
            asked, future.asked = future.asked, None
            raise asked
        return result(timeout)

    future.asked, future.result = KeyboardInterrupt(), interrupted
    yield future
    signal.signal(signal.SIGTERM, handler)


def test_workers_that_do_not_save_in_time_are_left(tmp_path, monkeypatch, stopping):
    monkeypatch.setattr(workers, "_SAVE_S", 0.1)
    with pytest.raises(JobError, match="expected the workers to save within 0 s, found them at it still"):
        workers._attend(stopping, tmp_path, SimpleNamespace(began=True))
    assert (tmp_path / "stop").exists(), "they may still see it"


@pytest.mark.parametrize("asked", [Stopped(), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_run_that_is_just_starting_is_asked_again(tmp_path, monkeypatch, stopping, asked):
    monkeypatch.setattr(workers, "_ASK_AGAIN_S", 0.05)
    stopping.asked = asked
    file = tmp_path / "stop"

    def start_and_leave():
        for _ in range(2):  # the first is taken for that of an earlier run
            while not file.exists():
                time.sleep(0.01)
            file.unlink()
        stopping.set_result(tmp_path / "step_00000001")

    run = threading.Thread(target=start_and_leave)
    run.start()
    if isinstance(asked, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            workers._attend(stopping, tmp_path, SimpleNamespace(began=True))
    else:
        assert workers._attend(stopping, tmp_path, SimpleNamespace(began=True)) == tmp_path / "step_00000001"
    run.join()
    assert not file.exists()


@pytest.mark.parametrize("error", [LOST, ActorDiedError()], ids=lambda error: type(error).__name__)
def test_workers_that_are_lost_while_they_save_do_not_start_again(tmp_path, stopping, error):
    stopping.set_exception(error)
    with pytest.raises(JobError, match="stopped, and a worker was lost before it saved"):
        workers._attend(stopping, tmp_path, SimpleNamespace(began=True))


def nodes(monkeypatch, *resources):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in resources])


def run(num_workers, device="auto"):
    return Run(output="x", num_steps=1, num_workers=num_workers, device=device)


def test_workers_get_gpus_where_there_are_any(monkeypatch):
    nodes(monkeypatch, {"CPU": 4}, {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4})
    assert workers._has_room(run(8))
    assert not workers._has_room(run(20, "cpu"))
    with pytest.raises(JobError, match="expected 9 GPUs, one for each worker, found 8 on the nodes .* with --nodes N"):
        workers._has_room(run(9))
    nodes(monkeypatch, {"CPU": 4})
    assert not workers._has_room(run(4))
    with pytest.raises(JobError, match="expected 1 GPUs, one for each worker, found 0"):
        workers._has_room(run(1, "cuda"))
    with pytest.raises(JobError, match="expected 5 CPUs, one for each worker, found 4"):
        workers._has_room(run(5))


def test_torchrun_and_ray_do_not_both_start_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    job = SimpleNamespace(run=run(8))
    with pytest.raises(ConfigError, match="run.num_workers: expected 0 under torchrun, .* found 8; leave the key out"):
        workers.launch(job)


def test_what_a_worker_logs_is_shown_with_its_rank_and_its_figures():
    lines = queue.SimpleQueue()
    log = logging.getLogger("pixart_model.of_a_worker")
    log.setLevel(logging.INFO)
    log.propagate = False
    seen = []

    class Screen(logging.Handler):
        def emit(self, record):
            seen.append((record.getMessage(), getattr(record, "fields", None)))

    voices = workers._Voices(lines, Screen())
    assert not voices.began
    for rank in (0, 3):
        voice = workers._Voice(lines, rank)
        log.addHandler(voice)
        log.info("step %d at 100%%", rank, extra={"fields": {"step": rank}})
        log.removeHandler(voice)
    voices.start()
    voices.stop()
    assert seen == [("step 0 at 100%", {"step": 0}), ("[rank 3] step 3 at 100%", {"step": 3})]
    assert voices.began


def test_without_ray_it_says_what_to_do(make_job, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "jobs.workers")
    with pytest.raises(ConfigError, match=r"run.num_workers: expected Ray, .* pip install 'pixart-toolkit\[data\]'"):
        train(make_job(run={"num_workers": 2}), dry_run=False)


def test_the_token_is_shown_to_a_running_cluster_only(monkeypatch, tmp_path, make_job):  # noqa: F811
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    seen = []
    monkeypatch.setattr(workers, "launch", lambda job: seen.append(os.environ.get("RAY_AUTH_MODE")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    train(make_job(run={"num_workers": 2}), dry_run=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    train(make_job(run={"num_workers": 2}), dry_run=False)
    assert seen == [None, "token"]
    monkeypatch.delenv("RAY_AUTH_MODE")
