"""Training from feature shards: `run(job)` starts, continues or recognises a finished run, alone or as one of several.

Step k trains on batches k G to k G + G - 1 of the order of the seed, and what is random about a batch is drawn from the
seed and its number. So a run that was stopped and continued gives the same weights as one that was not: bit for bit on
a CPU, up to the order of sums on a GPU or with another number of processes.
"""

import contextlib
import copy
import logging
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixart_data.config import resolved_toml
from pixart_data.errors import ConfigError
from pixart_data.leases import Lease, output_lock
from pixart_data.storage import make_dir, write_atomic
from pixart_model import beginnings, checkpoint, steps
from pixart_model.config import Train
from pixart_model.dataset import Dataset, open_dataset
from pixart_model.devices import resolve_dtype
from pixart_model.diffusion import Diffusion
from pixart_model.grid import Painter
from pixart_model.metrics import Meter
from pixart_model.networks import Network, build
from pixart_model.nulls import NullCaption
from pixart_model.parallel import World, distribute, joined, shard
from pixart_model.savers import Saver
from pixart_model.states import restore
from pixart_model.steps import Setting, State, learning_rate, train_step
from pixart_model.stops import Wish, heeded

_log = logging.getLogger(__name__)


def run(job: Train) -> Path:
    """Train until `run.num_steps`, from the last checkpoint in `run.output` if there is one.

    On SIGTERM, or when there is a file `stop` in the run's directory, it saves and returns; the same call goes on.

    Returns:
        The directory of the last checkpoint.

    Raises:
        ConfigError: If the job does not fit the features, or the run in `run.output` is of another model or data.
        DataError: If features or a checkpoint are damaged.
        JobError: If the loss is not finite, the storage fails, another run holds the output, or a process is lost.
        KeyboardInterrupt: After Ctrl-C, with everything saved.
    """
    with joined(job.run) as world:
        return _run(job, world)


def _run(job: Train, world: World) -> Path:
    run_dir = Path(job.run.output)
    with contextlib.ExitStack() as stack:
        with world.agreed():
            lease = stack.enter_context(output_lock(make_dir(run_dir))) if world.is_first else None
            last = checkpoint.latest(run_dir) if world.is_first else None
        last = world.first(last)
        with world.agreed():
            dataset = stack.enter_context(contextlib.closing(_open(job, world)))
            done = 0 if last is None else _steps_done(job, dataset, last)
        if last is not None and done >= job.run.num_steps:
            _log.info("%s: finished: %d of %d steps; nothing to do", run_dir, done, job.run.num_steps)
            return last
        with world.agreed():
            network, null = _begin(job, dataset, last, world)
        setting = _setting(job, dataset, null, world)
        state = _start(network, job, world)
        if last is not None:
            _restore(state, last, job, world)
        with world.agreed():
            if world.is_first:
                write_atomic(run_dir / checkpoint.CONFIG, resolved_toml(job).encode())
        return _loop(state, setting, dataset, _Output(run_dir, lease))


@dataclass(frozen=True)
class _Output:
    """The run's directory, and the lease on it, which the first process holds."""

    run_dir: Path
    lease: Lease | None


def _loop(state: State, setting: Setting, dataset: Dataset, output: _Output) -> Path:
    job, world, run_dir = setting.job, setting.world, output.run_dir
    painter = Painter(job, dataset, setting.null, world, run_dir) if job.grid.num_images else None
    meter = Meter(run_dir, job, world, state.step)  # its clock starts here
    meter.rewind()
    first, pinned = state.step * job.data.batches_per_step, world.device.type == "cuda"
    _log.info("%s: step %d of %d, %s", run_dir, state.step, job.run.num_steps, _machines(world, job))
    with (
        heeded(run_dir, world) as stops,
        contextlib.closing(Saver(run_dir, job.run.keep_last, world)) as saver,
        contextlib.closing(dataset.batches(first, world.rank, world.size, pinned)) as batches,
    ):
        while True:
            outcome = train_step(state, batches, setting)
            meter.add(outcome)
            wish = stops.asked()
            ends = wish != Wish.GO_ON or state.step == job.run.num_steps
            saves = ends or state.step % job.run.save_every == 0
            if ends or state.step % job.run.log_every == 0:
                meter.write(learning_rate(job.optim, state.step - 1))
            if saves:
                meter.check()
                with meter.paused():
                    last = _save(state, setting, dataset, output, saver)
            if painter and not wish and painter.is_due(state.step, saves):  # who asks to leave may not wait for long
                with meter.paused():
                    meter.show(painter.draw(state.ema, state.step))
            if ends:
                saver.wait()
                meter.conclude()
                stops.forget()
                return _leave(last, wish, state, setting)


def _open(job: Train, world: World) -> Dataset:
    """Open what is trained on, after what can be checked without it."""
    count = job.data.batches_per_step
    if count % world.size:
        more = world.size * -(-count // world.size)
        raise ConfigError(
            f"data.batches_per_step: expected a multiple of the {world.size} processes, for each to have as many "
            f"batches, got {count}; set data.batches_per_step = {more}, or start another number of processes"
        )
    classes = job.model.num_classes if job.model.condition == "class" else None
    dataset = open_dataset(job.data, job.run.seed, classes)
    with contextlib.ExitStack() as stack:
        stack.callback(dataset.close)
        dataset.require(job.model)
        stack.pop_all()
    return dataset


def _begin(job: Train, dataset: Dataset, last: Path | None, world: World) -> tuple[Network, NullCaption | None]:
    """Return the model that a new run begins with, and the null caption, which belongs to the run from then on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.run.seed)
        network = build(job.model, job.run.grad_checkpointing)
    null = None
    if last is None:
        null = beginnings.begin(job.init, network, dataset.facts())
    elif job.model.condition == "caption":
        null = checkpoint.load_null_caption(last)
    if null is None and job.model.condition == "caption":
        null = NullCaption(dataset.null_caption())
    return network.to(world.device), null and null.to(world.device)


def _setting(job: Train, dataset: Dataset, null: NullCaption | None, world: World) -> Setting:
    vae, device = dataset.images.manifest.model, world.device
    return Setting(
        job,
        world,
        resolve_dtype(job.run.dtype, device),
        Diffusion(device),
        float(vae["scaling_factor"]),
        float(vae.get("shift_factor") or 0.0),
        null,
        traced=world.first(steps.log.isEnabledFor(logging.DEBUG)),
    )


def _start(network: Network, job: Train, world: World) -> State:
    optim = job.optim
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    if job.run.compile:
        network.compile_blocks()
    spread = distribute(network, world, job.run)
    if spread is network and world.size > 1:
        shard(ema, world, torch.float32)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=world.device.type == "cuda",
    )
    return State(network, spread, ema, optimizer)


def _restore(state: State, last: Path, job: Train, world: World) -> None:
    """Go on from a checkpoint; what the job says of the optimizer holds from here on."""
    restore(last, state.model, state.ema, state.optimizer, world)
    state.step = checkpoint.read_meta(last).step
    _log.info("continuing from %s", last)
    for key, (before, now) in _changes(last, job).items():
        _log.info("%s: %s until step %d, %s from here on", key, before, state.step, now)


def _changes(last: Path, job: Train) -> dict[str, tuple[Any, Any]]:
    """Return what the job file says otherwise than the one that a checkpoint was written under, by key."""
    before, now = (_flat(tomllib.loads(text)) for text in ((last / checkpoint.CONFIG).read_text(), resolved_toml(job)))
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _steps_done(job: Train, dataset: Dataset, last: Path) -> int:
    """Return the steps of the run that `last` belongs to; it must be the run of this job."""
    meta = checkpoint.read_meta(last)
    wanted = _resumes(job, dataset)
    for key, value in wanted.items():
        found = meta.resumes.get(key)
        if found != value:
            advice = "choose another run.output, or the run's own setting"
            if key in ("data.image_set", "data.text_set"):
                advice = "the set is another, or was written anew since: choose another run.output"
            raise ConfigError(f"{key}: this job has {value}, the run in {job.run.output} has {found}; {advice}")
    return meta.step


def _resumes(job: Train, dataset: Dataset) -> dict[str, Any]:
    """What decides the weights' shapes and the order of samples, so cannot change inside a run."""
    model = {f"model.{key}": value for key, value in job.model.model_dump(exclude={"size"}).items()}
    own = {"data.batches_per_step": job.data.batches_per_step, "run.seed": job.run.seed}
    return model | dataset.order_facts() | own


def _save(state: State, setting: Setting, dataset: Dataset, output: _Output, saver: Saver) -> Path:
    job, world = setting.job, setting.world
    with world.agreed():
        if output.lease is not None:
            output.lease.check()
    batch = state.step * job.data.batches_per_step
    meta = checkpoint.Meta(
        state.step,
        job.model.model_dump(),
        dataset.facts(),
        _resumes(job, dataset),
        position={"seed": job.run.seed, "step": state.step, "batch": batch},
        world={"size": world.size, "parallel": job.run.parallel, "dtype": str(setting.dtype).removeprefix("torch.")},
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    return saver.save(meta, state.model, state.ema, state.optimizer, setting.null, resolved_toml(job))


def _leave(last: Path, wish: Wish, state: State, setting: Setting) -> Path:
    run = setting.job.run
    if state.step < run.num_steps:
        _log.info(
            "%s: left at step %d of %d as asked, all of it saved in %s; the same command goes on from there",
            run.output, state.step, run.num_steps, last.name,
        )  # fmt: skip
        if wish == Wish.INTERRUPT:
            raise KeyboardInterrupt
    return last


def _machines(world: World, job: Train) -> str:
    alone = f"on {world.device.type}"
    if world.size == 1:
        return alone
    return f"{alone}, {world.size} processes ({job.run.parallel})"
