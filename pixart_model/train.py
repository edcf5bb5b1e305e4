"""Training from feature shards: `run(job)` starts, continues or recognises a finished run, alone or as one of several.

Step k trains on batches k G to k G + G - 1 of the order of the seed, and what is random about a batch is drawn from the
seed and its number. So a run that was stopped and continued gives the same weights as one that was not: bit for bit on
a CPU, up to the order of sums on a GPU, with another number of processes, or with three and more of DDP, which sums the
gradients of its first step in another order than those of later ones.
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
from pixart_model import beginnings, checkpoint, weights
from pixart_model.config import Init, Train
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
from pixart_model.steps import Setting, State, train_step
from pixart_model.stops import Stops, Wish, heeded
from pixart_model.traces import Trace

_MOST_LEFT, _LITTLE_LEFT = 0.05, 0.01  # of what the moving average began with: worth a word, and as good as none
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
            stops = stack.enter_context(heeded(run_dir, world))
            last = checkpoint.latest(run_dir) if world.is_first else None
            init = _resolved(job.init) if world.is_first and last is None else job.init
        last, init = world.first((last, init))
        with world.agreed():
            dataset = stack.enter_context(contextlib.closing(_open(job, world)))
            done = 0 if last is None else steps_done(job, dataset, last)
        if last is not None and done >= job.run.num_steps:
            _log.info("%s", finished(job, done))
            return last
        with world.agreed():
            network, null = _begin(job, init, dataset, last, world)
        setting = _setting(job, dataset, null, world)
        state = _start(network, job, world)
        if last is not None:
            _restore(state, last, job, world)
        with world.agreed():
            if world.is_first:
                write_atomic(run_dir / checkpoint.CONFIG, resolved_toml(job).encode())
        return _loop(state, setting, dataset, _Output(run_dir, lease, stops))


@dataclass(frozen=True)
class _Output:
    """The run's directory, the lease on it, which the first process holds, and who asks the run to leave."""

    run_dir: Path
    lease: Lease | None
    stops: Stops


def _loop(state: State, setting: Setting, dataset: Dataset, output: _Output) -> Path:
    job, world, run_dir, stops = setting.job, setting.world, output.run_dir, output.stops
    painter = Painter(job, dataset, setting.null, world, run_dir) if job.grid.num_images else None
    meter = Meter(run_dir, job, world, state.step)  # its clock starts here
    meter.rewind()
    trace = Trace(run_dir, job, world, state.step)
    first, pinned = state.step * job.data.batches_per_step, world.device.type == "cuda"
    for warning in slow_average(job) if world.is_first else ():
        _log.warning("%s", warning)
    _log.info("%s: step %d of %d, %s", run_dir, state.step, job.run.num_steps, _machines(world, job))
    with (
        contextlib.closing(Saver(run_dir, job.run.keep_last, world)) as saver,
        contextlib.closing(dataset.batches(first, world.rank, world.size, pinned)) as batches,
    ):
        wish, last = stops.asked(), None  # before the first step: starting takes minutes
        while not wish and state.step < job.run.num_steps:
            outcome = train_step(state, batches, setting)
            meter.add(outcome)
            trace.add(state.step, outcome.names)
            wish = stops.asked()
            ends = wish != Wish.GO_ON or state.step == job.run.num_steps
            saves = ends or state.step % job.run.save_every == 0
            if ends or state.step % job.run.log_every == 0:
                meter.write()
            if saves:
                meter.check()
                with meter.paused():
                    last = _save(state, setting, dataset, output, saver)
            if painter and not wish and painter.is_due(state.step, saves):  # who asks to leave may not wait for long
                with meter.paused():
                    meter.show(painter.draw(state.ema, state.step))
        last = last or _save(state, setting, dataset, output, saver)
        saver.wait()
        meter.conclude()
        stops.forget()
        return _leave(last, wish, state, setting)


def _open(job: Train, world: World) -> Dataset:
    """Open what is trained on, after what can be checked without it."""
    require_shares(job, world.size)
    classes = job.model.num_classes if job.model.condition == "class" else None
    dataset = open_dataset(job.data, job.run.seed, classes)
    with contextlib.ExitStack() as stack:
        stack.callback(dataset.close)
        dataset.require(job.model)
        stack.pop_all()
    return dataset


def require_shares(job: Train, count: int) -> None:
    """Check that so many processes can share the batches of a step; raises ConfigError."""
    batches = job.data.batches_per_step
    if batches % count:
        more = count * -(-batches // count)
        raise ConfigError(
            f"data.batches_per_step: expected a multiple of the {count} processes, for each to have as many "
            f"batches, got {batches}; set data.batches_per_step = {more}, or start another number of processes"
        )


def finished(job: Train, done: int) -> str:
    """Say that a run has nothing left to do, having done so many steps."""
    asked = job.run.num_steps
    counts = f"{done} of {asked} steps" if done == asked else f"{done} steps are done, {asked} were asked for"
    return f"{job.run.output}: finished: {counts}; nothing to do"


def slow_average(job: Train) -> list[str]:
    """Return a warning if the moving average of the weights cannot follow them in so few steps, and what would do."""
    steps = job.run.num_steps
    left = job.optim.ema_decay**steps
    if left <= _MOST_LEFT:
        return []
    moves = float(f"{1 - _LITTLE_LEFT ** (1 / steps):.1g}")
    return [
        f"optim.ema_decay: the moving average, which grids, sample, convert and init.weights take, still holds "
        f"{left:.0%} of the weights it began with after {steps:,} steps; set optim.ema_decay = {1 - moves:.10g}, or "
        "have sample, convert and init take the weights themselves (use_ema = false)"
    ]


def _resolved(init: Init) -> Init:
    """Name one checkpoint where the job names a run, which may save another while the processes start one by one."""
    return init if init.weights is None else init.model_copy(update={"weights": weights.resolve(init.weights)})


def _begin(
    job: Train, init: Init, dataset: Dataset, last: Path | None, world: World
) -> tuple[Network, NullCaption | None]:
    """Return the model, and the null caption, which belongs to the run from its beginning on.

    The model is what a new run begins with, or, where there is a checkpoint `last`, room for its weights.
    """
    null = None
    if last is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.run.seed)
            network = build(job.model, job.run.grad_checkpointing)
        null = beginnings.begin(init, network, dataset.facts())
    else:
        with torch.device("meta"):
            network = build(job.model, job.run.grad_checkpointing)
        network.to_empty(device=world.device)
    if last is not None and job.model.condition == "caption":
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
    )


def _start(network: Network, job: Train, world: World) -> State:
    optim = job.optim
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    if job.run.compile:
        network.compile_blocks()
    spread = distribute(network, world, job.run)
    if world.size > 1 and job.run.parallel == "fsdp":
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
    """Return what the job file says otherwise than the one that a checkpoint was written under, by key.

    What a new run starts from is not among it: nobody reads it any more.
    """
    before, now = (_flat(tomllib.loads(text)) for text in ((last / checkpoint.CONFIG).read_text(), resolved_toml(job)))
    keys = sorted(key for key in before.keys() | now.keys() if not key.startswith("init."))
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def steps_done(job: Train, dataset: Dataset, last: Path) -> int:
    """Return the steps done of the run that a checkpoint belongs to.

    Raises:
        ConfigError: If that is not the run of this job: another seed, model, or order of data.
        DataError: If the checkpoint is damaged.
    """
    meta = checkpoint.read_meta(last)
    wanted = _resumes(job, dataset)
    for key, value in wanted.items():
        found = meta.resumes.get(key)
        if found != value:
            advice = "choose another run.output, or the run's own setting"
            if key.startswith(("data.image_set", "data.text_set")):
                advice = "the set is another, or was written anew since: choose another run.output"
            raise ConfigError(f"{key}: this job has {value}, the run in {job.run.output} has {found}; {advice}")
    return meta.step


def _resumes(job: Train, dataset: Dataset) -> dict[str, Any]:
    """What decides the weights' shapes and the order of samples, so cannot change inside a run."""
    dump = {"condition": job.model.condition, **job.model.model_dump(exclude={"size"})}  # first: it decides the rest
    model = {f"model.{key}": value for key, value in dump.items()}
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
