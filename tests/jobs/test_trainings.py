"""`pixart status` of runs of `pixart train`: while they go on, after they were stopped, killed, or are done."""

import json
import socket
import time

import pytest

from jobs import cli
from pixart_data.leases import EXPIRE_S, FOLDER, last_holder, output_lock
from pixart_data.storage import write_atomic

LINE = {
    "step": 1200, "loss": 0.1234, "grad_norm": 0.012, "lr": 2e-5, "step_ms": 412, "data_share": 0.01,
    "images_per_s": 27650.4, "mfu": 0.412, "memory_bytes": 23_400_000_000, "num_processes": 64, "seconds_left": 7200,
    "gpu_hours": 12.0, "dollars": 18.84, "kwh": 4.8, "kg_co2": 1.92, "skipped": 0,
}  # fmt: skip


def status(capsys, *words):
    code = cli.main(["status", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def write_training(root, num_steps=150_000, saved=(1000,), silent_s=3000.0, **known):
    """Leave what a run leaves: its job, lines, and checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    line = {**LINE, "time_unix_s": time.time() - silent_s, **known}
    (root / "metrics.jsonl").write_text(f'{{"step": 20}}\n{json.dumps(line)}\n{{"st')
    (root / "config.toml").write_text(f"[run]\nnum_steps = {num_steps}\n[cost]\ndollars_per_gpu_hour = 2.0\n")
    for step in saved:
        (root / f"step_{step:08d}").mkdir()
        (root / f"step_{step:08d}" / "meta.json").write_text("{}")
    return root


def test_a_run_that_goes_on(capsys, tmp_path):
    root = write_training(tmp_path / "run")
    with output_lock(root):
        code, out, err = status(capsys, root)
    assert (code, err) == (0, "")
    for words in (
        f"train -> {root}", "state     running, last line 50 min ago, by ", "1,200 of 150,000 (0.8%) done",
        "the last checkpoint at 1,000", "loss      0.1234, gradient 0.012, learning rate 2e-05",
        "412 ms a step, 27,650.4 images/s, 1% of the time waiting for data, MFU 41.2%, 64 process(es)",
        "time left 2.0 h, until about ", "at most 23.4 GB in a process",
        "12.0 GPU-hours, $18.84, 4.80 kWh, 1.92 kg CO2 so far, about $274.84 in all",
    ):  # fmt: skip
        assert words in out, words
    assert "next" not in out


@pytest.mark.parametrize(
    ("released", "saved", "state", "advice"),
    [
        (True, (1000,), "stopped", "next      it was stopped; to go on where it was: pixart train "),
        (False, (1000,), "dead", "next      it was killed; to go on from the last checkpoint: pixart train "),
        (True, (1000, 150_000), "done", None),
    ],
)
def test_a_run_that_does_not_go_on_says_why_and_what_to_type(capsys, tmp_path, released, saved, state, advice):
    root = write_training(tmp_path / "run", saved=saved)
    claim = {"token": "t", "process": "here.0.0", "holder": "gpu-head, process 7", "released": released}
    write_atomic(root / FOLDER / "000003.json", json.dumps(claim).encode())
    leave_behind(root / FOLDER / "000003.json")
    _, out, _ = status(capsys, root)
    assert f"state     {state}, last line 50 min ago, last by gpu-head, process 7" in out
    assert "time left" not in out
    assert (advice is None) == ("next" not in out)
    if advice:
        assert f"{advice}{root}/config.toml" in out


@pytest.mark.parametrize(
    ("processes", "keys", "command"),
    [
        (1, "", "pixart train {}"),
        (2, "", "torchrun --nproc-per-node 2 --no-python pixart train {}"),
        (2, "num_workers = 2", "pixart train {}"),
        (64, "", "pixart train {}, with torchrun on each machine as before: it had 64 processes"),
    ],
)
def test_a_run_of_several_processes_goes_on_with_as_many(capsys, tmp_path, processes, keys, command):
    root = write_training(tmp_path / "run", num_processes=processes)
    (root / "config.toml").write_text(f"[run]\nnum_steps = 150000\n{keys}\n")
    _, out, _ = status(capsys, root)
    assert f"go on where it was: {command.format(root / 'config.toml')}\n" in out


def test_a_checkpoint_in_place_of_its_run_names_the_run(capsys, tmp_path):
    root = write_training(tmp_path / "run")
    code, out, err = status(capsys, root / "step_00001000")
    assert (code, out) == (2, "")
    assert f"step_00001000: expected a run, found a checkpoint of one; type pixart status {root}\n" in err


def leave_behind(path):
    """As a process of another machine that has not been heard of for a while."""
    import os

    past_s = time.time() - 2 * EXPIRE_S
    os.utime(path, (past_s, past_s))


def test_a_run_that_stopped_at_a_loss_names_the_step_until_it_has_gone_beyond_it(capsys, tmp_path):
    root = write_training(tmp_path / "run")
    (root / "nonfinite.json").write_text('{"step": 1215, "advice": "lower optim.lr"}')
    _, out, _ = status(capsys, root)
    assert "state     failed" in out
    assert f"the loss or the gradient of step 1,215 is not finite; its samples are in {root}/nonfinite.json" in out
    assert f"next      lower optim.lr: pixart train {root}/config.toml" in out
    with output_lock(root):
        assert "running" in status(capsys, root)[1]
    write_training(root, saved=(), step=1220)
    assert "failed" not in status(capsys, root)[1]


def test_an_alarm_that_is_older_than_the_last_line_is_not_how_the_run_ended(capsys, tmp_path):
    root = write_training(tmp_path / "run", silent_s=100.0)
    for age_s, state in ((200.0, "stopped"), (50.0, "failed")):
        (root / "nonfinite.json").write_text(json.dumps({"step": 1215, "time_unix_s": time.time() - age_s}))
        assert f"state     {state}" in status(capsys, root)[1]


def test_hours_are_those_of_the_device_that_was_used(capsys, tmp_path):
    assert "12.0 CPU-hours, " in status(capsys, write_training(tmp_path / "run", device="cpu"))[1]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_told_to_go_on_from_one(capsys, tmp_path):
    root = write_training(tmp_path / "run", saved=())
    claim = {"token": "t", "process": "here.0.0", "holder": "gpu-head, process 7"}
    write_atomic(root / FOLDER / "000003.json", json.dumps(claim).encode())
    leave_behind(root / FOLDER / "000003.json")
    assert "next      it was killed; to begin anew, for it has no checkpoint yet: pixart" in status(capsys, root)[1]


def test_all_figures_are_there_for_programs(capsys, tmp_path):
    root = write_training(tmp_path / "run")
    code, out, _ = status(capsys, root, "--json")
    [run] = json.loads(out)["runs"]
    assert code == 0
    assert {**LINE, **run} == run, "all of the last line"
    assert (run["stage"], run["state"], run["alive"], run["num_steps"], run["saved_step"]) == (
        "train", "stopped", False, 150_000, 1000,
    )  # fmt: skip
    assert run["silent_s"] == pytest.approx(3000, abs=60)
    assert run["dollars_in_all"] == pytest.approx(18.84 + 2 * 64 * 2.0), "2 hours are left, of 64 GPUs at $2"


def test_a_folder_of_runs_and_a_job_file_lead_to_them(capsys, tmp_path):
    for name in ("a", "b"):
        write_training(tmp_path / "runs" / name)
    _, out, _ = status(capsys, tmp_path / "runs")
    assert [line for line in out.splitlines() if "->" in line] == [
        f"train -> {tmp_path}/runs/a", f"train -> {tmp_path}/runs/b",
    ]  # fmt: skip
    (tmp_path / "train.toml").write_text(f'[run]\noutput = "{tmp_path}/runs/b"\nnum_steps = 3\n')
    assert f"train -> {tmp_path}/runs/b" in status(capsys, tmp_path / "train.toml")[1]


def test_a_run_that_has_no_line_yet_and_a_damaged_file(capsys, tmp_path):
    root = write_training(tmp_path / "run", saved=())
    (root / "metrics.jsonl").unlink()
    _, out, _ = status(capsys, root)
    assert "nothing measured yet" in out
    assert "0 of 150,000 (0.0%) done, no checkpoint yet" in out
    (root / "config.toml").write_text("run = [")
    code, _, err = status(capsys, root)
    assert code == 3
    assert "config.toml: cannot be read" in err


def test_the_last_holder_of_a_directory_is_known_and_nothing_is_taken(tmp_path):
    assert last_holder(tmp_path) is None
    with output_lock(tmp_path):
        holder = last_holder(tmp_path)
        assert (holder.released, holder.is_alive) == (False, True)
        assert socket.gethostname() in holder.name
    holder = last_holder(tmp_path)
    assert (holder.released, holder.is_alive) == (True, False)
    elsewhere = {"token": "t", "process": "other.1.2", "holder": "other, process 1"}
    write_atomic(tmp_path / FOLDER / "000009.json", json.dumps(elsewhere).encode())
    assert last_holder(tmp_path).is_alive, "it wrote a moment ago"
    leave_behind(tmp_path / FOLDER / "000009.json")
    assert not last_holder(tmp_path).is_alive
