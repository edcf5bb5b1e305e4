"""Connecting to Ray, once for a command, and deciding what its workers get."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.config import Cluster
from pixart_data.errors import JobError

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 128 << 20  # paths and records travel, pixels never do


@dataclass(frozen=True)
class Share:
    """How many workers run and what each one gets."""

    num_workers: int
    num_cpus: float
    num_gpus: float


def connect(cluster: Cluster) -> None:
    """Connect this process to the cluster of a job: the running one, or one started here, which ends with the process.

    Keeps the connection that a caller, or an earlier run of the same command, has made.

    Raises:
        JobError: If the address does not answer.
    """
    if ray.is_initialized():
        return
    address = cluster.address
    if address == "auto":
        address = "auto" if os.environ.get("RAY_ADDRESS") else "local"
    # Ray would otherwise warn that it leaves CUDA_VISIBLE_DEVICES alone for workers without a GPU: it should.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            log.info("starting Ray on this machine")
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        else:
            log.info("connecting to Ray at %s", os.environ.get("RAY_ADDRESS", address))
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise JobError(f"cluster.address: Ray at {address} does not answer: {error}; is it running?") from error


def share(cluster: Cluster, num_units: int, per_cpu: bool = False) -> Share:
    """Divide the connected cluster: a worker for each GPU, or one on CPUs (with `per_cpu`, one for each).

    Raises:
        JobError: If no node has what one worker asks for; Ray would wait for such a node for ever.
    """
    nodes = [_Node(**_resources(node)) for node in ray.nodes() if node["Alive"]]
    gpu_nodes = [node for node in nodes if node.num_gpus]
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if gpu_nodes and not per_cpu else 0.0
    if gpus:
        default = sum(int(node.num_gpus / gpus) for node in nodes)
    else:
        default = int(sum(node.num_cpus for node in nodes)) if per_cpu else 1
    num_workers = max(1, min(cluster.num_workers or default, num_units))
    cpus = cluster.cpus_per_worker or _equal_share(nodes, num_workers, gpus, per_cpu)
    if not any(node.num_cpus >= cpus and node.num_gpus >= gpus for node in nodes):
        if not any(node.num_cpus for node in nodes):
            raise JobError(
                "cluster: expected a node with CPUs, found none that has joined; wait until they have, or submit with "
                "--nodes N, which waits for them"
            )
        largest = max(nodes, key=lambda node: (node.num_gpus, node.num_cpus))
        raise JobError(
            f"cluster: a worker asks for {cpus:g} CPUs and {gpus:g} GPUs, the largest node has {largest.num_cpus:g} "
            f"and {largest.num_gpus:g}; lower cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    return Share(num_workers, cpus, gpus)


@dataclass(frozen=True)
class _Node:
    num_cpus: float
    num_gpus: float


def _resources(node: dict[str, Any]) -> dict[str, float]:
    return {"num_cpus": node["Resources"].get("CPU", 0.0), "num_gpus": node["Resources"].get("GPU", 0.0)}


def _equal_share(nodes: list[_Node], num_workers: int, gpus: float, per_cpu: bool) -> float:
    """Return the CPUs that leave room for all workers of a node: decoding wants as many threads as there are."""
    if gpus:
        shares = [node.num_cpus // max(node.num_gpus / gpus, 1.0) for node in nodes if node.num_gpus >= gpus]
        return max(1.0, min(shares, default=1.0))
    if per_cpu:
        return 1.0
    per_node = -(-num_workers // len(nodes))
    return max(1.0, max(node.num_cpus for node in nodes) // per_node)
