"""`pixart submit --on k8s`: a KubeRay RayJob with its job file in a ConfigMap.

KubeRay starts a head without GPUs and the workers, runs the command on the head, and deletes the cluster when it ends.
Field names: KubeRay's `ray.io/v1` API; `authOptions` needs KubeRay 1.5.1.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from jobs.shape import Parcel, Shape

GRACE_S = 60
_SAVING_GRACE_S = 360  # a checkpoint of `train` is large
_FOLDER = "/etc/pixart"
_OBJECT_STORE_BYTES = 1 << 30  # paths and records travel through Ray, pixels never do
_RETRIES = 2
_KEEP_S = 600
# Taints of machines that may be taken back: GKE, AKS. Elsewhere (Karpenter) they are chosen by a node label alone.
_SPOT_TAINTS = (("cloud.google.com/gke-spot", "true"), ("kubernetes.azure.com/scalesetpriority", "spot"))


def manifests(
    parcel: Parcel, shape: Shape, labels: Mapping[str, str], command_gpus: float = 0.0
) -> list[dict[str, Any]]:
    """Return the ConfigMap and the RayJob.

    Args:
        labels: Of the nodes that the workers must run on.
        command_gpus: GPUs for the command itself, which then runs on a worker: `sample`, and `train` in one process.

    Raises:
        ConfigError: If no image is named.
    """
    shape.require_image()
    return [_config_map(parcel, shape), _ray_job(parcel, shape, labels, command_gpus)]


def _config_map(parcel: Parcel, shape: Shape) -> dict[str, Any]:
    wait = f"python -m jobs.nodes {shape.num_nodes} --gpus-per-node {shape.gpus_per_node}\n" if parcel.uses_ray else ""
    run = f"set -e\n{wait}exec pixart {parcel.words(f'{_FOLDER}/job.toml')}\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": shape.name},
        "data": {"job.toml": parcel.job_toml, "run.sh": run},
    }


def _ray_job(parcel: Parcel, shape: Shape, labels: Mapping[str, str], command_gpus: float) -> dict[str, Any]:
    grace_s = _SAVING_GRACE_S if parcel.run_dir else GRACE_S
    stop_s = grace_s - GRACE_S // 2  # the rest is for Ray to end in
    environment = {"env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)}}
    spec: dict[str, Any] = {
        "entrypoint": f"bash {_FOLDER}/run.sh",
        "runtimeEnvYAML": json.dumps(environment),  # JSON is YAML
        # A command that failed, or whose head was lost, starts again on a new cluster and goes on where it was.
        "backoffLimit": _RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEEP_S,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {**_start_params(), "num-cpus": "0", "num-gpus": "0"},
                "template": head_pod(shape, grace_s),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "gpu" if shape.gpus_per_node else "cpu",
                    "replicas": shape.num_nodes,
                    "minReplicas": shape.num_nodes,
                    "maxReplicas": shape.num_nodes,
                    "rayStartParams": _start_params(),
                    "template": worker_pod(shape, labels, grace_s),
                }
            ],
        },
    }
    if command_gpus:
        spec["entrypointNumGpus"] = command_gpus
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": shape.name}, "spec": spec}


def head_pod(shape: Shape, grace_s: int) -> dict[str, Any]:
    """Return the pod template of the head: it directs, holds no GPU, and must not be taken back."""
    return {"spec": _pod(shape, "ray-head", {"cpu": "4", "memory": "16Gi"}, grace_s)}


def worker_pod(shape: Shape, labels: Mapping[str, str], grace_s: int) -> dict[str, Any]:
    """Return the pod template of the workers: a whole node's GPUs in each."""
    resources = {"cpu": str(shape.cpus_per_node), "memory": f"{shape.memory_gib}Gi"}
    spec: dict[str, Any] = {}
    tolerations = []
    if shape.gpus_per_node:
        resources["nvidia.com/gpu"] = str(shape.gpus_per_node)
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if shape.is_spot:
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in _SPOT_TAINTS
        ]
    if tolerations:
        spec["tolerations"] = tolerations
    if labels:
        spec["nodeSelector"] = dict(labels)
    return {"spec": {**spec, **_pod(shape, "ray-worker", resources, grace_s)}}


def _pod(shape: Shape, name: str, resources: dict[str, str], grace_s: int) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "job", "configMap": {"name": shape.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    mounts = [{"name": "job", "mountPath": _FOLDER}, {"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(shape.mounts):
        volumes.append({"name": f"data-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"data-{number}", "mountPath": path})
    return {
        "terminationGracePeriodSeconds": grace_s,
        "containers": [
            {
                "name": name,
                "image": shape.image,
                "resources": {"requests": dict(resources), "limits": dict(resources)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _start_params() -> dict[str, str]:
    return {"object-store-memory": str(_OBJECT_STORE_BYTES)}
