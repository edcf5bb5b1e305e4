"""Connecting to Ray, once for a command, and deciding what its workers get."""

import logging
import os
from dataclasses import dataclass

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
    """Divide the connected cluster: a worker for each GPU, or one on CPUs (with `per_cpu`, one for each)."""
    resources = ray.cluster_resources()
    num_cpus, num_gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 0.0 if per_cpu or not num_gpus else 1.0
    if gpus > num_gpus:
        raise JobError(f"cluster.gpus_per_worker: {gpus:g} asked for, the cluster has {num_gpus:g}; lower it")
    wanted = cluster.num_workers or (int(num_gpus / gpus) if gpus else int(num_cpus) if per_cpu else 1)
    num_workers = max(1, min(wanted, num_units))
    cpus = cluster.cpus_per_worker or (1.0 if gpus or per_cpu else max(1.0, num_cpus // num_workers))
    if cpus > num_cpus:
        raise JobError(f"cluster.cpus_per_worker: {cpus:g} asked for, the cluster has {num_cpus:g}; lower it")
    return Share(num_workers, cpus, gpus)
