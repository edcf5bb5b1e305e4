"""Several processes that train one model: who they are, what they tell each other, and how the model is spread.

A process learns of the others from the environment (`torchrun`) or from the process group that its launcher has made
(Ray Train). Weights and gradients travel between the devices; flags, errors and names go by way of the hosts, so that
nobody waits for a GPU to hear that the run is to stop.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pixart_data.errors import ConfigError, JobError, PixArtError
from pixart_model.config import Run
from pixart_model.devices import resolve_device, resolve_dtype

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another one that lives but does not come: longer than a dataset takes to be opened and
a checkpoint to be read, by those that have not cached them. One that died is noticed when its connections close."""

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_log = logging.getLogger(__name__)


class Abandoned(JobError):
    """Another process of the run is gone or stuck; what is wrong is for that one to say."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. What it says of all of them, all of them have to ask for.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        device: Of this process.
        hosts: The group that the hosts talk in; None is the default group, which a single process needs not have.
    """

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any process is set."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """Return the largest of the numbers of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MAX, self.hosts)
        return int(value.item())

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes of a tensor on the device, of one shape in all of them."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, thing: T) -> list[T]:
        """Return what each process has, by rank; it has to be possible to pickle it."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, self.hosts)
        return things

    def first(self, thing: T) -> T:
        """Return what the first process has."""
        if self.size == 1:
            return thing
        things: list[Any] = [thing]
        dist.broadcast_object_list(things, 0, self.hosts)
        found: T = things[0]
        return found

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Let all processes fail where one of them does; inside, none may wait for another.

        Raises:
            PixArtError: What was raised inside: a process's own error, or that of the lowest rank which has one.
        """
        own: PixArtError | None = None
        try:
            yield
        except PixArtError as error:
            if self.size == 1:
                raise
            own = error
        if self.any(own is not None):
            errors = self.gather(own)
            raise own or next(error for error in errors if error)


@contextlib.contextmanager
def joined(run: Run) -> Iterator[World]:
    """Be one of the processes of a run: of a group that exists, of those that `torchrun` started, or the only one.

    Raises:
        ConfigError: If the environment is not what `torchrun` makes of it, or there are fewer GPUs than processes.
        JobError: If another process died or did not answer, for which this one cannot go on.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(0, 1, resolve_device(run.device))
        return
    device = _local_device(run)
    ours = not dist.is_initialized()
    if ours:
        missing = ", ".join(name for name in _ENVIRONMENT if name not in os.environ)
        if missing:
            raise ConfigError(
                f"environment: expected {', '.join(_ENVIRONMENT)} beside WORLD_SIZE, found no {missing}; start the "
                "processes with torchrun, or unset WORLD_SIZE"
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    world = World(dist.get_rank(), dist.get_world_size(), device, _hosts())
    _log.debug("process %d of %d, on %s", world.rank, world.size, device)
    try:
        yield world
    except RuntimeError as error:
        if not _is_of_another(error):
            raise
        why = str(error).strip().partition("\n")[0][:300]
        raise Abandoned(
            f"process {world.rank} of {world.size}: expected answers of the other processes, found that one of them is "
            f"gone or stuck ({why}); see what it says itself, then run the same command again to go on"
        ) from error
    else:
        if ours:  # after a failure it could wait for ever for the processes that are gone
            gc.collect()  # a wrapper in a cycle keeps its group, whose threads abort the interpreter at its exit
            dist.destroy_process_group()


def distribute(model: nn.Module, world: World, run: Run) -> nn.Module:
    """Spread a model over the processes: a copy in each (DDP), or a share of every parameter (FSDP2).

    Args:
        model: A network with `blocks`, whole and the same in all processes. With FSDP2 its parameters become DTensors,
            in place; so the optimizer is made after this.

    Returns:
        What to call in training: a wrapper of the model, or the model itself.
    """
    if world.size == 1:
        return model
    if run.parallel == "ddp":
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    shard(model, world, resolve_dtype(run.dtype, world.device))
    return model


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Leave each process its share of every parameter (FSDP2), in place; they meet block by block in the forward pass.

    Args:
        model: A network with `blocks`, whole and the same in all processes.
        dtype: In which the parameters meet; the shares, and the sums of gradients, stay fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # that its output is a view; nobody changes it in place
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        # times, sizes and ratios are inputs that have to stay fp32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def accumulating(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Keep the gradients of what runs inside to this process, unless it is the last part of a step.

    Args:
        model: What `distribute` returned.
    """
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if is_last else model.no_sync():
            yield
        return
    meet: Any = getattr(model, "set_requires_gradient_sync", None)  # FSDP2's
    if meet is not None:
        meet(is_last)
    yield


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor that FSDP2 has spread, a view; of another, the tensor."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that FSDP2 has spread, for which all processes have to ask; of another, the tensor."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _local_device(run: Run) -> torch.device:
    device = resolve_device(run.device)
    if device.type != "cuda":
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(
            f"run.device: expected a GPU for each process of this machine, found {count} GPUs and process {rank}; "
            f"start at most {count}, e.g. torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _hosts() -> dist.ProcessGroup | None:
    """A group whose messages stay on the hosts: the default one if it can."""
    if "gloo" in str(dist.get_backend_config()):
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return group


def _is_of_another(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
