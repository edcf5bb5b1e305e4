"""Training from feature shards: `run(job)` starts, continues or recognises a finished run.

Step k draws all its randomness from (seed, k) and trains on batch k of the order of seed, so a run that was stopped and
continued gives the same weights as one that was not: bit for bit on a CPU, up to the order of sums on a GPU.

Legend: B batch, C latent channels, H W latent cells, L text tokens, D width of the text encoder; x clean latents,
x_t noisy ones, t timesteps, eps noise, y captions.
"""

import contextlib
import copy
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pixart_data.config import resolved_toml
from pixart_data.errors import ConfigError, JobError
from pixart_data.leases import output_lock
from pixart_data.storage import make_dir, write_atomic
from pixart_model import checkpoint
from pixart_model.batches import HostBatch
from pixart_model.config import Optim, Train
from pixart_model.dataset import Dataset, Position, open_dataset
from pixart_model.devices import resolve_device, resolve_dtype
from pixart_model.diffusion import NUM_TIMESTEPS, Diffusion, generator
from pixart_model.grid import Painter
from pixart_model.metrics import Meter
from pixart_model.model import PixArt

_log = logging.getLogger(__name__)


@dataclass
class State:
    """What training changes, and `step`, the number of optimizer steps done."""

    model: PixArt
    ema: PixArt
    optimizer: torch.optim.Optimizer
    step: int


@dataclass(frozen=True)
class Setting:
    """What training does not change.

    Attributes:
        scaling_factor: Of the VAE: brings latents to about unit variance, after `shift_factor` is taken off.
        null_caption: bf16 (n, D), on the device.
    """

    job: Train
    device: torch.device
    dtype: torch.dtype
    diffusion: Diffusion
    scaling_factor: float
    shift_factor: float
    null_caption: Tensor


def run(job: Train) -> Path:
    """Train until `run.num_steps`, from the last checkpoint in `run.output` if there is one.

    Returns:
        The directory of the last checkpoint.

    Raises:
        ConfigError: If the job does not fit the features, or the run in `run.output` is of another model or data.
        DataError: If features or a checkpoint are damaged.
        JobError: If the loss is not finite, the storage fails, or another run holds the output.
    """
    device = resolve_device(job.run.device)
    run_dir = make_dir(Path(job.run.output))
    with output_lock(run_dir), contextlib.closing(open_dataset(job.data, job.run.seed)) as dataset:
        dataset.require(job.model)
        last = checkpoint.latest(run_dir)
        if last is not None:
            done = _steps_done(job, dataset, last)
            if done >= job.run.num_steps:
                _log.info("%s: finished: %d of %d steps; nothing to do", run_dir, done, job.run.num_steps)
                return last
        state = _start(job, device)
        if last is not None:
            _restore(state, last)
        write_atomic(run_dir / checkpoint.CONFIG, resolved_toml(job).encode())
        vae = dataset.images.manifest.model
        setting = Setting(
            job,
            device,
            resolve_dtype(job.run.dtype, device),
            Diffusion(device),
            float(vae["scaling_factor"]),
            float(vae.get("shift_factor") or 0.0),
            dataset.null_caption().to(device),
        )
        return _loop(state, setting, dataset, run_dir)


def train_step(state: State, host_batch: HostBatch, setting: Setting) -> tuple[Tensor, Tensor]:
    """Do one optimizer step; returns its loss and the norm of its gradient before clipping, on the device."""
    optim, device = setting.job.optim, setting.device
    rng = generator(device, setting.job.run.seed, state.step)
    batch = host_batch.to(device)

    mean, std = batch.moments.float().unbind(1)  # (B, C, H, W) each
    x = mean + std * torch.randn(mean.shape, generator=rng, device=device)  # (B, C, H, W)
    x = setting.scaling_factor * (x - setting.shift_factor)
    drop = torch.rand(len(batch), generator=rng, device=device) < setting.job.data.drop_caption  # (B,)
    y, mask = drop_captions(batch.text, batch.mask, setting.null_caption, drop)  # (B, L, D), (B, L)
    t = torch.randint(NUM_TIMESTEPS, (len(batch),), generator=rng, device=device)  # (B,)
    eps = torch.randn(x.shape, generator=rng, device=device)  # (B, C, H, W)
    x_t = setting.diffusion.q_sample(x, t, eps)

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
        out = state.model(x_t, t, y, mask, batch.size_px, batch.ratio)  # (B, 2 C, H, W)
    loss = setting.diffusion.loss(out, x, x_t, t, eps).mean()

    loss.backward()  # type: ignore[no-untyped-call]
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), optim.clip_grad_norm)
    state.optimizer.param_groups[0]["lr"] = learning_rate(optim, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_average(state, optim.ema_decay)
    state.step += 1
    return loss.detach(), grad_norm


def drop_captions(text: Tensor, mask: Tensor, null_caption: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Replace captions by the null caption, which keeps its own length.

    Args:
        text: (B, L, D), padded.
        mask: (B, L) bool, True on true tokens.
        null_caption: (n, D).
        drop: (B,) bool, True where the caption goes.

    Returns:
        text (B, max(L, n), D) and mask (B, max(L, n)).
    """
    length = max(text.shape[1], len(null_caption))
    more, missing = length - text.shape[1], length - len(null_caption)
    text, mask = F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))  # (B, length, D), (B, length)
    null_text = F.pad(null_caption, (0, 0, 0, missing))  # (length, D)
    null_mask = torch.arange(length, device=mask.device) < len(null_caption)  # (length,)
    return torch.where(drop[:, None, None], null_text, text), torch.where(drop[:, None], null_mask, mask)


def learning_rate(optim: Optim, step: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then constant."""
    return optim.lr * min(1.0, (step + 1) / max(1, optim.warmup_steps))


@torch.no_grad()
def update_average(state: State, decay: float) -> None:
    """Move the average towards the weights: ema = decay * ema + (1 - decay) * model."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    average(list(state.ema.parameters()), list(state.model.parameters()), state.step)


def _loop(state: State, setting: Setting, dataset: Dataset, run_dir: Path) -> Path:
    job = setting.job
    painter = Painter(job, dataset, setting.device) if job.grid.num_images else None
    meter = Meter(run_dir, state.step, job.run.num_steps)
    meter.rewind()
    _log.info("%s: step %d of %d, on %s", run_dir, state.step, job.run.num_steps, setting.device)
    pinned = setting.device.type == "cuda"
    with contextlib.closing(dataset.batches(state.step, pinned=pinned)) as batches:
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            data_s = time.perf_counter() - asked
            lr = learning_rate(job.optim, state.step)
            with _room_for(job):
                loss, grad_norm = train_step(state, batch, setting)
            meter.add(loss, grad_norm, len(batch), data_s, len(batch.skipped))
            done = state.step == job.run.num_steps
            if done or state.step % job.run.log_every == 0:
                meter.write(lr)
            if done or state.step % job.run.save_every == 0:
                meter.check()
                with meter.paused():
                    last = checkpoint.save(run_dir, _snapshot(state, setting, dataset), job.run.keep_last)
                    _log.info("saved %s", last)
                    if painter:
                        _log.info("drawing %d pictures", job.grid.num_images)
                        painter.draw(state.ema, run_dir / "grids" / f"{last.name}.png")
            if done:
                meter.conclude()
                return last


def _start(job: Train, device: torch.device) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.run.seed)
        model = PixArt(job.model, job.run.grad_checkpointing).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optim = job.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda",
    )
    return State(model, ema, optimizer, 0)


def _restore(state: State, last: Path) -> None:
    snapshot = checkpoint.load(last)
    state.model.load_state_dict(snapshot.model)
    state.ema.load_state_dict(snapshot.ema)
    groups = state.optimizer.state_dict()["param_groups"]  # the job's own settings, which may have changed
    state.optimizer.load_state_dict({"state": snapshot.training["optimizer"]["state"], "param_groups": groups})
    state.step = snapshot.meta.step
    _log.info("continuing from %s", last)


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
    return model | dataset.order_facts() | {"run.seed": job.run.seed}


def _snapshot(state: State, setting: Setting, dataset: Dataset) -> checkpoint.Snapshot:
    job = setting.job
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    resumes = _resumes(job, dataset)
    meta = checkpoint.Meta(state.step, job.model.model_dump(), dataset.facts(), resumes, versions)
    position = vars(Position(job.run.seed, state.step))
    training = {"optimizer": state.optimizer.state_dict(), "position": position}
    return checkpoint.Snapshot(
        meta,
        state.model.state_dict(),
        state.ema.state_dict(),
        setting.null_caption.cpu(),
        training,
        resolved_toml(job),
    )


@contextlib.contextmanager
def _room_for(job: Train) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"data.batch_size: {job.data.batch_size} samples do not fit into the GPU's memory; "
            "lower it or set run.grad_checkpointing = true"
        ) from error
