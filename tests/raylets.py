"""A small Ray cluster of several nodes on this machine whose processes are there to be killed. Linux only."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_START_S = 120.0
_HEADS = 3  # that are tried


def adopt() -> None:
    """Make this process the parent of every process below it whose own parent dies, so that none gets out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl refused to make this process a subreaper")


def below(process: psutil.Process) -> list[psutil.Process]:
    """Return all processes below one that lives; none if it does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def send(processes: list[psutil.Process], number: int) -> int:
    """Send a signal to processes and return how many were alive to get it."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                process.send_signal(number)
                count += 1
    return count


def bury(known: set[int]) -> None:
    """Reap adopted children that are dead; those of the numbers `known` are waited for by whoever started them."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in known and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def end_all(timeout_s: float = 30.0) -> None:
    """Kill everything below this process, which is what it started and what it adopted."""
    deadline_s = time.monotonic() + timeout_s
    while left := below(psutil.Process()):
        send(left, signal.SIGKILL)
        bury(set())
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"still there after SIGKILL: {left}")
        time.sleep(0.05)


@dataclass
class Node:
    """`ray start --block` and what it has started."""

    process: psutil.Popen
    log: Path

    def raylets(self) -> list[psutil.Process]:
        """The node's raylet; empty if it is dead."""
        return [process for process in below(self.process) if _name(process) == "raylet"]

    def workers(self) -> list[psutil.Process]:
        """The pipeline's actors on this node."""
        found = (process for raylet in self.raylets() for process in below(raylet))
        return [process for process in found if _name(process).startswith("ray::Worker")]


class Cluster:
    """A head and further nodes, of one CPU each.

    Attributes:
        environment: What drivers need to find it, besides what was given.
    """

    def __init__(self, environment: dict[str, str], logs: Path, num_nodes: int = 3) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pxr-", dir="/tmp"))  # sockets lie in it, and have short names
        token = self.folder / "token"
        token.write_text("0" * 64)
        self.environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "2000",  # else a lost node is missed only after half a minute
            "RAY_health_check_period_ms": "1000",
        }
        self.logs, self.num_nodes = logs, num_nodes
        self.nodes: list[Node] = []
        self._num_started = 0
        self._wanted_s: list[float] = []

    def start(self) -> None:
        """Start all nodes; returns when the head answers.

        Raises:
            TimeoutError: If it does not, three times.
        """
        heads = [self._start_head() for _ in range(_HEADS) if not self.nodes]
        if not self.nodes:
            raise TimeoutError(f"the head of the cluster did not start: {heads[-1].log.read_text()[-2000:]}")
        self._wanted_s = [0.0] * (self.num_nodes - 1)
        self.mend()

    def _start_head(self) -> Node:
        """Ray gives a raylet thirty seconds to start, which a busy machine may need: then there are no nodes."""
        port, client = _free_port(), _free_port()
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        words = ["--head", f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={self.folder}"]
        head = self._start([*words, "--include-dashboard=false", "--node-ip-address=127.0.0.1"])
        deadline_s = time.monotonic() + _START_S
        while "Ray runtime started" not in head.log.read_text():
            if head.process.poll() is not None or time.monotonic() > deadline_s:
                send([*below(head.process), head.process], signal.SIGKILL)
                head.process.wait()
                self.nodes.remove(head)
                break
            time.sleep(0.1)
        return head

    def mend(self) -> None:
        """Start the nodes whose time has come, and count those that were lost in another way."""
        for node in self.nodes[1:]:
            if node.process.poll() is not None:
                self.nodes.remove(node)
                self._wanted_s.append(0.0)
        due = [at_s for at_s in self._wanted_s if at_s <= time.monotonic()]
        self._wanted_s = [at_s for at_s in self._wanted_s if at_s > time.monotonic()]
        for _ in due:
            self._start([f"--address={self.environment['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1"])

    def lose_node(self, choice: float, back_after_s: float) -> int:
        """Kill the raylet of a node that is not the head, chosen by a number in [0, 1); return how many died."""
        nodes = [node for node in self.nodes[1:] if node.raylets()]
        if not nodes:
            return 0
        node = nodes[int(choice * len(nodes))]
        self.nodes.remove(node)
        self._wanted_s.append(time.monotonic() + back_after_s)
        return send(node.raylets(), signal.SIGKILL)

    def lose_head(self) -> int:
        """Kill the head, all of it at once; return 1. The other nodes are left to themselves."""
        head = self.nodes[0]
        send([*below(head.process), head.process], signal.SIGKILL)
        head.process.wait()
        return 1

    def restart(self) -> None:
        """Make an end of what is left of all nodes, and start anew."""
        for node in self.nodes:
            send([*below(node.process), node.process], signal.SIGKILL)
            node.process.wait()
        self.nodes, self._wanted_s = [], []
        self.start()

    def workers(self) -> list[psutil.Process]:
        """The pipeline's actors, orphans of lost nodes not among them."""
        return [worker for node in self.nodes for worker in node.workers()]

    def close(self) -> None:
        """Delete the cluster's files; its processes are dead."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, words: list[str]) -> Node:
        self._num_started += 1
        log = self.logs / f"node-{self._num_started:03d}.log"
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
        ray += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={80 << 20}"]  # 0: any free port
        ray += [f"--dashboard-agent-listen-port={_free_port()}", f"--metrics-export-port={_free_port()}"]
        with log.open("wb") as output:
            process = psutil.Popen(
                [*ray, *words], env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        self.nodes.append(Node(process, log))
        return self.nodes[-1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        name = process.name()
        return (process.cmdline() or [name])[0] if name.startswith("ray::") else name
    return ""
