"""What `pixart submit --on slurm|k8s` applies and `--print` shows: scripts and YAML made from a job file."""

import argparse
import logging
import subprocess
from collections.abc import Iterator
from typing import Any

from jobs import autoscaling, kubernetes, slurm
from jobs.shape import Parcel, Shape, pairs, shape_of
from pixart_data.config import Section, resolved_toml
from pixart_data.errors import ConfigError, JobError
from pixart_model.config import Train

log = logging.getLogger(__name__)

_TOOLS = {"slurm": ["sbatch"], "k8s": ["kubectl", "create", "-f", "-"]}
_KUBERNETES_HEAD = """\
# Needs KubeRay 1.5.1 or newer, and shared storage in the claims that are mounted.
#   start    kubectl create -f THIS_FILE
#   watch    kubectl get rayjob {name}; kubectl logs -f job/{name}
#   stop     kubectl delete -f THIS_FILE      (units in flight are lost, what is done stays done)
#   go on    kubectl delete -f THIS_FILE; kubectl create -f THIS_FILE
"""
_KUBERNETES_TRAINING_HEAD = """\
# Needs KubeRay 1.5.1 or newer, and shared storage in the claims that are mounted.
#   start    kubectl create -f THIS_FILE
#   watch    kubectl get rayjob {name}; kubectl logs -f job/{name}
#   stop     touch {run_dir}/stop (where the storage is mounted: all save; then kubectl delete -f THIS_FILE)
#   go on    kubectl delete -f THIS_FILE; kubectl create -f THIS_FILE
"""
_AUTOSCALING_HEAD = """\
# An autoscaling Ray cluster on AWS, for `ray up`. Nodes start when a job asks for them, and go when they are idle.
#   once     ray get-auth-token --generate    (the token in ~/.ray/auth_token opens the cluster)
#   start    ray up THIS_FILE
#   reach    ray dashboard THIS_FILE          (leave it running: http://127.0.0.1:8265)
#   submit   pixart submit {command} JOB_FILE {options}
#   end      ray down THIS_FILE
"""


def render(command: str, job: Section, options: argparse.Namespace, flags: str = "") -> str:
    """Return the manifest that runs a job where `options.on` says; one of `train` has been `with_workers`.

    Raises:
        ConfigError: If what was asked for cannot work there.
    """
    parcel = _parcel(command, job, flags)
    shape = shape_of(options, command)
    _check(parcel, job, shape, options.on)
    if options.on == "slurm":
        return slurm.script(parcel, shape, options.time, options.bin, pairs("--sbatch", options.sbatch))
    _check_storage(job, shape)
    if options.on == "k8s":
        labels = pairs("--node-label", options.node_label)
        parts = kubernetes.manifests(parcel, shape, labels, options.gpus)
        head = _KUBERNETES_TRAINING_HEAD if parcel.run_dir else _KUBERNETES_HEAD
        head = head.format(name=shape.name, run_dir=parcel.run_dir)
        return head + "---\n".join(_yaml(part) for part in parts)
    nodes = f"--nodes {shape.num_nodes} --gpus-per-node {shape.gpus_per_node}" if parcel.uses_ray else "--gpus 1"
    head = _AUTOSCALING_HEAD.format(command=command, options=nodes)
    return head + _yaml(autoscaling.cluster(parcel, shape, options.instance, options.region))


def with_workers(job: Section, options: argparse.Namespace) -> Section:
    """Return a job of `train` with as many workers as the nodes that are asked for have GPUs; others as they are.

    On Slurm the nodes have `torchrun`, and so Ray has no workers to start.

    Raises:
        ConfigError: If the job asks for another number of them, or its steps cannot be shared out among them.
    """
    if not isinstance(job, Train):
        return job
    told = job.run.num_workers
    if options.gpus and options.on != "slurm":
        if told or options.gpus != 1:
            raise ConfigError(
                f"--gpus {options.gpus:g}: expected --gpus 1 for train in one process, found "
                f"{f'run.num_workers = {told}' if told else 'more'}; for several GPUs leave it out, and give "
                "--nodes N --gpus-per-node M"
            )
        return job
    num_nodes = options.nodes or int(options.on != "ray" or options.print)
    asked = num_nodes * max(options.gpus_per_node, 1)
    if asked and told not in (0, asked):
        raise ConfigError(
            f"run.num_workers: expected {asked}, one for each GPU of {num_nodes} nodes with {options.gpus_per_node}, "
            f"found {told}; leave the key out, or give other --nodes and --gpus-per-node"
        )
    world, batches = asked or told, job.data.batches_per_step
    if world and batches % world:
        more, size = world * -(-batches // world), job.data.batch_size
        raise ConfigError(
            f"data.batches_per_step: expected a multiple of the {world} GPUs that train runs on, found {batches}; "
            f"give --set data.batches_per_step={more}, which makes a step of {more * size:,} samples in place of "
            f"{batches * size:,} (data.batch_size sets it right), or other --nodes and --gpus-per-node"
        )
    run = job.run.model_copy(update={"num_workers": 0 if options.on == "slurm" else world})
    return job.model_copy(update={"run": run})


def _parcel(command: str, job: Section, flags: str) -> Parcel:
    if isinstance(job, Train):
        return Parcel(command, resolved_toml(job), job.run.num_workers > 0, flags, job.run.output)
    return Parcel(command, resolved_toml(job), "cluster" in type(job).model_fields, flags)


def hand_over(text: str, target: str) -> int:
    """Give a manifest to the scheduler's own tool, show its answer, and return 0.

    Raises:
        JobError: If the tool is not here or refuses.
    """
    tool = _TOOLS[target]
    try:
        done = subprocess.run(tool, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise JobError(
            f"{tool[0]}: expected it on the PATH, found none; run this where {tool[0]} works, or add --print and "
            "take the file there"
        ) from error
    if done.returncode:
        raise JobError(f"{' '.join(tool)}: exited with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    if done.stderr.strip():
        log.warning("%s", done.stderr.strip())
    print(done.stdout, end="")
    return 0


def _check(parcel: Parcel, job: Section, shape: Shape, target: str) -> None:
    uses_torchrun = target == "slurm" and parcel.run_dir is not None
    if not parcel.uses_ray and not uses_torchrun and shape.num_nodes > 1:
        raise ConfigError(
            f"--nodes {shape.num_nodes}: {parcel.command} runs in one process, on one node; leave --nodes out"
        )
    address = getattr(getattr(job, "cluster", None), "address", "auto")
    if address != "auto":
        raise ConfigError(
            f"cluster.address: expected auto, found {address!r}: the job runs inside the cluster that it is given; "
            "leave the key out"
        )


def _check_storage(job: Section, shape: Shape) -> None:
    """Containers see what is mounted and nothing else of this machine's paths."""
    places = [path.rstrip("/") + "/" for _, path in shape.mounts]
    lost = [path for path in _paths(job.model_dump()) if not any(f"{path}/".startswith(place) for place in places)]
    if lost:
        raise ConfigError(
            f"{lost[0]}: expected a path on storage that the nodes mount, found "
            f"{', '.join(path for _, path in shape.mounts) or 'no mount'}; pass --mount SOURCE:/PATH for the folder "
            "that holds it, or write s3://... in the job file"
        )


def _paths(value: Any) -> Iterator[str]:
    """Yield the local paths in a resolved job: they are absolute, and nothing else starts with a slash."""
    if isinstance(value, str) and value.startswith("/"):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner)


def _yaml(tree: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Writes every value out, and text of several lines as it is."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=1000))
