"""What training changes, between the processes that hold it and the files of a checkpoint.

Weights are gathered whole, under their own names. The optimizer's state goes through torch.distributed.checkpoint: each
process writes the part that it holds, and reads the part that it needs, so that any number of processes and any way to
spread the model (`run.parallel`) can go on from any other. Its files are safetensors, not the pickles of its default
format: a checkpoint from a stranger must not be able to run code.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future

from pixart_data.errors import DataError
from pixart_data.storage import sync_dir
from pixart_model import checkpoint
from pixart_model.checkpoint import EMA, MODEL, OPTIMIZER, reading
from pixart_model.conversion import require_keys
from pixart_model.parallel import World, local

_ALONE = "torch.distributed is disabled"
"""How the library begins to say, at every save, that there is one process only."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a checkpoint by name, not copied; wrappers of compilers leave no trace."""
    with torch.no_grad():
        return {name: tensor for name, tensor in get_model_state_dict(model).items() if isinstance(tensor, Tensor)}


def optimizer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer, not copied, as `state.NAME OF WEIGHT.exp_avg` and so on.

    One that has not made a step gets its state by this, all zeros, as torch.distributed.checkpoint does it.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return {name: value for name, value in flat.items() if name.startswith("state.")}


def own_share(state: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return the part of a state that this process writes: its share of what is spread, every n-th of the rest."""
    copies = [name for name, tensor in sorted(state.items()) if local(tensor) is tensor]
    others = set(copies) - set(copies[world.rank :: world.size])
    return {name: tensor for name, tensor in state.items() if name not in others}


@dataclass(frozen=True)
class Shares:
    """The optimizer's state as one process writes it.

    Attributes:
        spread: By name, tensors whose shape and place in the whole are asked for, not their values.
        values: By name, the values of this process's part, on the CPU.
    """

    spread: dict[str, Tensor]
    values: dict[str, Tensor]


def write_optimizer(folder: Path, shares: Shares, world: World) -> list[str]:
    """Write the optimizer's state into a folder, all processes together; returns the names of this one's files.

    Raises:
        Exception: In all processes, what went wrong in one of them.
    """
    warnings.filterwarnings("ignore", _ALONE)
    writer = _Writer(folder)
    try:
        save(
            dict(shares.spread),
            storage_writer=writer,
            planner=_Planner(shares.values),
            process_group=world.hosts,
            no_dist=world.size == 1,
        )
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    return writer.names


class _Planner(DefaultSavePlanner):
    """Takes values from a copy: training has gone on with the tensors that the plan is made from."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._values[index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """Writes what the library's own does, without two more copies in memory, and lets other threads run meanwhile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.names: list[str] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        if tensors:
            self.names = [f"shard-{plan.storage_data['shard_index']:05d}.safetensors"]
            _write_shard(self.folder / self.names[0], tensors, plan.items)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items])
        return done


def _write_shard(file: Path, tensors: dict[str, Any], items: Sequence[WriteItem]) -> None:
    """Write tensors with where each begins in the whole, as torch's reader of safetensors wants to be told.

    That is all the metadata, for safetensors writes several in any order, and equal states should be equal files.
    """
    begins = {item.index.fqn: list(item.tensor_data.chunk.offsets) for item in items if item.tensor_data}
    offsets = {name: {"saved_offsets": begin} for name, begin in begins.items()}
    save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(offsets)})
    os.chmod(file, 0o644)
    sync_dir(file)


def restore(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Bring a checkpoint back into training, bit for bit; all processes together.

    How many processes wrote it, and how they had spread the model, does not matter. Learning rate, decay and the like
    stay those of `optimizer`. Nothing is changed before all files were found whole.

    Args:
        path: The checkpoint.
        model: The network itself, not a wrapper; its parameters may be DTensors.
        ema: Likewise.
        optimizer: Of the model's parameters, fresh.
        world: The processes.

    Raises:
        DataError: In all processes, if a file is missing or damaged, or a tensor is missing, surplus or of another
            shape, naming it.
    """
    networks = {MODEL: weights_of(model), EMA: weights_of(ema)}
    with world.agreed():
        for name, weights in networks.items():
            checkpoint.require_fit(path / name, weights)
        meta = checkpoint.read_meta(path)
        for file in meta.files[world.rank :: world.size]:
            checkpoint.require_intact(path, meta, file.path)
    with world.agreed():
        shards = {Path(file.path).name for file in meta.files if file.path.startswith(f"{OPTIMIZER}/")}
        if shards:  # or it was saved before the first step
            _read_optimizer(path / OPTIMIZER, shards, optimizer_of(model, optimizer))
        for name, weights in networks.items():
            _read_weights(path / name, weights)


@torch.no_grad()
def _read_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    with reading(file), safe_open(file, "pt") as source:
        for name, tensor in weights.items():
            found = source.get_tensor(name)
            if found.dtype != tensor.dtype:
                raise DataError(f"{file}: {name}: expected {tensor.dtype}, found {found.dtype}; was it converted?")
            if isinstance(tensor, DTensor):  # cut here; nothing travels between the processes
                found = distribute_tensor(found, tensor.device_mesh, tensor.placements, src_data_rank=None)
            local(tensor).copy_(local(found))


def _read_optimizer(folder: Path, shards: set[str], state: dict[str, Tensor]) -> None:
    surplus = {file.name for file in folder.glob("*.safetensors")} - shards
    if surplus:
        raise DataError(f"{folder / min(surplus)}: not a part of the checkpoint; delete this file")
    with reading(folder):
        reader = HuggingFaceStorageReader(str(folder))
        _require_complete(folder, reader.read_metadata(), state)
        warnings.filterwarnings("ignore", _ALONE)
        try:
            load(dict(state), storage_reader=reader, no_dist=True)  # each reads for itself
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _require_complete(folder: Path, found: Metadata, state: Mapping[str, Tensor]) -> None:
    """Check what the library does not: that nothing is surplus, and that the parts make up the whole."""
    require_keys(str(folder), set(state), set(found.state_dict_metadata))
    for name, tensor in state.items():
        entry: Any = found.state_dict_metadata[name]
        if entry.size != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, found {tuple(entry.size)}"
            raise DataError(f"{folder}: {name}: expected shape {shapes}; is it of another model configuration?")
        if entry.properties.dtype != tensor.dtype:
            raise DataError(f"{folder}: {name}: expected {tensor.dtype}, found {entry.properties.dtype}")
        count = sum(prod(chunk.sizes) for chunk in entry.chunks)
        if count != tensor.numel():
            raise ValueError(f"{name}: expected {tensor.numel():,} numbers, found {count:,}")
