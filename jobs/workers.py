"""`pixart train` with `run.num_workers`: the training loop in processes that Ray Train starts on a cluster.

Ray finds a GPU for each worker, joins them to a process group and notices when one is lost. The rest is the loop's own:
it writes its checkpoints to the run's directory and goes on from the last one, so that lost workers cost no more than
the steps since then. What the first worker logs is shown here, as if it ran here.
"""

import contextlib
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import OutOfMemoryError
from torch.distributed import DistError

from jobs.ranks import is_one_of_several
from pipelines.cluster import connect
from pipelines.config import Cluster
from pipelines.ending import Stopped, stop_on_sigterm
from pixart_data.errors import ConfigError, JobError, PixArtError
from pixart_data.storage import delete, make_dir, write_atomic
from pixart_model import stops
from pixart_model import train as training
from pixart_model.checkpoint import latest
from pixart_model.config import Run, Train
from pixart_model.parallel import TIMEOUT, Abandoned

log = logging.getLogger(__name__)

_SAVE_S = 270.0  # within the 300 s that a submitted job of train is given to end
_ASK_AGAIN_S = 3.0
_MOST_LOSSES = 3  # in a row, with no checkpoint between them
_START_S = 1800  # a machine that was taken away needs a while to be replaced
_OF_MACHINES = re.compile(r"CUDA (driver )?error|CUBLAS|CUDNN|NCCL|gloo", re.IGNORECASE)
_PACKAGES = ("jobs", "pixart_data", "pixart_model")


def launch(job: Train) -> Path:
    """Train on `run.num_workers` workers of the Ray cluster that RAY_ADDRESS names, or of one on this machine.

    SIGTERM and Ctrl-C reach the workers as the file that asks a run to stop: they save and leave.

    Returns:
        The directory of the last checkpoint.

    Raises:
        ConfigError: If `torchrun` has started this process, or a worker finds the job to be wrong.
        DataError: If a worker finds damaged data.
        JobError: If the cluster is too small or does not answer, workers are lost again and again, they do not save in
            time, or one of them fails so.
        KeyboardInterrupt: After Ctrl-C, when the workers have saved.
    """
    if is_one_of_several():
        raise ConfigError(
            f"run.num_workers: expected 0 under torchrun, which starts the processes itself, found "
            f"{job.run.num_workers}; leave the key out, or type pixart train without torchrun"
        )
    _connect()
    use_gpu = _has_room(job.run)
    run_dir = make_dir(Path(job.run.output))
    handler = signal.getsignal(signal.SIGTERM)
    with (
        tempfile.TemporaryDirectory(prefix=".ray-", dir=run_dir, ignore_cleanup_errors=True) as folder,
        _heard() as voices,
    ):
        stop_on_sigterm()  # after Ray, which has put a handler of its own in place
        try:
            return _persist(lambda: _trainer(job, use_gpu, voices.queue, folder), run_dir, voices)
        finally:
            signal.signal(signal.SIGTERM, handler)


class _Voices(QueueListener):
    """Shows what workers log; `began` is set with their first word."""

    def __init__(self, queue: Any, *handlers: logging.Handler) -> None:
        super().__init__(queue, *handlers, respect_handler_level=True)
        self.began = False

    def handle(self, record: logging.LogRecord) -> None:
        self.began = True
        super().handle(record)

    def dequeue(self, block: bool) -> Any:
        try:
            return super().dequeue(block)
        except RayError:  # the cluster is gone, and nobody is left to be heard
            return None


class _Voice(QueueHandler):
    """Sends what a worker logs to where `_Voices` listens, marked with its rank unless it is the first."""

    def __init__(self, queue: Any, rank: int) -> None:
        super().__init__(queue)
        self._mark = f"[rank {rank}] " if rank else ""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        prepared: logging.LogRecord = super().prepare(record)
        prepared.msg = prepared.message = f"{self._mark}{prepared.getMessage()}"
        return prepared


@contextlib.contextmanager
def _heard() -> Iterator[_Voices]:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # it lives as long
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    voices = _Voices(queue, *logging.getLogger().handlers)
    voices.start()
    try:
        yield voices
    finally:
        with contextlib.suppress(RayError):
            voices.stop()


def _connect() -> None:
    try:
        connect(Cluster())
    except JobError as error:
        raise JobError(str(error).replace("cluster.address", "RAY_ADDRESS", 1)) from error
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_S))


def _has_room(run: Run) -> bool:
    """Return whether workers get GPUs.

    Raises:
        JobError: If the cluster has fewer GPUs, or CPUs, than workers are asked for: Ray would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(resources.get(kind, 0) for resources in nodes)) for kind in ("GPU", "CPU"))
    use_gpu = run.device == "cuda" or (run.device == "auto" and gpus > 0)
    found, kind = (gpus, "GPUs") if use_gpu else (cpus, "CPUs")
    if found < run.num_workers:
        raise JobError(
            f"run.num_workers: expected {run.num_workers} {kind}, one for each worker, found {found} on the nodes that "
            "have joined the cluster; wait for the others (pixart submit does with --nodes N), or lower the key"
        )
    return use_gpu


def _trainer(job: Train, use_gpu: bool, queue: Any, folder: str) -> TorchTrainer:
    levels = {name: logging.getLogger(name).getEffectiveLevel() for name in _PACKAGES}
    return TorchTrainer(
        lambda: _work(job, queue, levels),
        scaling_config=ScalingConfig(num_workers=job.run.num_workers, use_gpu=use_gpu),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        # Ray keeps nothing of ours in its folder; it wants one that all nodes see.
        run_config=RunConfig(
            name="workers", storage_path=folder, failure_config=FailureConfig(controller_failure_limit=0)
        ),
    )


def _work(job: Train, queue: Any, levels: dict[str, int]) -> Path:
    """Train, in a worker: it is one of a process group, in a thread of its own."""
    rank = ray.train.get_context().get_world_rank()
    voice = _Voice(queue, rank)
    for name, level in levels.items():
        quiet = rank > 0 and level > logging.DEBUG
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if quiet else level)
        logging.getLogger(name).addHandler(voice)
    log.info("%d workers have started", job.run.num_workers)
    return training.run(job)


def _persist(trainer: Callable[[], TorchTrainer], run_dir: Path, voices: _Voices) -> Path:
    """Start the workers, and start them again when one is lost, as long as there is progress."""
    saved, losses = latest(run_dir), 0
    while True:
        log.info("starting the workers")
        try:
            return _attend(_start(trainer()), run_dir, voices)
        except (TrainingFailedError, RayError) as error:
            why = _loss(error)
            last = latest(run_dir)
            losses = losses + 1 if last == saved else 1
            saved = last
            if losses == _MOST_LOSSES:
                raise JobError(
                    f"{run_dir}: workers were lost {losses} times and nothing was saved between, at last because: "
                    f"{why}; see the logs of Ray on the nodes, then run the same command again to go on"
                ) from error
            log.warning("%s; all go on from %s", why, saved or "the beginning")


def _start(trainer: TorchTrainer) -> Future[Path]:
    """Run a trainer in a thread: in the main one Ray would take Ctrl-C for itself, and kill."""
    future: Future[Path] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit().return_value)
        except BaseException as error:  # noqa: BLE001 - goes to who waits
            future.set_exception(error)

    threading.Thread(target=fit, name="trainer", daemon=True).start()
    return future


def _attend(future: Future[Path], run_dir: Path, voices: _Voices) -> Path:
    try:
        return future.result()
    except (KeyboardInterrupt, Stopped) as stop:
        if not voices.began:  # nothing is to be saved, and the run there may be another's
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is on its way
        log.info("asked to stop: the workers save, which may take %.0f s", _SAVE_S)
        last = _save(future, run_dir)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return last


def _save(future: Future[Path], run_dir: Path) -> Path:
    """Ask the workers to save and leave, and wait until they have.

    They are asked again and again: a run that is just starting takes the file for one that an earlier run has left.
    """
    deadline_s = time.monotonic() + _SAVE_S
    try:
        while True:
            write_atomic(run_dir / stops.FILE, b"")
            left_s = deadline_s - time.monotonic()
            try:
                return future.result(timeout=max(0.0, min(_ASK_AGAIN_S, left_s)))
            except TimeoutError as error:
                if left_s <= 0:
                    raise JobError(
                        f"{run_dir}: expected the workers to save within {_SAVE_S:.0f} s, found them at it still; run "
                        "the same command again to go on from the checkpoint before"
                    ) from error
    except (TrainingFailedError, RayError) as error:
        raise JobError(f"{run_dir}: stopped, and a worker was lost before it saved: {_loss(error)}") from error
    finally:
        if future.done():
            delete([run_dir / stops.FILE])


def _loss(error: TrainingFailedError | RayError) -> str:
    """Return in a line how workers were lost.

    Raises:
        PixArtError: If a worker found something to be wrong; it would find it again.
        Exception: If a worker has a bug, likewise.
    """
    failures = dict(sorted(error.worker_failures.items())) if isinstance(error, WorkerGroupError) else {}
    for rank, failure in failures.items():
        if isinstance(failure, PixArtError) and not isinstance(failure, Abandoned):
            raise failure from None
        if not _may_pass(failure):
            log.error("worker %d: %s", rank, error)  # with the traceback in the worker
            raise failure
    gone = [rank for rank, failure in failures.items() if _is_of_ray(failure)]
    if gone:
        return f"worker {', '.join(map(str, gone))} died"
    told = [failure for failure in failures.values() if not isinstance(failure, Abandoned)] or [error]
    return " ".join(str(told[0]).split())[:300]


def _may_pass(failure: Exception) -> bool:
    """Whether a failure is of machines, networks and storage, and not of the job: another attempt may do without it.

    Out of memory is none of these: it was too much for the job's batches, and will be again.
    """
    if isinstance(failure, Abandoned | OSError | DistError) or _is_of_ray(failure):
        return True
    is_memory = isinstance(failure, OutOfMemoryError)
    return isinstance(failure, RuntimeError) and not is_memory and _OF_MACHINES.search(str(failure)) is not None


def _is_of_ray(failure: Exception) -> bool:
    """Whether it is Ray that says so, of a process that can say nothing any more; its classes have no public root."""
    return type(failure).__module__.startswith("ray.")
