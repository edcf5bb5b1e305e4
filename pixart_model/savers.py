"""Writing checkpoints while training goes on.

A save copies what training changes to the host's memory, which takes the time of the copy, and leaves the writing to a
thread. The next save waits for the one before, and says what went wrong with it. In host memory a save takes as much
as it writes: with PixArt-XL/2 2.4 GB for the weights, 2.4 GB for their average, both on the first process only, and
4.9 GB for the optimizer, which the processes share. On a GPU the memory is page-locked, for the copy not to wait, and
kept for the next save; torch takes powers of two of it for each tensor, so half as much again.
"""

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_data.commits import PublishedFile, file_sha256
from pixart_data.errors import JobError, PixArtError
from pixart_data.retries import storage
from pixart_data.storage import make_dir, sync_dir
from pixart_model.checkpoint import (
    CONFIG,
    CONVENTIONS,
    EMA,
    META,
    MODEL,
    NULL_CAPTION,
    OPTIMIZER,
    TEMPORARY,
    Meta,
    prune,
)
from pixart_model.devices import follow
from pixart_model.nulls import NullCaption
from pixart_model.parallel import TIMEOUT, World, local, whole
from pixart_model.states import Shares, optimizer_of, own_share, weights_of, write_optimizer

_OS_ERROR = re.compile(r"os error (\d+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    """What a checkpoint will hold, on the host.

    Attributes:
        files: Tensors by file; of the first process, else empty.
        shares: Of the optimizer.
        copied: Set when the copies from the GPU are there; None of a CPU.
    """

    meta: Meta
    job_toml: str
    files: dict[str, dict[str, Tensor]]
    shares: Shares
    copied: torch.cuda.Event | None


class Saver:
    """Writes the checkpoints of a run, one after the other, in the background.

    All processes of the run make one, at the same time, and call it alike.
    """

    def __init__(self, run_dir: Path, keep_last: int, world: World) -> None:
        self._run_dir = run_dir
        self._keep_last = keep_last
        if world.size > 1:  # messages of the thread must not get mixed up with those of training
            world = dataclasses.replace(world, hosts=dist.new_group(backend="gloo", timeout=TIMEOUT))
        self._world = world
        self._thread = ThreadPoolExecutor(1, "checkpoint", follow(world.device))
        self._writing: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._told = False  # that old checkpoints cannot be deleted

    def save(
        self,
        meta: Meta,
        model: nn.Module,
        ema: nn.Module,
        optimizer: torch.optim.Optimizer,
        null: NullCaption | None,
        job_toml: str,
    ) -> Path:
        """Copy what training has come to and begin to write it; older checkpoints are deleted when it is there.

        All processes have to call this. Afterwards training may change everything again. A checkpoint of the same step
        is left as it is.

        Args:
            meta: What the checkpoint is; its `null_caption` and `files` are filled in here.
            model: The network itself, not a wrapper; its parameters may be DTensors.
            ema: Likewise.
            optimizer: Of the model's parameters.
            null: None with `condition = "class"`.
            job_toml: The job file with every default.

        Returns:
            Where the checkpoint will appear.

        Raises:
            JobError: In all processes, if this one or the one before cannot be written.
        """
        self.wait()
        final = self._run_dir / f"step_{meta.step:08d}"
        staged = self._staged(final)
        if staged is not None:
            convention = None if null is None else CONVENTIONS[null.follows_caption]
            meta = dataclasses.replace(meta, null_caption=convention)
            copy = self._copy(meta, {MODEL: model, EMA: ema}, optimizer, null, job_toml)
            self._writing = self._thread.submit(self._write, copy, staged, final)
        return final

    def wait(self) -> None:
        """Return when the last checkpoint is there, whole.

        Raises:
            JobError: In all processes, if it cannot be written; nothing of it is left then.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait as `wait` does, but only log what goes wrong: for a run that fails of something else already."""
        try:
            self.wait()
        except (PixArtError, RuntimeError) as error:  # the latter, of gloo: another process is gone
            _log.warning("%s", error)
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def _staged(self, final: Path) -> Path | None:
        """Return a fresh folder for all processes to write to, or None if the checkpoint exists."""
        staged = None
        with self._world.agreed():
            if self._world.is_first and not final.exists():
                make_dir(self._run_dir)
                with storage(self._run_dir):
                    staged = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{final.name}-", dir=self._run_dir))
                    (staged / OPTIMIZER).mkdir()
                    staged.chmod(0o755)
        return self._world.first(staged)

    @torch.no_grad()
    def _copy(
        self,
        meta: Meta,
        networks: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        null: NullCaption | None,
        job_toml: str,
    ) -> _Copy:
        files: dict[str, dict[str, Tensor]] = {name: {} for name in networks}
        for file, network in networks.items():
            for name, tensor in weights_of(network).items():
                full = whole(tensor)  # one after the other, for two networks do not fit beside the others
                if self._world.is_first:
                    files[file][name] = self._to_host(f"{file}/{name}", full)
        if null is not None:
            files[NULL_CAPTION] = {"t5": self._to_host(NULL_CAPTION, null.features)}
        # An optimizer that has made no step has no state, and asking for it would make one.
        spread = own_share(optimizer_of(networks[MODEL], optimizer), self._world) if optimizer.state else {}
        values = {name: self._to_host(name, local(tensor)) for name, tensor in spread.items()}
        copied = None
        if self._world.device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return _Copy(meta, job_toml, files if self._world.is_first else {}, Shares(spread, values), copied)

    def _to_host(self, key: str, tensor: Tensor) -> Tensor:
        """Return a copy in the host's memory; a GPU's is there only when the device has come to this point."""
        host = self._buffers.get(key)
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            self._buffers[key] = host
        return host.copy_(tensor, non_blocking=True)

    def _write(self, copy: _Copy, staged: Path, final: Path) -> None:
        """Write a checkpoint under its temporary name, all processes together, then give it its own."""
        try:
            if copy.copied is not None:
                copy.copied.synchronize()
            with _writing(staged / OPTIMIZER):
                names = write_optimizer(staged / OPTIMIZER, copy.shares, self._world)
            with self._world.agreed():
                own = [f"{OPTIMIZER}/{name}" for name in names] + self._write_whole(copy, staged)
                with storage(staged):
                    entries = [_entry(staged, name) for name in own]
            everyone = self._world.gather(entries)
            with self._world.agreed():
                if self._world.is_first:
                    files = tuple(sorted((one for some in everyone for one in some), key=lambda one: one.path))
                    self._publish(dataclasses.replace(copy.meta, files=files), staged, final)
        except BaseException:
            if self._world.is_first:
                shutil.rmtree(staged, ignore_errors=True)
            raise

    def _write_whole(self, copy: _Copy, staged: Path) -> list[str]:
        """Write what is the first process's; returns the names of the files."""
        if not self._world.is_first:
            return []
        for name, tensors in copy.files.items():
            with _writing(staged / name):
                save_file(tensors, staged / name)
        _write_text(staged / CONFIG, copy.job_toml)
        for name in copy.files:
            _flush(staged / name)
        return [*copy.files, CONFIG]

    def _publish(self, meta: Meta, staged: Path, final: Path) -> None:
        _write_text(staged / META, meta.to_json())
        with storage(final):
            sync_dir(staged / OPTIMIZER)
            sync_dir(staged)
            os.rename(staged, final)
            sync_dir(self._run_dir)
        _log.info("saved %s", final)
        refused = prune(self._run_dir, self._keep_last)
        if refused is not None and not self._told:
            self._told = True
            _log.warning(
                "%s: old checkpoints cannot be deleted: %s; training goes on and tries again after each save, look at "
                "the free space",
                self._run_dir, refused,
            )  # fmt: skip


def _write_text(file: Path, text: str) -> None:
    with storage(file):
        file.write_text(text)
        _flush(file)


def _flush(file: Path) -> None:
    with storage(file):
        file.chmod(0o644)
        sync_dir(file)


def _entry(folder: Path, name: str) -> PublishedFile:
    return PublishedFile(name, (folder / name).stat().st_size, file_sha256(folder / name))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Like `storage`, also where safetensors hides the operating system's error in one of its own.

    Raises:
        JobError: If the storage fails.
    """
    with storage(path):
        try:
            yield
        except SafetensorError as error:
            found = _OS_ERROR.search(str(error))
            if not found:
                raise JobError(f"{path}: cannot write: {error}; check the storage, then run again") from error
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
