import copy
import os

import pytest
import torch
from torch import nn

from pixart_data.errors import ConfigError, DataError
from pixart_model import parallel
from pixart_model.config import Run
from pixart_model.parallel import accumulating, distribute, joined, local, shard, whole
from tests import teams


class Network(nn.Module):
    """The outline of a network: blocks, and something around them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return x.square().sum(1)


def run_of(**settings):
    return Run(output="runs/x", num_steps=1, device="cpu", **settings)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(run_of()) as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert [world.any(True), world.any(False), world.largest(3)] == [True, False, 3]
        assert (world.gather("x"), world.first("x")) == (["x"], "x")
        assert torch.equal(world.mean(torch.tensor(2.0)), torch.tensor(2.0))
        network = Network()
        assert distribute(network, world, run_of(parallel="fsdp")) is network
        with pytest.raises(DataError, match="broken"), world.agreed():
            raise DataError("broken")
    assert not torch.distributed.is_initialized()


def test_an_environment_that_torchrun_did_not_make_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="found no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start .* torchrun"):
        joined(run_of()).__enter__()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert parallel._local_device(Run(output="x", num_steps=1)) == torch.device("cuda", int(rank))
    assert chosen == [0, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="found 4 GPUs and process 4; .* torchrun --nproc-per-node 4"):
        parallel._local_device(Run(output="x", num_steps=1))


def test_errors_that_are_not_of_other_processes_stay_what_they_are(monkeypatch):
    assert parallel._is_of_another(torch.distributed.DistBackendError("NCCL: timed out"))
    assert parallel._is_of_another(RuntimeError("[third_party/gloo/transport/tcp/pair.cc:547] Connection closed"))
    assert not parallel._is_of_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def complain_of(rank):
    if rank == 1:
        raise DataError("of the second")


def exchange():
    """What two processes tell each other."""
    rank = int(os.environ["RANK"])
    with joined(run_of()) as world:
        assert (world.rank, world.size, world.is_first) == (rank, 2, rank == 0)
        assert [world.any(rank == 1), world.any(False), world.largest(rank + 4)] == [True, False, 5]
        assert (world.gather({"rank": rank}), world.first(rank)) == ([{"rank": 0}, {"rank": 1}], 0)
        mine = torch.tensor([rank, 2.0])
        assert world.mean(mine).tolist() == [0.5, 2.0]
        assert mine.tolist() == [rank, 2.0], "left as it is"
        with pytest.raises(DataError, match="of the second"), world.agreed():
            complain_of(rank)
        with pytest.raises(ConfigError, match=f"own {rank}"), world.agreed():
            raise ConfigError(f"own {rank}")
    assert not torch.distributed.is_initialized()


def spread(kind):
    """Gradients of two batches in each of two processes, beside those of all four in one."""
    with joined(run_of(parallel=kind)) as world:
        torch.manual_seed(0)
        alone, together = Network(), Network()
        together.load_state_dict(alone.state_dict())
        called = distribute(together, world, run_of(parallel=kind))
        inputs = torch.randn(4, 6, 3)
        for x in inputs:
            (alone(x).mean() / 4).backward()
        mine = inputs[world.rank :: world.size]
        for i, x in enumerate(mine):
            with accumulating(called, is_last=i == 1):
                (called(x).mean() / 2).backward()
        for expected, found in zip(alone.parameters(), together.parameters(), strict=True):
            assert kind == "ddp" or local(found).shape != expected.shape
            torch.testing.assert_close(whole(found.detach()), expected.detach(), rtol=0, atol=0)
            torch.testing.assert_close(whole(found.grad), expected.grad)
        average = copy.deepcopy(alone).requires_grad_(False)
        if called is together:
            shard(average, world, torch.float32)
        for _ in range(2):  # drawn from, and then again
            with torch.inference_mode():
                torch.testing.assert_close(average(inputs[0]), alone(inputs[0]))


def spread_in_bf16():
    """FSDP2 computes in bf16 on fp32 shares, and leaves inputs alone."""
    with joined(run_of()) as world:
        network, seen = Network(), []
        network.first.register_forward_pre_hook(lambda module, args: seen.append((module.weight.dtype, args[0].dtype)))
        shard(network, world, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            network(torch.randn(2, 3)).sum().backward()
        assert seen == [(torch.bfloat16, torch.float32)]
        assert {one.grad.dtype for one in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("target", "args"), [(exchange, ()), (spread, ("ddp",)), (spread, ("fsdp",)), (spread_in_bf16, ())]
)
def test_two_processes(tmp_path, target, args):
    team = teams.Team(tmp_path / "team", 2, target, *args)
    assert team.wait() == [0, 0], team.errors()
