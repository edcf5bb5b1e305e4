import contextlib
import copy
import dataclasses
import errno
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from pixart_data.errors import DataError, JobError
from pixart_model import checkpoint, savers, states
from pixart_model.config import Run
from pixart_model.networks import build
from pixart_model.nulls import NullCaption
from pixart_model.parallel import World, distribute, joined, shard, whole
from pixart_model.savers import Saver
from pixart_model.sizes import Model
from pixart_model.states import restore

CONFIG = Model(size="tiny", depth=1, width=24, heads=2, caption_width=16)
ALONE = World(0, 1, torch.device("cpu"))
NULL = NullCaption(torch.ones(1, 16).bfloat16())


class Training:
    """A model, its average and its optimizer, spread over the processes of a world as a run does it."""

    def __init__(self, world=ALONE, parallel="ddp", seed=0):
        torch.manual_seed(seed)
        run = Run(output="-", num_steps=1, device="cpu", dtype="fp32", parallel=parallel)
        self.world = world
        self.model = build(CONFIG)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        distribute(self.model, world, run)
        if world.size > 1 and parallel == "fsdp":
            shard(self.ema, world, run)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def advance(self, seed):
        """Do a step whose gradients follow from the seed alone."""
        rng = torch.Generator().manual_seed(seed)
        for one in self.model.parameters():
            grad = torch.randn(one.shape, generator=rng)
            one.grad = distribute_tensor(grad, one.device_mesh, one.placements) if isinstance(one, DTensor) else grad
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, one in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(one, 0.5)

    def tensors(self):
        """Copies of all that training changes, whole."""
        networks = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        state = [tensor for fields in self.optimizer.state_dict()["state"].values() for tensor in fields.values()]
        return [whole(tensor).detach().clone() for tensor in (*networks, *state)]

    def save(self, saver, step):
        meta = checkpoint.Meta(step, CONFIG.model_dump(), {}, {})
        return saver.save(meta, self.model, self.ema, self.optimizer, NULL, "a = 1\n")

    def restored(self, path):
        restore(path, self.model, self.ema, self.optimizer, self.world)
        return self.tensors()


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def training():
    one = Training()
    one.advance(1)
    return one


@pytest.fixture
def saver(tmp_path):
    with contextlib.closing(Saver(tmp_path / "run", 2, ALONE)) as one:
        yield one


@pytest.fixture
def held(monkeypatch):
    """An event that whoever writes weights waits for."""
    event, write = threading.Event(), savers.save_file

    def wait_and_write(*args):
        assert event.wait(60)
        write(*args)

    monkeypatch.setattr(savers, "save_file", wait_and_write)
    yield event
    event.set()


def test_training_goes_on_while_a_copy_of_what_it_was_is_written(training, saver, held):
    before = training.tensors()
    path = training.save(saver, 1)
    training.advance(2)
    assert not path.exists()
    assert checkpoint.latest(path.parent) is None, "what is being written is no checkpoint yet"
    after = training.tensors()
    held.set()
    saver.wait()
    assert checkpoint.latest(path.parent) == path
    assert equal(Training(seed=5).restored(path), before)
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "the step has changed all of it"


def test_the_next_save_waits_for_the_one_before(training, saver, held):
    first = training.save(saver, 1)
    threading.Timer(0.3, held.set).start()
    second = training.save(saver, 2)
    assert first.is_dir()
    saver.wait()
    assert second.is_dir()


def test_a_checkpoint_of_the_same_step_is_left_as_it_is(training, saver):
    path = training.save(saver, 1)
    saver.wait()
    before = training.tensors()
    training.advance(2)
    assert training.save(saver, 1) == path
    saver.wait()
    assert equal(Training().restored(path), before)
    assert [one.name for one in path.parent.iterdir()] == ["step_00000001"]


@contextlib.contextmanager
def files_of_at_most(limit):
    """A limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("limit", "name"), [(150_000, "optimizer"), (100, "optimizer"), (None, "model.safetensors")])
def test_storage_that_refuses_is_one_line_at_the_next_wait(training, saver, limit, name, monkeypatch):
    first = training.save(saver, 1)
    saver.wait()
    assert (first / "model.safetensors").stat().st_size < 150_000
    before = training.tensors()
    if limit is None:  # the optimizer's file, the largest, is written already
        monkeypatch.setattr(savers, "write_optimizer", lambda *_: [])
        limit = 50_000
    with files_of_at_most(limit):
        training.save(saver, 2)
        with pytest.raises(JobError, match="cannot write: File too large; check the storage, then run again") as error:
            saver.wait()
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert [one.name for one in first.parent.iterdir()] == ["step_00000001"], "nothing half-written stays"
    saver.wait()  # said once
    assert equal(Training().restored(first), before)


def test_what_went_wrong_is_said_at_the_next_save_and_then_it_goes_on(training, saver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(savers, "save_file", full)
        training.save(saver, 1)
        with pytest.raises(JobError, match="model.safetensors: cannot write: the disk is full; free space"):
            training.save(saver, 2)
    path = training.save(saver, 2)
    saver.wait()
    assert [one.name for one in path.parent.iterdir()] == ["step_00000002"]


def full(*_):
    assert errno.ENOSPC == 28
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("function", "told"),
    [("save_file", "cannot write: the disk is full"), ("write_optimizer", "[gloo] closed by peer")],
)
def test_a_run_that_fails_of_something_else_only_logs_it(training, saver, monkeypatch, caplog, function, told):
    def gone(*_):
        raise RuntimeError(told)

    monkeypatch.setattr(savers, function, full if function == "save_file" else gone)
    path = training.save(saver, 1)
    with caplog.at_level(logging.WARNING):
        saver.close()
    assert told in caplog.text
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_at_once(training, tmp_path):
    (tmp_path / "run").write_text("a file")
    saver = Saver(tmp_path / "run", 2, ALONE)
    with contextlib.closing(saver), pytest.raises(JobError, match="cannot write: it is a file"):
        training.save(saver, 1)


def test_equal_states_are_equal_files(training, tmp_path):
    """Whatever order the library's maps have."""
    contents = []
    for name in "ab":
        saver = Saver(tmp_path / name, 2, ALONE)
        path = training.save(saver, 1)
        saver.wait()
        saver.close()
        contents.append({file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()})
    assert contents[0] == contents[1]


KILLED = """
import os, sys, time
from pathlib import Path
from pixart_model import savers
from tests.model.test_savers import ALONE, Training
training, saver = Training(), savers.Saver(Path(sys.argv[1]), 1, ALONE)
training.advance(1)
training.save(saver, 1)
saver.wait()
write = savers.save_file
def write_and_stop(tensors, file, *rest):
    write(tensors, file, *rest)
    print("half", flush=True)
    time.sleep(100)
savers.save_file = write_and_stop
training.advance(2)
training.save(saver, 2)
training.advance(3)
saver.wait()
"""


def test_a_kill_while_writing_leaves_the_one_before_and_what_the_next_sweeps_up(training, tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", KILLED, out], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    left = {one.name[:17] for one in out.iterdir()}
    assert left == {"step_00000001", ".tmp-step_0000000"}
    assert checkpoint.latest(out) == out / "step_00000001"
    going_on = Training(seed=3)
    assert equal(going_on.restored(out / "step_00000001"), training.tensors())
    with contextlib.closing(Saver(out, 2, ALONE)) as saver:
        going_on.save(saver, 2)
    assert sorted(one.name for one in out.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.fixture
def busy(monkeypatch):
    """A storage that keeps files named .nfs while `busy` holds, as NFS does for who still reads them."""
    unlink, here = os.unlink, ["open"]

    def refuse(path, **options):
        if here and os.path.basename(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    yield here
    here.clear()


def test_an_old_checkpoint_that_cannot_be_deleted_is_said_once_and_deleted_later(training, tmp_path, busy, caplog):
    run_dir = tmp_path / "run"
    for start in (1, 11):  # and started again
        with contextlib.closing(Saver(run_dir, 1, ALONE)) as saver, caplog.at_level(logging.WARNING):
            for step in range(start, start + 4):
                path = training.save(saver, step)
                saver.wait()
                (path / "optimizer" / ".nfs0001").touch()
        [said] = [record.getMessage() for record in caplog.records]
        assert "old checkpoints cannot be deleted: [Errno 16] Device or resource busy" in said
        assert "tries again" in said
        caplog.clear()
    assert checkpoint.latest(run_dir) == path
    left = [file for file in run_dir.glob(".tmp-*/**/*") if file.is_file()]
    assert len(left) == 7
    assert {file.name for file in left} == {".nfs0001"}, "what could be deleted is"
    busy.clear()
    assert checkpoint.prune(run_dir, 1) is None
    assert [one.name for one in run_dir.iterdir()] == ["step_00000014"]


def test_a_checkpoint_that_cannot_even_be_renamed_stays_for_now(training, saver, monkeypatch, caplog):
    rename = os.rename

    def refuse(source, target):
        if str(target).endswith("-old"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(target))
        rename(source, target)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "rename", refuse)
        for step in (1, 2, 3):
            path = training.save(saver, step)
        saver.wait()
    assert len(list(path.parent.glob("step_*"))) == 3
    assert caplog.text.count("cannot be deleted") == 1
    training.save(saver, 4)
    saver.wait()
    assert sorted(one.name for one in path.parent.iterdir()) == ["step_00000003", "step_00000004"]


def test_all_is_on_the_disk_before_it_can_be_seen(training, saver, monkeypatch):
    flushed, checked = {}, []
    rename = os.rename

    def flush(path):
        flushed[str(path)] = path.stat().st_size

    def look_and_rename(staged, final):
        entries = [staged, *staged.rglob("*")]
        assert {str(one): one.stat().st_size for one in entries} == flushed, "each after the last byte of it"
        checked.append(final)
        flushed.clear()
        rename(staged, final)

    for module in (savers, states):
        monkeypatch.setattr(module, "sync_dir", flush)
    monkeypatch.setattr(os, "rename", look_and_rename)
    path = training.save(saver, 1)
    saver.wait()
    assert checked == [path]
    assert list(flushed) == [str(path.parent)], "and the new name"


def test_nothing_is_written_before_the_copy_from_the_gpu_is_there(training, saver, monkeypatch):
    """A GPU copies while the thread runs already: the values stand in only when its event has come."""
    take = Saver._copy

    class Event:
        def __init__(self, files):
            self.files, self.values = files, {name: t.clone() for name, t in files["model.safetensors"].items()}
            for tensor in files["model.safetensors"].values():
                tensor.zero_()

        def synchronize(self):
            for name, tensor in self.files["model.safetensors"].items():
                tensor.copy_(self.values[name])

    def on_a_gpu(self, *args):
        copied = take(self, *args)
        return dataclasses.replace(copied, copied=Event(copied.files))

    monkeypatch.setattr(Saver, "_copy", on_a_gpu)
    before = training.tensors()
    path = training.save(saver, 1)
    saver.wait()
    assert equal(Training().restored(path), before)


def test_any_number_of_processes_and_any_way_to_spread_goes_on_from_any_other(tmp_path):
    """A chain: one process, two with a share each, two with all, one; at each link the same step is done."""
    straight = Training()
    with contextlib.closing(Saver(tmp_path / "one", 2, ALONE)) as saver:
        straight.advance(1)
        path = straight.save(saver, 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_two_processes, (port, path, tmp_path), nprocs=2)
    for seed in (2, 3):
        straight.advance(seed)
    shards = sorted(file.name for file in (tmp_path / "ddp" / "step_00000003" / "optimizer").iterdir())
    assert shards == ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert equal(Training(seed=9).restored(tmp_path / "ddp" / "step_00000003"), straight.tensors())


def _two_processes(rank, port, path, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined(Run(output="-", num_steps=1, device="cpu")) as world:
        for step, parallel in ((2, "fsdp"), (3, "ddp")):
            training = Training(world, parallel, seed=rank + 10)  # other weights in each, which restoring must replace
            training.restored(path)
            training.advance(step)
            with contextlib.closing(Saver(folder / parallel, 2, world)) as saver:
                path = training.save(saver, step)
                before = training.tensors()
                training.advance(100)
                saver.wait()
                _fails_in_both(training, saver, rank)
            assert equal(training.restored(path), before)
            if parallel == "fsdp":
                assert isinstance(next(training.model.parameters()), DTensor)
        _damage_is_told_by_both(training, path, rank)


def _fails_in_both(training, saver, rank):
    """The storage of one of them refuses, and both say so, and can go on."""
    with files_of_at_most(100) if rank == 1 else contextlib.nullcontext():
        training.save(saver, 50)
        with pytest.raises(JobError, match="optimizer: cannot write: File too large"):
            saver.wait()


def _damage_is_told_by_both(training, path, rank):
    """Each looks at half of the files."""
    file = path / "optimizer" / "shard-00002.safetensors"
    content = file.read_bytes()
    dist.barrier()
    if rank == 0:
        file.write_bytes(content[:-1])
    dist.barrier()
    with pytest.raises(DataError, match="shard-00002.safetensors: damaged"):
        training.restored(path)
    dist.barrier()
    if rank == 0:
        file.write_bytes(content)
    dist.barrier()
