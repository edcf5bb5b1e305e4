"""Wait until the nodes of a cluster have joined: `python -m jobs.nodes 8 --gpus-per-node 8`.

A command divides the cluster that it finds when it starts. What `pixart submit` renders therefore runs this first; a
node that joins later would be left without work.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pixart_data.errors import JobError, PixArtError

log = logging.getLogger(__name__)

_POLL_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Wait as the command line says; exit with 0, or with 4 if too few nodes have joined in time."""
    args = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        import ray

        _connect(ray, args.timeout_s)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what has to be taken back
        if args.ask:
            ask(args.nodes, args.gpus_per_node)
        try:
            wait(args.nodes, args.gpus_per_node, args.timeout_s, args.at_least or args.nodes, ray.nodes)
        finally:
            if args.ask:  # a request stands until it is taken back, and would keep idle nodes for ever
                ask(0, 0)
            ray.shutdown()
    except PixArtError as error:
        print(f"pixart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def wait(
    num_nodes: int, gpus_per_node: int, timeout_s: float, at_least: int, nodes: Callable[[], list[dict[str, Any]]]
) -> int:
    """Wait until that many nodes with that many GPUs are alive, and return their number.

    Without GPUs every node counts that offers CPUs: a head that only directs offers none.

    Args:
        at_least: With so many the work may begin when the time is up.
        nodes: Returns Ray's list of nodes.

    Raises:
        JobError: If fewer than `at_least` have joined when the time is up.
    """
    deadline_s = time.monotonic() + timeout_s
    told = -1
    while True:
        joined = sum(_counts(node, gpus_per_node) for node in nodes())
        if joined != told:
            log.info("nodes: %d of %d have joined", joined, num_nodes)
            told = joined
        if joined >= num_nodes:
            return joined
        if time.monotonic() >= deadline_s:
            break
        time.sleep(_POLL_S)  # Ray's public interface has no event for a node that joins
    kind = f"nodes with {gpus_per_node} GPUs" if gpus_per_node else "nodes"
    if joined >= at_least:
        log.warning("nodes: going on with %d of %d %s after %g s", joined, num_nodes, kind, timeout_s)
        return joined
    raise JobError(
        f"nodes: expected {num_nodes} {kind}, found {joined} after {timeout_s:g} s; see the log of the missing ones, "
        "or ask for fewer with --nodes or --gpus-per-node"
    )


def ask(num_nodes: int, gpus_per_node: int) -> None:
    """Ask the autoscaler for nodes now rather than one by one; 0 nodes: take the request back."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"GPU": gpus_per_node} if gpus_per_node else {"CPU": 1}
    request_resources(bundles=[bundle] * num_nodes)


def _counts(node: dict[str, Any], gpus_per_node: int) -> bool:
    if not node["Alive"]:
        return False
    resources = node["Resources"]
    return bool(resources.get("GPU", 0) >= gpus_per_node if gpus_per_node else resources.get("CPU", 0) > 0)


def _connect(ray: Any, timeout_s: float) -> None:
    """Connect to the cluster that RAY_ADDRESS names, which may still be starting.

    Ray itself would try for many minutes; a plain connection tells sooner whether anybody listens.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, sign, port = address.rpartition(":")
    if not sign or not port.isdecimal():
        raise JobError(f"RAY_ADDRESS: expected HOST:PORT of a running head, found {address!r}; set it")
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_POLL_S).close()
            break
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise JobError(
                    f"{address}: expected a Ray head to answer within {timeout_s:g} s: {error}; see the head's log"
                ) from error
            time.sleep(_POLL_S)  # nothing tells when a port on another machine opens
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"{address}: expected a Ray head, found none: {error}; see the head's log") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.nodes", description="Wait until nodes have joined.")
    parser.add_argument("nodes", type=int, help="how many")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="count only nodes with so many GPUs")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="default: 900")
    parser.add_argument("--at-least", type=int, help="go on with so many when the time is up (default: all)")
    parser.add_argument("--ask", action="store_true", help="ask the cluster's autoscaler for them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
