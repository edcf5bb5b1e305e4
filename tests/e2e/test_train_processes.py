"""One run by two processes: exact to resume, the same samples as with one, and never left hanging."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from pixart_data.config import resolved_toml
from pixart_data.leases import output_lock
from pixart_model import checkpoint
from pixart_model import train as training
from tests import teams
from tests.model.conftest import _one_thread, _own_cache, damage, features, make_job  # noqa: F401 - fixtures

FOREVER = 100_000


@pytest.fixture
def copy_of_features(features, tmp_path):  # noqa: F811 - the fixture
    """The features with one damaged sample."""
    shutil.copytree(features, tmp_path / "copy")
    damage(tmp_path / "copy" / "text", "source/004")
    return tmp_path / "copy"


@pytest.fixture
def team(tmp_path, make_job):  # noqa: F811 - the fixture
    """Start processes on the tests' own job, by the name of its run, with what is to be otherwise in it."""
    started = []

    def start(name, size, target=teams.train, **sections):
        number = len(started)
        run = {"output": str(tmp_path / name), "save_every": 2, "keep_last": 99, **sections.pop("run", {})}
        data = {"batches_per_step": 4, **sections.pop("data", {})}
        path = tmp_path / f"{name}-{number}.toml"
        path.write_text(resolved_toml(make_job(run=run, data=data, **sections)))
        started.append(teams.Team(tmp_path / f"team-{number}", size, target, path))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def tensors(path):
    """All tensors of a checkpoint by file and name."""
    files = sorted(path.rglob("*.safetensors"))
    return {(str(file.relative_to(path)), key): value for file in files for key, value in load_file(file).items()}


def same(a, b, files=""):
    a, b = ({key: value for key, value in tensors(path).items() if files in key[0]} for path in (a, b))
    assert a, "there is something to compare"
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def keys_of(run_dir):
    """The keys of each batch that a run was trained on, by step and batch."""
    lines = [json.loads(line) for line in (run_dir / "keys.jsonl").read_text().splitlines()]
    return {(line["step"], line["batch"] + i): keys for line in lines for i, keys in enumerate(line["keys"])}


def told(run_dir, name):
    """A figure of each line of a run's metrics."""
    return [json.loads(line)[name] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("fsdp", 3)])  # of three, shares are uneven
def test_a_killed_run_of_several_processes_goes_on_bit_for_bit(team, tmp_path, parallel, size):
    data = {"batches_per_step": 2 * size}
    killed = team("cut", size, run={"num_steps": FOREVER, "parallel": parallel, "keep_last": 3}, data=data)
    killed.wait_for(tmp_path / "cut" / "step_00000004")
    killed.kill()
    assert [member.exitcode for member in killed.members] == [-signal.SIGKILL] * size
    reached = checkpoint.read_meta(checkpoint.latest(tmp_path / "cut")).step
    run = {"num_steps": reached + 3, "save_every": FOREVER, "parallel": parallel}
    rest, straight = (team(name, size, run=run, data=data) for name in ("cut", "straight"))
    assert rest.wait() == [0] * size, rest.errors()
    assert f"continuing from {tmp_path / 'cut'}" in rest.logs()[0]
    assert straight.wait() == [0] * size, straight.errors()
    last = f"step_{reached + 3:08d}"
    assert same(tmp_path / "cut" / last, tmp_path / "straight" / last)
    assert {"model.safetensors", "ema.safetensors"} < {file for file, _ in tensors(tmp_path / "cut" / last)}
    assert any("optimizer" in file for file, _ in tensors(tmp_path / "cut" / last))
    assert not list((tmp_path / "cut").glob(".tmp-*"))
    assert set(straight.logs()[1:]) == {""}, "only the first process talks"


def test_one_process_then_two_then_one_see_the_same_samples_in_the_same_steps(team, tmp_path):
    data = {"batches_per_step": 2}
    straight = team("straight", 1, run={"num_steps": 6, "log_keys": True}, data=data)
    parts = []
    for size, num_steps in ((1, 2), (2, 4), (1, 6)):
        part = team("changing", size, run={"num_steps": num_steps, "log_keys": True}, data=data)
        assert set(part.wait()) == {0}, part.errors()
        parts.append(keys_of(tmp_path / "changing"))
    assert straight.wait() == [0]
    whole = keys_of(tmp_path / "straight")
    assert sorted(whole) == [(1 + batch // 2, batch) for batch in range(12)]
    assert [max(step for step, _ in part) for part in parts] == [2, 4, 6]
    assert parts[0].items() <= parts[1].items() <= parts[2].items()
    assert parts[2] == whole
    for file in ("model.safetensors", "ema.safetensors"):  # the sum of two gradients has but one order
        assert same(tmp_path / "straight" / "step_00000006", tmp_path / "changing" / "step_00000006", file)
    lines = [json.loads(line) for line in (tmp_path / "changing" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 16, 16], "those of both processes"


def test_ddp_and_fsdp_go_on_from_each_other_and_agree(team, tmp_path):
    def go_on(name, num_steps, parallel):
        part = team(name, 2, run={"num_steps": num_steps, "parallel": parallel})
        assert part.wait() == [0, 0], part.errors()

    go_on("ddp", 5, "ddp")
    shutil.copytree(tmp_path / "ddp" / "step_00000002", tmp_path / "then fsdp" / "step_00000002")
    go_on("then fsdp", 4, "fsdp")
    shutil.copytree(tmp_path / "then fsdp" / "step_00000004", tmp_path / "then ddp" / "step_00000004")
    go_on("then ddp", 5, "ddp")
    straight, crossed = (tensors(tmp_path / name / "step_00000005") for name in ("ddp", "then ddp"))
    for key in (key for key in straight if key[0] in ("model.safetensors", "ema.safetensors")):
        torch.testing.assert_close(straight[key], crossed[key], rtol=0, atol=1e-6)


def test_compiled_blocks_train_as_those_that_are_not(team, tmp_path, make_job):  # noqa: F811 - the fixture
    run, data = {"num_steps": 2, "log_every": 1}, {"batches_per_step": 2}  # blocks have gradients from the second on
    runs = {
        parallel: team(parallel, 2, teams.train_compiled, run={**run, "parallel": parallel, "compile": True}, data=data)
        for parallel in ("ddp", "fsdp")
    }
    training.run(make_job(run={**run, "output": str(tmp_path / "plain")}, data=data))
    plain = tensors(tmp_path / "plain" / "step_00000002")
    for parallel, compiled in runs.items():
        assert compiled.wait() == [0, 0], compiled.errors()
        for log in compiled.logs():  # one for all blocks; another where a size was that of something else at first
            assert log.splitlines()[-1] in ("compiled 1 programs", "compiled 2 programs")
        for name in ("loss", "grad_norm"):
            assert told(tmp_path / parallel, name) == pytest.approx(told(tmp_path / "plain", name), rel=1e-4)
        found = tensors(tmp_path / parallel / "step_00000002")
        for key in (key for key in plain if key[0] == "model.safetensors"):
            torch.testing.assert_close(found[key], plain[key], rtol=0, atol=1e-5)


def test_all_leave_when_one_is_asked_to_and_the_same_command_goes_on(team, tmp_path):
    run = {"num_steps": FOREVER, "save_every": FOREVER}
    asked = team("run", 2, run=run)
    asked.wait_for(tmp_path / "run" / "metrics.jsonl")
    asked.send(signal.SIGTERM, 1)
    assert asked.wait() == [0, 0], asked.errors()
    left = checkpoint.read_meta(checkpoint.latest(tmp_path / "run")).step
    assert f"left at step {left} of {FOREVER} as asked" in asked.logs()[0]
    again = team("run", 2, run={**run, "num_steps": left + 1})
    assert again.wait() == [0, 0], again.errors()
    assert f"continuing from {tmp_path / 'run'}" in again.logs()[0]


def test_what_one_process_finds_wrong_all_say(team, tmp_path, copy_of_features):
    uneven = team("uneven", 2, data={"batches_per_step": 3}, run={"num_steps": 2})
    assert uneven.wait() == [2, 2]
    assert set(uneven.errors()) == {
        "data.batches_per_step: expected a multiple of the 2 processes, for each to have as many batches, got 3; set "
        "data.batches_per_step = 4, or start another number of processes"
    }
    with output_lock(tmp_path / "held"):
        held = team("held", 2, run={"num_steps": 2})
        assert held.wait() == [4, 4]
    assert len(set(held.errors())) == 1
    assert "another run is writing here" in held.errors()[0]
    broken = team("broken", 2, data={"features": str(copy_of_features)}, run={"num_steps": FOREVER})
    assert broken.wait() == [3, 3]
    assert len(set(broken.errors())) == 1
    assert "sample source/004" in broken.errors()[0]


def test_a_process_that_dies_does_not_leave_the_other_hanging(team, tmp_path):
    pair = team("run", 2, run={"num_steps": FOREVER})
    pair.wait_for(tmp_path / "run" / "step_00000002")
    pair.send(signal.SIGKILL, 1)
    assert pair.wait(timeout_s=30) == [4, -signal.SIGKILL]
    assert "process 0 of 2: expected answers of the other processes, found that one of them is gone" in pair.errors()[0]
