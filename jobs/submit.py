"""`pixart submit`: the same command on a running Ray cluster, through Ray's job API.

The job is validated here, its relative paths are made absolute, and only the resolved job file travels: the cluster has
the toolkit installed and sees the same storage.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from pixart_data.config import Section, resolved_toml
from pixart_data.errors import JobError

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_GRACE_S = 30
_JOB_FILE = "job.toml"
_IN_PROCESS = ("train", "sample")  # not by workers, which get GPUs of their own


def submit(command: str, job: Section, options: argparse.Namespace, verbose: bool = False) -> int:
    """Submit a command, follow its log to the end, and return its exit code.

    Raises:
        JobError: If the cluster does not answer or loses the job.
    """
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    # The cluster's own `pixart`, or, where its dashboard was started without the environment's bin folder on the PATH,
    # the interpreter of this machine: the head of a cluster on a laptop.
    words = f"{command} {_JOB_FILE}" + (" -v" if verbose else "")
    here = f"exec {shlex.quote(sys.executable)} -m jobs.cli {words}"
    entrypoint = f"if command -v pixart >/dev/null; then exec pixart {words}; else {here}; fi"
    if options.dry_run:
        print(f"submit: to {address}: {entrypoint}\n\n{_JOB_FILE}:\n{resolved_toml(job)}", end="")
        return 0
    client = _connect(address)
    log.info("submitting to the cluster at %s", address)
    if command in _IN_PROCESS and not options.gpus:
        log.warning("%s runs without a GPU: it was not given one with --gpus 1", command)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _JOB_FILE).write_text(resolved_toml(job))
        environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_S)}
        try:
            name = client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={"pixart": command},
                entrypoint_num_gpus=options.gpus or None,
            )
        except (RuntimeError, OSError) as error:  # the errors of requests are of the second kind
            raise JobError(f"{address}: the cluster refused the job: {error}") from error
    log.info("submitted %s as %s; stop it with: ray job stop %s --address %s", command, name, name, address)
    return _follow(client, name, address)


def _connect(address: str) -> Any:
    # Ray starts clusters with token authentication, yet its client sends no token unless told so before it is imported.
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() or os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise JobError(
            f"{address}: the cluster wants a token, and refused ours or found none; copy the head node's "
            "~/.ray/auth_token to this machine, or set RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"{address}: no Ray dashboard answers: {error}; start one with `ray start --head`") from error


def _follow(client: Any, name: str, address: str) -> int:
    from aiohttp import ClientError

    async def tail() -> None:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
        info = client.get_job_info(name)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; {name} goes on. Stop it: ray job stop {name} --address {address}", file=sys.stderr
        )
        return 130
    except (RuntimeError, OSError, ClientError) as error:
        raise JobError(f"{address}: lost sight of {name}: {error}; see ray job logs {name}") from error
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if str(info.status) == "SUCCEEDED":
        return 0
    raise JobError(f"{name}: {info.status}: {info.message}")
