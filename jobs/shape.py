"""What `pixart submit` is told on its command line: where the work goes, and the nodes it is given there.

Only the standard library is imported: `pixart --help` builds this parser.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pixart_data.errors import ConfigError

TARGETS = ("ray", "slurm", "k8s")
WATCHED = {
    "status": "say how a job on a Ray cluster is, or list all",
    "logs": "follow the log of a job on a Ray cluster, and exit as the job does",
    "stop": "stop a job on a Ray cluster in order, and wait until it is gone",
}
MOUNT_FORM = "SOURCE:/PATH"


@dataclass(frozen=True)
class Parcel:
    """A command and its resolved job file, ready to travel.

    Attributes:
        job_toml: The resolved job file; its paths are absolute.
        uses_ray: Whether the command spreads over a Ray cluster; `sample` and the like run in one process.
        run_dir: Of `train`: where it saves, and looks for the file that asks it to stop.
    """

    command: str
    job_toml: str
    uses_ray: bool
    flags: str = ""
    run_dir: str | None = None

    def words(self, job_file: str) -> str:
        """Return the command line for a job file at that place, without quoting: `caption job.toml -v`."""
        return f"{self.command} {job_file}{self.flags}"


@dataclass(frozen=True)
class Shape:
    """The nodes that a scheduler or a cloud is asked for.

    Attributes:
        memory_gib: Of each node with GPUs, host memory.
        mounts: Shared storage: what is mounted (a volume claim, a file server's export) and the path on the nodes.
    """

    name: str
    num_nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_gib: int
    is_spot: bool = False
    image: str | None = None
    mounts: tuple[tuple[str, str], ...] = ()

    def require_image(self) -> None:
        """Raise ConfigError if no container image is named."""
        if not self.image:
            raise ConfigError(
                "--image: expected a container image with the toolkit and Ray in it, found none; build one from the "
                "guide of clusters, push it, and pass --image REGISTRY/pixart:TAG"
            )


def submit_parser() -> argparse.ArgumentParser:
    """Return the parser of what `submit` itself takes."""
    sub = argparse.ArgumentParser(
        prog="pixart submit",
        usage="pixart submit COMMAND [job.toml ...] [--on ray|slurm|k8s] [--print] [--nodes N] ...\n"
        "       pixart submit status|logs|stop [ID] [--address URL]",
        description=(
            "Run a command line on a Ray cluster, follow its log, and exit as it does; or hand it to Slurm or "
            "Kubernetes. COMMAND and what follows it are typed as without submit: "
            "pixart submit caption job.toml --address http://HEAD:8265"
        ),
        epilog="status, logs and stop are for jobs on a Ray cluster; status without an ID lists them.",
        allow_abbrev=False,
    )
    sub.add_argument("--address", help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS or 127.0.0.1:8265")
    sub.add_argument("--gpus", type=float, default=0.0, help="GPUs for the command itself: sample, and train on one")
    sub.add_argument("--no-follow", action="store_true", help="print the job's ID and stop; logs: what there is so far")
    sub.add_argument("--dry-run", action="store_true", help="validate, show what would be submitted, and stop")
    _add_places(sub)
    return sub


def watch_parser() -> argparse.ArgumentParser:
    """Return the parser of `status`, `logs` and `stop` behind `submit`."""
    top = argparse.ArgumentParser(prog="pixart submit", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    for word, text in WATCHED.items():
        sub = commands.add_parser(word, help=text, description=text, allow_abbrev=False)
        sub.add_argument("id", nargs="?" if word == "status" else None, help="as submit said it: raysubmit_...")
        sub.add_argument("-v", "--verbose", action="store_true", help="say more")
        sub.add_argument("--log-json", action="store_true", help="log one JSON object a line to stderr")
        sub.set_defaults(usage=sub)
    return top


def _add_places(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--on", choices=TARGETS, default="ray", help="default: a Ray cluster, through its job API")
    sub.add_argument("--print", action="store_true", help="print what would be applied, to keep and to edit, and stop")
    sub.add_argument("--name", help="of the job or cluster (default: pixart-COMMAND)")
    nodes = sub.add_argument_group("the nodes")
    nodes.add_argument("--nodes", type=_count, metavar="N", help="nodes that do the work (default: 1)")
    nodes.add_argument("--gpus-per-node", type=_amount, default=8, metavar="N", help="default: 8; 0: none")
    nodes.add_argument("--cpus-per-node", type=_count, metavar="N", help="default: 8 for each GPU, or 8")
    nodes.add_argument("--memory-gib", type=_count, metavar="N", help="of a node (default: 32 for each GPU, or 32)")
    nodes.add_argument("--spot", action="store_true", help="k8s and ray: machines that may be taken back")
    nodes.add_argument("--image", help="k8s and ray: container image with the toolkit and Ray in it")
    nodes.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar=MOUNT_FORM,
        help="k8s and ray: shared storage, e.g. CLAIM:/data, or SERVER:/export:/data; may be repeated",
    )
    slurm = sub.add_argument_group("--on slurm")
    slurm.add_argument("--time", default="1-00:00:00", help="limit, after which the job queues again (default: a day)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="e.g. partition=gpu")
    slurm.add_argument("--bin", default=str(Path(sys.executable).parent), help="folder of `pixart` on the nodes")
    k8s = sub.add_argument_group("--on k8s")
    k8s.add_argument("--node-label", action="append", default=[], metavar="KEY=VALUE", help="of the nodes with GPUs")
    aws = sub.add_argument_group("--on ray --print: an autoscaling cluster on AWS")
    aws.add_argument("--instance", default="p4d.24xlarge", help="of the nodes with GPUs (default: p4d.24xlarge)")
    aws.add_argument("--region", default="us-east-1", help="default: us-east-1")


def shape_of(options: argparse.Namespace, command: str) -> Shape:
    """Return the nodes that a command line asks for.

    Raises:
        ConfigError: If a name or a mount cannot be read.
    """
    name = options.name or f"pixart-{command}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):  # what Kubernetes takes, and leaves room for
        raise ConfigError(
            f"--name {name}: expected up to 40 lower-case letters, digits and hyphens, first a letter; "
            "e.g. --name pixart-caption"
        )
    gpus = options.gpus_per_node
    return Shape(
        name=name,
        num_nodes=options.nodes or 1,
        gpus_per_node=gpus,
        cpus_per_node=options.cpus_per_node or 8 * max(gpus, 1),
        memory_gib=options.memory_gib or 32 * max(gpus, 1),
        is_spot=options.spot,
        image=options.image,
        mounts=tuple(_mount(text) for text in options.mount),
    )


def pairs(option: str, texts: list[str]) -> dict[str, str]:
    """Read repeated `KEY=VALUE`.

    Raises:
        ConfigError: If one has no key or no sign.
    """
    read = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"{option} {text}: expected KEY=VALUE, found no '='; e.g. {option} KEY=VALUE")
        read[key] = value
    return read


def _mount(text: str) -> tuple[str, str]:
    source, sign, path = text.rpartition(":")
    if not sign or not source or not path.startswith("/"):
        raise ConfigError(f"--mount {text}: expected {MOUNT_FORM}, found no path; e.g. --mount shared-data:/data")
    return source, path.rstrip("/") or "/"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def _amount(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
    return number
