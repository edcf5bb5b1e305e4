"""The rendered Slurm script, run for real on this machine: Slurm's two tools stand-ins, Ray and the command real."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cli
from tests.model.conftest import _own_cache, features, make_job  # noqa: F401 - fixtures

BIN = Path(sys.executable).parent
# Runs the command behind srun's own options. What would be the same port on two machines is moved for the worker here.
SRUN = """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#*=}
  shift
done
words=()
[[ " $* " == *" --head "* ]] && extra=" --object-store-memory=100000000"
for word in "$@"; do
  case $word in
    --dashboard-agent-listen-port=*) [[ -z $extra ]] && word=${word%%=*}=$((${word#*=} + 1));;
  esac
  words+=("$word")
done
echo "srun $*" >> "$SHIM_LOG"
export SLURM_CPUS_ON_NODE=1
if [[ $tasks -gt 1 ]]; then
  for ((i = 1; i < tasks; i++)); do "${words[@]}" & done
  "${words[@]}" || exit
  wait -n || exit
  exit 0
fi
exec "${words[@]}" $extra
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SHIM_LOG"
"""


@pytest.fixture
def batch(tmp_path, monkeypatch, capfd):
    """Render a script and start it as Slurm would; returns the process and the log of what it asked Slurm."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    started = []

    def start(*words, bin_folder=BIN):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["submit", *map(str, words), "--on", "slurm", "--print", "--bin", str(bin_folder)]) == 0
        script = tmp_path / "job.sbatch"
        script.write_text(capfd.readouterr().out)
        environment = {
            **os.environ,
            "PATH": f"{shims}:{os.environ['PATH']}",
            "SHIM_LOG": str(tmp_path / "asked"),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURMD_NODENAME": socket.gethostname(),
        }
        (tmp_path / "asked").touch()
        with (tmp_path / "batch.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", script], env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
            )
        started.append(process)
        return process, tmp_path / "asked", tmp_path / "batch.log"

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ray_starts_nodes_join_the_command_runs_and_nothing_is_left(batch, job_file, tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"caption": "a red house and a tree"}\n' * 3)
    sets = [{"name": "mine", "path": str(tmp_path / "captions.jsonl")}]
    job = job_file("stats", {"output": str(tmp_path / "report"), "approximate": True, "sets": sets})
    process, asked, log = batch("stats", job, "--nodes", "2", "--gpus-per-node", "0")
    code = process.wait(150)
    text = log.read_text()
    assert code == 0, text
    assert "nodes: 2 of 2 have joined" in text
    assert "3 in = 3 out + 0 rejected" in text
    assert "connecting to Ray at" in text  # at the head that the script started
    assert "requeue" not in asked.read_text()
    assert not list(tmp_path.glob(".pixart-*"))  # the token is gone
    assert not Path(f"/tmp/pixart-{os.getpid()}").exists()


def stand_in(folder, text, name="pixart"):
    """A `pixart` that does as it is told in the place of a command that runs for hours."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


def wait_for(log, text):
    deadline_s = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


PATIENT = 'trap "echo dropped its units; exit 4" TERM; echo began; while true; do sleep 0.1; done'


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=lambda v: str(v))
def test_a_signal_lets_the_command_end_in_order(batch, tmp_path, sent, requeued):
    """USR1 is Slurm's notice before the time limit; TERM comes from scancel, after which nobody wants it back."""
    process, asked, log = batch("verify", tmp_path, bin_folder=stand_in(tmp_path / "bin", PATIENT))
    wait_for(log, "began")
    process.send_signal(sent)
    assert process.wait(30) == 4
    assert "dropped its units" in log.read_text()
    assert (f"scontrol requeue {os.getpid()}" in asked.read_text()) == requeued
    assert not list(tmp_path.glob(".pixart-*"))


def test_a_signal_to_the_steps_reaches_the_command(batch, tmp_path):
    """That is what scancel does when nothing else is said."""
    process, asked, log = batch("verify", tmp_path, bin_folder=stand_in(tmp_path / "bin", PATIENT))
    wait_for(log, "began")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [relay] = [pid for pid in children if b"relay" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    wait_for(Path(f"/proc/{relay}/task/{relay}/children"), " ")  # it sleeps, so it listens
    os.kill(int(relay), signal.SIGTERM)
    assert process.wait(30) == 4
    assert "dropped its units" in log.read_text()
    assert "requeue" not in asked.read_text()


def test_two_nodes_train_as_one_run(batch, make_job, job_file, tmp_path):  # noqa: F811
    job = make_job(run={"num_steps": 2, "output": str(tmp_path / "run")}, data={"batches_per_step": 2})
    path = job_file("train", job.model_dump(exclude_none=True))
    process, asked, log = batch("train", path, "--nodes", "2", "--gpus-per-node", "0")
    code = process.wait(150)
    text = log.read_text()
    assert code == 0, text
    assert text.count("step 0 of 2, on cpu, 2 processes (ddp)") == 1
    assert text.count(f"checkpoint: {tmp_path}/run/step_00000002") == 1
    assert "rank 1" not in text
    assert (tmp_path / "run/step_00000002/model.safetensors").is_file()
    assert "srun" in asked.read_text()
    assert "requeue" not in asked.read_text()


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=lambda v: str(v))
def test_training_is_asked_to_save_by_the_file(batch, make_job, job_file, tmp_path, sent, requeued):  # noqa: F811
    """It ends with 0 when it has saved, so a time limit puts it back whatever the code is."""
    run_dir = tmp_path / "it's a run"
    run_dir.mkdir()
    path = job_file("train", make_job(run={"output": str(run_dir)}).model_dump(exclude_none=True))
    patient = f'echo began; while [[ ! -e "{run_dir}/stop" ]]; do sleep 0.1; done; echo saved'
    folder = stand_in(tmp_path / "bin", patient, name="torchrun")
    process, asked, log = batch("train", path, "--gpus-per-node", "0", bin_folder=folder)
    wait_for(log, "began")
    process.send_signal(sent)
    assert process.wait(30) == 0
    assert "saved" in log.read_text()
    assert (f"scontrol requeue {os.getpid()}" in asked.read_text()) == requeued
    assert not list(tmp_path.glob(".pixart-*"))


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_the_command_s(batch, tmp_path, code):
    text = f'cat "$2" > {tmp_path}/seen.toml; echo "$1" > {tmp_path}/word; exit {code}'
    process, asked, _ = batch("verify", tmp_path, bin_folder=stand_in(tmp_path / "bin", text))
    assert process.wait(30) == code
    assert (tmp_path / "word").read_text() == "verify\n"
    assert f'path = "{tmp_path}"' in (tmp_path / "seen.toml").read_text()
    assert "requeue" not in asked.read_text()
