"""`pixart submit`: the same command on a running Ray cluster, through Ray's job API, or on what `--on` names.

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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.manifests import hand_over, render, with_workers
from pixart_data.config import Section, resolved_toml
from pixart_data.errors import ConfigError, JobError
from pixart_model.config import Train

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_GRACE_S = {"train": 300}  # a checkpoint is large
_GRACE_OF_OTHERS_S = 30
_KILL_S = 30  # Ray kills after the grace; then the cluster has to take note of it
_JOB_FILE = "job.toml"
_IN_PROCESS = ("train", "sample")  # unless told, not by workers, which get GPUs of their own


def submit(command: str, job: Section, options: argparse.Namespace, flags: str = "") -> int:
    """Submit a command and, on a Ray cluster, follow its log to the end and return its exit code.

    Raises:
        ConfigError: If what was asked for cannot work on the target.
        JobError: If the cluster does not answer or loses the job, or the scheduler's tool is missing or refuses.
    """
    job = with_workers(job, options)
    if options.on != "ray" or options.print:
        text = render(command, job, options, flags)
        if not options.print and not options.dry_run:
            return hand_over(text, options.on)
        print(text, end="")
        return 0
    address = _address(options)
    spreads = command not in _IN_PROCESS or (isinstance(job, Train) and job.run.num_workers > 0)
    entrypoint = _entrypoint(command, options, flags)
    if options.dry_run:
        print(f"submit: to {address}: {entrypoint}\n\n{_JOB_FILE}:\n{resolved_toml(job)}", end="")
        return 0
    client = _connect(address)
    log.info("submitting to the cluster at %s", address)
    if not spreads and not options.gpus:
        more = ", or several with --nodes N --gpus-per-node M" if command == "train" else ""
        log.warning("%s runs without a GPU: it was not given one with --gpus 1%s", command, more)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _JOB_FILE).write_text(resolved_toml(job))
        environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_grace_s(command))}
        try:
            name = client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={"pixart": command},
                entrypoint_num_gpus=options.gpus or None,
            )
        except (RuntimeError, OSError) as error:  # the errors of requests are of the second kind
            raise JobError(f"{address}: the cluster refused the job: {error}") from error
    there = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    log.info("submitted %s as %s; stop it with: pixart submit stop %s%s", command, name, name, there)
    if options.no_follow:
        print(name)
        return 0
    return _follow(client, name, address)


def attend(word: str, name: str | None, options: argparse.Namespace) -> int:
    """Do what `pixart submit status|logs|stop [ID]` says, for a job on a Ray cluster.

    Raises:
        ConfigError: If the cluster knows no such job.
        JobError: If the cluster does not answer, or a job does not stop.
    """
    address = _address(options)
    client = _connect(address)
    if name is None:
        with _answers(address):
            jobs = client.list_jobs()
        ours = [info for info in jobs if "pixart" in (info.metadata or {})]
        print("\n".join(_line(info) for info in sorted(ours, key=lambda info: info.start_time or 0)) or "no jobs")
        return 0
    info = _info(client, name, address)
    if word == "logs":
        if not options.no_follow:
            return _follow(client, name, address)
        with _answers(address):
            print(client.get_job_logs(name), end="")
        return 0
    if word == "stop":
        info = _stop(client, info, address)
    print(_line(info))
    return 0


def _address(options: argparse.Namespace) -> str:
    return options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def _entrypoint(command: str, options: argparse.Namespace, flags: str) -> str:
    # The cluster's own `pixart`, or, where its dashboard was started without the environment's bin folder on the PATH,
    # the interpreter of this machine: the head of a cluster on a laptop.
    words = f"{command} {_JOB_FILE}{flags}"
    wait = ""
    if options.nodes:
        fewer = "" if command == "train" else " --at-least 1"  # training takes all that it was promised
        wait = f"-m jobs.nodes {options.nodes} --gpus-per-node {options.gpus_per_node} --ask{fewer} && "
    there = f"{wait and 'python ' + wait}exec pixart {words}"
    python = shlex.quote(sys.executable)
    here = f"{wait and python + ' ' + wait}exec {python} -m jobs.cli {words}"
    return f"if command -v pixart >/dev/null; then {there}; else {here}; fi"


def show_token() -> None:
    """Have Ray show the token that is here to a cluster.

    Ray starts clusters with token authentication, yet sends no token unless told so before it is imported.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() or os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(address: str) -> Any:
    show_token()
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


@contextmanager
def _answers(address: str) -> Iterator[None]:
    """Turn what can go wrong on the way to the cluster into one line."""
    from aiohttp import ClientError

    try:
        yield
    except (RuntimeError, OSError, ClientError) as error:
        raise JobError(f"{address}: the cluster does not answer: {error}; is its dashboard running?") from error


def _info(client: Any, name: str, address: str) -> Any:
    try:
        with _answers(address):
            return client.get_job_info(name)
    except JobError as error:
        if "404" not in str(error):  # Ray's client puts the status of the answer into its words
            raise
        raise ConfigError(
            f"{name}: expected a job of the cluster at {address}, found none; list them with: pixart submit status"
        ) from error


def _grace_s(command: str) -> int:
    """Return how long a job of a command may take to end in order."""
    return _GRACE_S.get(command, _GRACE_OF_OTHERS_S)


def _stop(client: Any, info: Any, address: str) -> Any:
    """Ask a job to stop, and wait until it has saved, or finished or dropped its units, and is gone."""
    name, command = info.submission_id, (info.metadata or {}).get("pixart", "")
    stop_s = _grace_s(command) + _KILL_S

    async def end_of_log() -> None:
        async for _ in client.tail_job_logs(name):
            pass

    with _answers(address):
        if not client.stop_job(name):
            log.info("%s was not running", name)
            return client.get_job_info(name)
        what = "save" if command == "train" else "finish or drop its units"
        log.info("asked %s to stop; it may take %d s to %s", name, _grace_s(command), what)
        deadline_s = time.monotonic() + stop_s
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                asyncio.run(asyncio.wait_for(end_of_log(), max(left_s, 0.1)))  # the log ends when the job does
            except TimeoutError:
                left_s = 0.0
            info = client.get_job_info(name)
            if info.status.is_terminal():
                return info
            if left_s <= 0:
                raise JobError(
                    f"{name}: still {info.status} {stop_s:g} s after it was asked to stop; ask again, or look at: "
                    f"pixart submit logs {name}"
                )
            time.sleep(0.5)  # the log may end a moment before the status says so


def _line(info: Any) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.start_time / 1000)) if info.start_time else "-"
    seconds = int(((info.end_time or time.time() * 1000) - (info.start_time or 0)) / 1000) if info.start_time else 0
    lasted = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    command = (info.metadata or {}).get("pixart", "-")
    code = "" if info.driver_exit_code is None else f"  exit code {info.driver_exit_code}"
    return f"{info.submission_id}  {command}  {info.status}  since {started}  for {lasted}{code}"


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
            f"\nno longer following; {name} goes on. Stop it: pixart submit stop {name} --address {address}",
            file=sys.stderr,
        )
        return 130
    except (RuntimeError, OSError, ClientError) as error:
        raise JobError(
            f"{address}: lost sight of {name}: {error}; see pixart submit logs {name} --address {address}"
        ) from error
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if str(info.status) == "SUCCEEDED":
        return 0
    raise JobError(f"{name}: {info.status}: {info.message}")
