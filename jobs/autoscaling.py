"""`pixart submit --on ray --print`: the YAML of an autoscaling Ray cluster on AWS, for `ray up`.

The head directs and is billed on demand; nodes with GPUs are there while there is work for them, and come back when a
spot machine is taken away.
"""

from typing import Any

from jobs.shape import Parcel, Shape

_HEAD_INSTANCE = "m5.2xlarge"
_IDLE_MINUTES = 5
_DISK_GB = 200
# What Ray makes for the head, which it lets read and write S3; with a bucket policy of your own, name that one.
_PROFILE = "ray-autoscaler-v1"


def cluster(parcel: Parcel, shape: Shape, instance: str, region: str) -> dict[str, Any]:
    """Return the cluster's configuration, in the form of Ray's own schema.

    Raises:
        ConfigError: If no image is named.
    """
    shape.require_image()
    market = {"InstanceMarketOptions": {"MarketType": "spot"}} if shape.is_spot else {}
    profile = {"IamInstanceProfile": {"Name": _PROFILE}} if "s3://" in parcel.job_toml else {}
    start = "RAY_AUTH_MODE=token ray start"
    return {
        "cluster_name": shape.name,
        "max_workers": shape.num_nodes,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": shape.image,
            "container_name": "pixart",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", *(f"-v {path}:{path}" for _, path in shape.mounts)],
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},
                "node_config": {"InstanceType": _HEAD_INSTANCE, **_disk()},
            },
            "worker": {
                "min_workers": 0,
                "max_workers": shape.num_nodes,
                "resources": {"CPU": shape.cpus_per_node, "GPU": shape.gpus_per_node},
                "node_config": {"InstanceType": instance, **market, **profile, **_disk()},
            },
        },
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "initialization_commands": [line for source, path in shape.mounts for line in _mount(source, path)],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _mount(source: str, path: str) -> list[str]:
    """Mount on the host, before its container starts: FSx for Lustre (`NAME@tcp:/MOUNT`), else NFS such as EFS."""
    kind = "-t lustre -o relatime,flock" if "@tcp" in source else "-t nfs4"
    return [f"sudo mkdir -p {path}", f"mountpoint -q {path} || sudo mount {kind} {source} {path}"]


def _disk() -> dict[str, Any]:
    return {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": _DISK_GB, "VolumeType": "gp3"}}]}
