"""One step of training: what a batch costs, and what the optimizer makes of it.

All randomness is drawn from (seed, number of the batch in the global order), so the samples of a step and their noise
are the same however many processes share it and however often the run was left and taken up again. The sum of their
gradients is so up to rounding: it has the order that the processes add them up in.

Legend: B batch, C latent channels, H W latent cells, N text tokens of all captions; x clean latents, x_t noisy ones, t
timesteps, eps noise, y captions or classes; G batches in a step, W processes.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pixart_data.errors import JobError
from pixart_model.batches import HostBatch, Names, PackedBatch
from pixart_model.config import Optim, Train
from pixart_model.diffusion import NUM_TIMESTEPS, Diffusion, generator
from pixart_model.metrics import Outcome
from pixart_model.networks import Network
from pixart_model.nulls import NullCaption
from pixart_model.packing import Packed
from pixart_model.parallel import World, accumulating, local, whole

_DROPS = 1  # names a stream of random numbers beside the one of noise


@dataclass
class State:
    """What training changes, and `step`, the number of optimizer steps done.

    Attributes:
        spread: What to call in training: the model, or what spreads it over the processes.
    """

    model: Network
    spread: nn.Module
    ema: Network
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class Setting:
    """What training does not change.

    Attributes:
        scaling_factor: Of the VAE: brings latents to about unit variance, after `shift_factor` is taken off.
        null: What stands for a dropped caption, on the device; None where classes are learned.
    """

    job: Train
    world: World
    dtype: torch.dtype
    diffusion: Diffusion
    scaling_factor: float
    shift_factor: float
    null: NullCaption | None


@dataclass(frozen=True)
class _Part:
    """What one batch came to.

    Attributes:
        losses: (B,), on the device.
        tokens: B, image tokens of a sample, text tokens of all.
    """

    losses: Tensor
    names: Names
    tokens: tuple[int, int, int]
    data_s: float
    skipped: int


def train_step(state: State, batches: Iterator[HostBatch], setting: Setting) -> Outcome:
    """Do one optimizer step: this process's G / W batches one after the other, then what all processes found.

    Raises:
        DataError, JobError: In all processes, if one of them cannot read a batch.
    """
    job, world = setting.job, setting.world
    count = job.data.batches_per_step // world.size
    parts = [_accumulate(state.spread, batches, setting, i, count) for i in range(count)]

    grad_norm = clip(list(state.model.parameters()), job.optim.clip_grad_norm)
    lr = learning_rate(job.optim, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with _room_for(job):  # the first step makes room for Adam's means
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_average(state, job.optim.ema_decay)
    state.step += 1
    return Outcome(
        loss=world.mean(torch.stack([part.losses.mean() for part in parts]).mean()),
        grad_norm=grad_norm,
        losses=[part.losses for part in parts],
        names=[part.names for part in parts],
        tokens=[part.tokens for part in parts],
        images=sum(len(part.names) for part in parts),
        data_s=sum(part.data_s for part in parts),
        skipped=sum(part.skipped for part in parts),
        lr=lr,
    )


def batch_losses(model: nn.Module, host: HostBatch, setting: Setting) -> tuple[Tensor, int]:
    """Return the loss of each sample of a batch, (B,) on the device, and the text tokens that the model saw."""
    job, device = setting.job, setting.world.device
    batch = host.to(device, packed=True)
    rng = generator(device, job.run.seed, host.step)

    mean, std = batch.moments.float().unbind(1)  # (B, C, H, W) each
    x = mean + std * torch.randn(mean.shape, generator=rng, device=device)  # (B, C, H, W)
    x = setting.scaling_factor * (x - setting.shift_factor)
    t = torch.randint(NUM_TIMESTEPS, (len(batch),), generator=rng, device=device)  # (B,)
    eps = torch.randn(x.shape, generator=rng, device=device)  # (B, C, H, W)
    x_t = setting.diffusion.q_sample(x, t, eps)
    y = conditions(batch, dropped(job, host.step, len(batch)), setting)  # N tokens, or (B,)

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
        sizes = (None, batch.size_px, batch.ratio) if isinstance(y, Packed) else ()  # DiT knows of none
        out = model(x_t, t, y, *sizes)  # (B, 2 C, H, W)
    losses = setting.diffusion.loss(out, x, x_t, t, eps, job.optim.min_snr_gamma)  # (B,)
    return losses, sum(y.lengths) if isinstance(y, Packed) else 0


def dropped(job: Train, number: int, count: int) -> list[bool]:
    """Return which samples of a batch of the global order learn without their caption; drawn on the host."""
    rng = generator("cpu", job.run.seed, number, _DROPS)
    drop: list[bool] = (torch.rand(count, generator=rng) < job.data.drop_caption).tolist()
    return drop


def conditions(batch: PackedBatch, drop: list[bool], setting: Setting) -> Packed | Tensor:
    """Return what the model is to draw: the captions, or the classes int64 (B,), but for those that are dropped."""
    if setting.null is not None:
        return setting.null.replace(batch.captions, drop)
    if batch.labels is None:
        raise ValueError("expected labels, for a model of classes, got a batch without them")
    no_class = setting.job.model.num_classes  # DiT's one more vector
    return batch.labels.masked_fill(torch.tensor(drop).to(batch.labels.device, non_blocking=True), no_class)


def learning_rate(optim: Optim, step: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then constant."""
    return optim.lr * min(1.0, (step + 1) / max(1, optim.warmup_steps))


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all processes' shares; returns what it was before, on the device."""
    norm = whole(get_total_norm([one.grad for one in parameters if one.grad is not None]))
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def update_average(state: State, decay: float) -> None:
    """Move the average towards the weights: ema = decay * ema + (1 - decay) * model."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    shares = ([local(one) for one in network.parameters()] for network in (state.ema, state.model))
    average(*shares, state.step)


def _accumulate(model: nn.Module, batches: Iterator[HostBatch], setting: Setting, i: int, count: int) -> _Part:
    """Add the gradients of one batch of `count`; those of the last one are added up over the processes."""
    with setting.world.agreed():  # where others may be waited for, which is no wait for data
        began_s = time.perf_counter()
        batch = next(batches)
        data_s = time.perf_counter() - began_s
    with accumulating(model, is_last=i == count - 1), _room_for(setting.job):
        losses, text_tokens = batch_losses(model, batch, setting)
        (losses.mean() / count).backward()  # type: ignore[no-untyped-call]
    height, width = (side // setting.job.model.patch for side in batch.moments.shape[-2:])
    return _Part(losses.detach(), batch.names, (len(batch), height * width, text_tokens), data_s, len(batch.skipped))


@contextlib.contextmanager
def _room_for(job: Train) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = [] if job.run.grad_checkpointing else ["set run.grad_checkpointing = true"]
        ways.append('start on more GPUs with run.parallel = "fsdp"')
        raise JobError(
            f"data.batch_size: expected {job.data.batch_size} samples and what trains on them to fit into the GPU's "
            f"memory, found it full; {', or '.join(ways)}, and the run goes on; a smaller data.batch_size (with "
            f"data.batches_per_step raised by as much) is another run: with a run.output of its own, and "
            f'init.weights = "{job.run.output}" if there is a checkpoint to start from'
        ) from error
