"""Processes that work together as those of `torchrun` do, without its seconds: forked where torch is imported."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback

from pixart_data.errors import PixArtError

_PRELOADED = [
    "tests.teams",
    "pixart_model.train",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",
]


class Team:
    """The processes of one run; each logs to `folder/RANK.log` and says in `folder/RANK.txt` what it ended with."""

    def __init__(self, folder, size, target, *args):
        self.folder = folder
        folder.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.members = [
            context.Process(target=_be, args=(rank, size, port, folder, target, args), daemon=True)
            for rank in range(size)
        ]
        for member in self.members:
            member.start()

    def wait(self, timeout_s=120):
        """Wait for all of them and return their exit codes."""
        end_s = time.monotonic() + timeout_s
        for member in self.members:
            member.join(max(0.0, end_s - time.monotonic()))
        stuck = [rank for rank, member in enumerate(self.members) if member.is_alive()]
        self.kill()
        assert not stuck, f"ranks {stuck} hang: {self.logs()}"
        return [member.exitcode for member in self.members]

    def wait_for(self, path, timeout_s=120):
        """Wait until there is a file."""
        end_s = time.monotonic() + timeout_s
        while not path.exists():
            assert all(member.is_alive() for member in self.members), self.logs()
            assert time.monotonic() < end_s, f"no {path}: {self.logs()}"
            time.sleep(0.002)

    def send(self, number, rank):
        """Send a signal to one of them."""
        os.kill(self.members[rank].pid, number)

    def kill(self):
        """Kill those that live, all at once, and wait for them."""
        for member in self.members:
            if member.is_alive():
                self.send(signal.SIGKILL, self.members.index(member))
        for member in self.members:
            member.join()

    def logs(self):
        """What each of them logged."""
        return [path.read_text() for path in sorted(self.folder.glob("*.log"))]

    def errors(self):
        """What each of them ended with; empty where all was well."""
        return [path.read_text() for path in sorted(self.folder.glob("*.txt"))]


def _be(rank, size, port, folder, target, args):
    import torch

    torch.set_num_threads(1)
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
    logging.basicConfig(filename=folder / f"{rank}.log", format="%(message)s", level=logging.INFO, force=True)
    logging.getLogger("pixart_model").setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    said, code = "", 0
    try:
        target(*args)
    except PixArtError as error:
        said, code = str(error), error.exit_code
    except KeyboardInterrupt:
        said, code = "interrupted", 130
    except Exception:  # noqa: BLE001 - for the test to show
        said, code = traceback.format_exc(), 1
    (folder / f"{rank}.txt").write_text(said)
    sys.exit(code)


def train_compiled(path):
    """Train with blocks that are compiled without a C++ compiler; logs how many programs were made of them."""
    from torch._dynamo.utils import counters

    from pixart_model.trunk import Trunk

    with_inductor = Trunk.compile_blocks
    Trunk.compile_blocks = lambda network: with_inductor(network, "aot_eager")
    train(path)
    logging.getLogger("pixart_model").warning("compiled %d programs", counters["stats"]["unique_graphs"])


def train(path):
    """Train by a job file, as the command does."""
    from pixart_data.config import load
    from pixart_model import config
    from pixart_model.train import run

    run(load(config.Train, path))
