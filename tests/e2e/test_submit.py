"""`pixart submit` on a real head that this test starts, on ports and in a folder of its own, and ends by its group."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

START_S = 60


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head():
    """A head of one CPU; yields the address of its dashboard and the token that opens it."""
    # Sockets have short names: not below pytest's deep folders.
    folder = Path(tempfile.mkdtemp(prefix="pixart-ray-", dir="/tmp"))
    port, dashboard, client, agent, metrics = free_ports(5)
    token = folder / "token"
    token.write_text("0" * 64)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    words = ["start", "--head", "--block", "--num-cpus=1", "--include-dashboard=true", "--disable-usage-stats"]
    words += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    words += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    words += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", f"--object-store-memory={100 << 20}"]
    with (folder / "head.log").open("wb") as log:
        ray = [str(Path(sys.executable).parent / "ray"), *words]
        process = subprocess.Popen(ray, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, token.read_text(), process, folder / "head.log")
        yield address, token
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address, token, process, log):
    """Wait until the agent that starts jobs answers, not only the dashboard."""
    deadline_s = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)


@pytest.fixture
def submit(head, pixart):
    address, token = head

    def run(*words, token=token, **options):
        environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
        return pixart("submit", *words, "--address", address, env=environment, **options)

    return run


def test_a_submitted_job_runs_on_the_cluster_and_its_exit_code_comes_back(submit, job_file, tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"caption": "a red house and a tree"}\n' * 3)
    sets = [{"name": "mine", "path": str(tmp_path / "captions.jsonl")}]
    job = {"output": str(tmp_path / "report"), "approximate": True, "sets": sets}
    done = submit("stats", job_file("stats", job))
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "report/report.html").is_file()
    assert "3 in = 3 out + 0 rejected" in done.stdout
    assert "connecting to Ray" in done.stdout + done.stderr  # the cluster itself, and not a new one in the job
    sets[0]["column"] = "no_such_column"
    failed = submit("stats", job_file("stats", job))
    assert failed.returncode == 2, failed.stderr + failed.stdout
    assert "expected a column 'no_such_column', found caption" in failed.stdout


def test_a_wrong_token_is_one_line(submit, tmp_path):
    (tmp_path / "token").write_text("1" * 64)
    refused = submit("verify", tmp_path, token=tmp_path / "token")
    assert refused.returncode == 4
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("pixart")]
    assert "the cluster wants a token, and refused ours or found none" in line


def test_a_job_can_be_left_looked_at_and_stopped(submit, job_file, tmp_path):
    """It waits for more nodes than there are, so that it runs for as long as nobody stops it."""
    (tmp_path / "captions.jsonl").write_text('{"caption": "a red house"}\n')
    sets = [{"name": "mine", "path": str(tmp_path / "captions.jsonl")}]
    job = job_file("stats", {"output": str(tmp_path / "report"), "approximate": True, "sets": sets})
    left = submit("stats", job, "--nodes", "3", "--gpus-per-node", "0", "--no-follow")
    assert left.returncode == 0, left.stderr
    name = left.stdout.strip()
    deadline_s = time.monotonic() + START_S
    while "nodes: 1 of 3 have joined" not in (logs := submit("logs", name, "--no-follow").stdout):
        assert time.monotonic() < deadline_s, logs
    assert f"{name}  stats  RUNNING" in submit("status", name).stdout
    stopped = submit("stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert f"{name}  stats  STOPPED" in stopped.stdout
    assert not (tmp_path / "report/report.html").exists()
    unknown = submit("stop", "raysubmit_nobody")
    assert unknown.returncode == 2
    assert "raysubmit_nobody: expected a job of the cluster" in unknown.stderr
