import contextlib
import json
import logging
import math
import os
import shutil
import signal
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from jobs.train import train as command
from pixart_data.config import resolved_toml
from pixart_data.errors import ConfigError, DataError, JobError
from pixart_model import checkpoint, steps, train
from pixart_model.config import Optim
from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.networks import build
from pixart_model.parallel import World
from tests import teams
from tests.model.conftest import change_manifest, damage, write_image_set, write_text_set


def labelled(folder, keys):
    """A table that gives keys the classes 0 to 6 in turn."""
    pq.write_table(pa.table({"key": keys, "label": [i % 7 for i in range(len(keys))]}), folder / "labels.parquet")
    return folder / "labels.parquet"


def tensors(path):
    """All that a checkpoint holds: the weights, their average, the optimizer and the null caption, by file and name."""
    files = sorted(path.rglob("*.safetensors"))
    return {(str(f.relative_to(path)), name): tensor for f in files for name, tensor in load_file(f).items()}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("model", [{}, {"micro_conditioning": True}])
def test_six_steps_are_three_and_three_more_bit_for_bit(make_job, tmp_path, model):
    whole = train.run(make_job(model=model, run={"output": str(tmp_path / "whole")}))
    half = train.run(make_job(model=model, run={"output": str(tmp_path / "cut"), "num_steps": 3}))
    rest = train.run(make_job(model=model, run={"output": str(tmp_path / "cut")}))
    assert (half.name, rest.name, whole.name) == ("step_00000003", "step_00000006", "step_00000006")
    assert same(whole, rest)
    assert not same(whole, half)
    found = tensors(whole)
    weights = [name for file, name in found if file == "model.safetensors"]
    assert {f"state.{name}.exp_avg" for name in weights} < {name for file, name in found if "optimizer" in file}
    assert not all(torch.equal(found["model.safetensors", n], found["ema.safetensors", n]) for n in weights)
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")}
    assert [json.loads(line)["step"] for line in lines["whole"]] == [2, 4, 6]
    assert [json.loads(line)["step"] for line in lines["cut"]] == [2, 3, 4, 6]


def test_resume_across_an_epoch_and_a_kill_mid_way(make_job, tmp_path):
    run = {"num_steps": 10, "keep_last": 9}
    dataset = train.open_dataset(make_job().data)
    assert dataset.num_batches() < 9, "the checkpoint at 9 is in the second epoch"
    dataset.close()
    straight = train.run(make_job(run={**run, "output": str(tmp_path / "a")}))
    job = make_job(run={**run, "output": str(tmp_path / "b")})
    train.run(job)
    (tmp_path / "b" / "step_00000010").rename(tmp_path / "gone")
    again = train.run(job)
    assert same(straight, again)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_mirrored_and_skipped_samples_are_the_same_after_a_restart_and_are_accounted_for(tmp_path, make_job, caplog):
    root = tmp_path / "features"
    keys = [f"source/{i:03d}" for i in range(25)]
    write_image_set(root / "256px", keys, np.random.default_rng(0), flips=True)
    write_text_set(root / "text", keys, np.random.default_rng(1), "bf16-packed")
    damage(root / "text", "source/004")
    data = {"features": str(root), "flip": 0.5, "damaged": "skip"}

    def train_to(name, num_steps):
        return train.run(make_job(data=data, run={"output": str(tmp_path / name), "num_steps": num_steps}))

    whole = train_to("whole", 16)
    train_to("cut", 9)
    caplog.clear()
    rest = train_to("cut", 16)
    assert same(whole, rest)
    skipped = {}
    for name in ("whole", "cut"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        skipped[name] = sum(line["skipped"] for line in lines)
    dataset = train.open_dataset(make_job(data=data).data)
    expected = sum(len(dataset.read(step).skipped) for step in range(16))
    dataset.close()
    assert skipped == {"whole": expected, "cut": expected}
    assert expected >= 2
    assert f"damaged samples came up {expected} times, and others of their batches took their places" in caplog.text
    with pytest.raises(DataError, match="sample source/004: .* or set data.damaged = 'skip'"):
        train.run(make_job(data={**data, "damaged": "fail"}, run={"output": str(tmp_path / "fail"), "num_steps": 16}))


def test_grad_checkpointing_does_not_move_numbers(make_job, tmp_path):
    a = train.run(make_job(run={"output": str(tmp_path / "a"), "num_steps": 3}))
    b = train.run(make_job(run={"output": str(tmp_path / "b"), "num_steps": 3, "grad_checkpointing": True}))
    assert same(a, b)


def test_a_finished_run_says_so_and_does_nothing(make_job, caplog):
    job = make_job()
    first = train.run(job)

    def times():
        files = (path for path in first.parent.rglob("*") if path.is_file() and path.parent.name != ".lease")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    with caplog.at_level(logging.INFO):
        assert train.run(job) == first
        assert "finished: 6 of 6 steps; nothing to do" in caplog.text
        assert train.run(make_job(run={"num_steps": 2})) == first
        assert "finished: 6 steps are done, 2 were asked for; nothing to do" in caplog.text
    assert before == times()


def test_an_average_that_cannot_follow_so_few_steps_is_told_of_with_one_that_can(make_job, caplog):
    def told(decay, num_steps):
        return train.slow_average(make_job(optim={"ema_decay": decay}, run={"num_steps": num_steps}))

    [line] = told(0.9999, 60)
    assert "which grids, sample, convert and init.weights take, still holds 99% of the weights it began with" in line
    assert "after 60 steps; set optim.ema_decay = 0.93, or have" in line
    assert told(0.9999, 40_000) == told(0.0, 1) == []
    for count in (1, 2, 5, 17, 60, 1000, 20_000):
        [line] = told(0.99999, count)
        advised = float(line.split("optim.ema_decay = ")[1].split(",")[0])
        assert advised**count < 0.05
        assert told(advised, count) == []
    with caplog.at_level(logging.WARNING):
        train.run(make_job(optim={"ema_decay": 0.9999}, run={"num_steps": 1}))
    assert caplog.text.count("optim.ema_decay: the moving average, ") == 1


def test_continuing_is_said_and_the_log_line_reads_well(make_job, caplog):
    with caplog.at_level(logging.INFO):
        train.run(make_job(run={"num_steps": 3}))
        assert "continuing from" not in caplog.text
        train.run(make_job())
    assert "continuing from" in caplog.text
    line = next(
        r.getMessage() for r in caplog.records if r.getMessage().startswith("step 000006/000006 100.0% | loss ")
    )
    assert [part.split()[0] for part in line.split(" | ")[1:4]] == ["loss", "grad", "lr"]
    assert line.endswith("eta 0 s")


def test_the_run_directory_holds_the_resolved_job(make_job, tmp_path):
    from pixart_data.config import load
    from pixart_model.config import Train

    job = make_job()
    last = train.run(job)
    assert load(Train, tmp_path / "run" / "config.toml") == job
    assert load(Train, last / "config.toml") == job


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"depth": 3}}, "model.depth"),
        ({"model": {"micro_conditioning": True}}, "model.micro_conditioning"),
        ({"data": {"batch_size": 5}}, "data.batch_size"),
        ({"data": {"run_length": 2}}, "data.run_length"),
        ({"data": {"block_rows": 1000}}, "data.block_rows"),
        ({"data": {"where": 'bucket != "9.00"'}}, "data.where"),
        ({"run": {"seed": 1}}, "run.seed"),
    ],
)
def test_another_job_may_not_continue_a_run(make_job, sections, key):
    train.run(make_job(run={"num_steps": 1}))
    with pytest.raises(ConfigError, match=f"{key}: this job has .* choose another run.output"):
        train.run(make_job(**sections))


def test_a_run_of_classes_is_not_continued_with_captions(make_job, tmp_path):
    by_class = {"condition": "class", "num_classes": 7, "depth": 1}
    data = {"labels": str(labelled(tmp_path, [f"source/{i:03d}" for i in range(25)])), "small_buckets": "carry"}
    train.run(make_job(model=by_class, data=data, run={"num_steps": 1}))
    with pytest.raises(ConfigError, match=r"model.condition: this job has caption, the run in .* has class"):
        train.run(make_job())


@pytest.mark.parametrize(
    ("name", "fact", "value", "key"),
    [
        ("256px", "scaling_factor", 0.13025, "data.image_set, scaling_factor: this job has 0.13025, .* has 0.18215"),
        ("256px", "shift_factor", None, "data.image_set, shift_factor: this job has 0.0, .* has 0.1"),
        ("256px", "id", "other/vae", "data.image_set, VAE: this job has .*other/vae.* has .*tiny/vae.*"),
        ("text", "revision", "other", "data.text_set, text encoder: this job has .*other.* has .*def.*"),
    ],
)
def test_features_of_another_encoder_do_not_continue_a_run(make_job, copy, name, fact, value, key):
    data = {"features": str(copy)}
    train.run(make_job(data=data, run={"num_steps": 1}))
    change_manifest(copy / name, lambda fields: fields["model"].__setitem__(fact, value))
    with pytest.raises(ConfigError, match=f"{key}; the set is another, or was written anew since"):
        train.run(make_job(data=data))


def test_settings_that_may_change_do_take_effect_and_are_told(make_job, tmp_path, caplog):
    def go_on(name, **optim):
        run = {"output": str(tmp_path / name)}
        train.run(make_job(run={**run, "num_steps": 3}))
        caplog.clear()
        with caplog.at_level(logging.INFO, "pixart_model"):
            return train.run(make_job(run=run, optim=optim))

    same_as_before = go_on("a")
    assert caplog.text.count("from here on") == 1, "the number of steps"
    other_rate = go_on("b", lr=5e-4, warmup_steps=0)
    assert "optim.lr: 0.001 until step 3, 0.0005 from here on" in caplog.text
    assert "optim.warmup_steps: 4 until step 3, 0 from here on" in caplog.text
    other_decay = go_on("c", weight_decay=0.5)
    assert "optim.weight_decay: 0.05 until step 3, 0.5 from here on" in caplog.text
    assert not same(same_as_before, other_rate)
    assert not same(same_as_before, other_decay)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] == 5e-4


def test_a_loss_that_is_not_finite_names_its_step_and_its_samples_and_is_not_saved(make_job, tmp_path, monkeypatch):
    losses = steps.batch_losses

    def spoilt(model, host, setting):
        values, tokens = losses(model, host, setting)
        return (values * math.nan if host.step == 4 else values), tokens

    monkeypatch.setattr(steps, "batch_losses", spoilt)
    job = make_job()
    with contextlib.closing(train.open_dataset(job.data, job.run.seed)) as dataset:
        keys = dataset.read(4).keys
    with pytest.raises(JobError, match="^step 5: expected a finite loss") as caught:
        train.run(job)
    assert all(key in str(caught.value) for key in keys)
    assert checkpoint.latest(tmp_path / "run").name == "step_00000003"


def test_a_model_that_does_not_fit_the_features_is_refused_before_anything(make_job, tmp_path):
    with pytest.raises(ConfigError, match="model.caption_width: expected 24, the width of .*text, got 32"):
        train.run(make_job(model={"caption_width": 32}))
    with pytest.raises(ConfigError, match="model.in_channels: expected 4, the channels of .*256px, got 16"):
        train.run(make_job(model={"in_channels": 16}))
    assert not list((tmp_path / "run").glob("step_*"))


def test_two_runs_cannot_share_an_output(make_job, tmp_path):
    from pixart_data.leases import output_lock

    with output_lock(tmp_path / "run"), pytest.raises(JobError, match="another run is writing here"):
        train.run(make_job())


def test_training_learns(make_job):
    job = make_job(optim={"lr": 3e-3}, run={"num_steps": 40, "log_every": 10, "save_every": 40})
    last = train.run(job)
    losses = [json.loads(line)["loss"] for line in (last.parent / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_bf16_runs_on_a_cpu_and_keeps_fp32_weights(make_job):
    last = train.run(make_job(run={"dtype": "bf16", "num_steps": 2}))
    types = {tensor.dtype for (file, _), tensor in tensors(last).items() if not file.startswith("null")}
    assert types == {torch.float32}


def test_the_warm_up_is_linear_and_then_constant():
    optim = Optim(lr=1.0, warmup_steps=4)
    assert [steps.learning_rate(optim, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert steps.learning_rate(Optim(lr=1.0, warmup_steps=0), 0) == 1.0


def test_all_captions_dropped_or_none_changes_the_weights(make_job, tmp_path):
    runs = [
        train.run(make_job(data={"drop_caption": p}, run={"output": str(tmp_path / name), "num_steps": 2}))
        for name, p in (("a", 0.0), ("b", 1.0))
    ]
    assert not same(*runs)


def test_the_average_follows_its_formula(make_job):
    job = make_job()
    state = train._start(build(job.model), job, World(0, 1, torch.device("cpu")))
    before = {name: p.clone() for name, p in state.ema.named_parameters()}
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1.0)
    steps.update_average(state, 0.9)
    for name, p in state.ema.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.1)


def test_grids_are_drawn_at_every_checkpoint(make_job, tmp_path):
    pytest.importorskip("diffusers")
    image = pytest.importorskip("PIL.Image")
    from diffusers import AutoencoderKL

    channels = (8, 8, 8, 8)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels, layers_per_block=1, norm_num_groups=4, latent_channels=4,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    grid = {"num_images": 3, "num_steps": 2, "vae": str(tmp_path / "vae")}
    plain = train.run(make_job(run={"output": str(tmp_path / "plain"), "num_steps": 3}))
    last = train.run(make_job(run={"num_steps": 3}, grid=grid))
    with image.open(last.parent / "grids" / "step_00000003.png") as picture:
        assert picture.size in {(2 * w, 2 * h) for h, w in ((64, 64), (48, 96), (96, 48))}
    assert same(plain, last)
    with pytest.raises(ConfigError, match="grid.vae: .*cannot be loaded"):
        train.run(make_job(run={"num_steps": 6}, grid={**grid, "vae": str(tmp_path / "nowhere")}))


def test_the_latents_are_shifted_and_scaled_draws_from_the_posterior(make_job, monkeypatch):
    seen = {}
    real = steps.Diffusion.q_sample

    def spy(self, x, t, eps):
        seen["x"] = x
        return real(self, x, t, eps)

    monkeypatch.setattr(steps.Diffusion, "q_sample", spy)
    job = make_job(run={"num_steps": 1})
    train.run(job)
    dataset = train.open_dataset(job.data, job.run.seed)
    batch = dataset.read(0)
    dataset.close()
    mean, std = batch.moments.float().unbind(1)
    draw = (seen["x"] / 0.18215 + 0.1 - mean) / std
    assert abs(float(draw.mean())) < 0.2
    assert abs(float(draw.std()) - 1) < 0.2


def test_no_two_steps_share_their_noise(make_job, monkeypatch):
    noises, times = [], []
    real = steps.Diffusion.q_sample

    def spy(self, x, t, eps):
        noises.append(float(eps[0, 0, 0, 0]))
        times.append(t.tolist())
        return real(self, x, t, eps)

    monkeypatch.setattr(steps.Diffusion, "q_sample", spy)
    train.run(make_job())
    assert len(set(noises)) == 6
    assert len({tuple(t) for t in times}) == 6


def test_a_killed_run_goes_on_as_if_it_had_not_been(make_job, tmp_path):
    out = tmp_path / "killed"
    job = make_job(run={"output": str(out), "num_steps": 100_000, "save_every": 2, "keep_last": 2})
    (tmp_path / "job.toml").write_text(resolved_toml(job))
    process = teams.Team(tmp_path / "team", 1, teams.train, tmp_path / "job.toml")
    process.wait_for(out / "step_00000006")
    process.kill()
    assert process.wait() == [-signal.SIGKILL], "it was still running"
    reached = checkpoint.read_meta(checkpoint.latest(out)).step
    assert reached >= 6
    num_steps = reached + 3
    again = train.run(make_job(run={"output": str(out), "num_steps": num_steps}))
    straight = train.run(make_job(run={"output": str(tmp_path / "straight"), "num_steps": num_steps}))
    assert same(again, straight)
    assert not list(out.glob(".tmp-*"))


def test_a_dry_run_finds_that_the_empty_caption_is_missing(make_job, copy):
    change_manifest(copy / "text", lambda fields: fields["model"].pop("null"))
    with pytest.raises(DataError, match="no features of the empty caption"):
        command(make_job(data={"features": str(copy)}), dry_run=True)


def test_a_dataset_that_is_not_there_is_a_wrong_path(make_job, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.features: .*nowhere: no such folder; check the path"):
        command(make_job(data={"features": str(tmp_path / "nowhere")}), dry_run=True)


@pytest.fixture
def after_step(monkeypatch):
    """Have something happen once, after a step."""

    def arrange(number, happen):
        real, left = train.train_step, [happen]

        def spy(state, batches, setting):
            outcome = real(state, batches, setting)
            if state.step == number and left:
                left.pop()()
            return outcome

        monkeypatch.setattr(train, "train_step", spy)

    return arrange


@pytest.mark.parametrize("way", ["SIGTERM", "the file", "Ctrl-C"])
def test_who_asks_a_run_to_leave_finds_it_saved_and_can_go_on(make_job, tmp_path, after_step, caplog, way):
    job, handlers = make_job(), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    ask = {
        "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "the file": lambda: (tmp_path / "run" / "stop").touch(),
        "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()  # of before; nobody asks this run
    after_step(4, ask[way])
    with caplog.at_level(logging.INFO), contextlib.ExitStack() as stack:
        if way == "Ctrl-C":
            stack.enter_context(pytest.raises(KeyboardInterrupt))
        assert train.run(job).name == "step_00000004"
    assert checkpoint.latest(tmp_path / "run").name == "step_00000004"
    assert "left at step 4 of 6 as asked, all of it saved in step_00000004; the same command goes on" in caplog.text
    assert f"{tmp_path / 'run' / 'stop'}: removed: it was there before this run began" in caplog.text
    assert not (tmp_path / "run" / "stop").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    straight = train.run(make_job(run={"output": str(tmp_path / "straight")}))
    assert same(train.run(job), straight)


@pytest.fixture
def while_starting(monkeypatch):
    """Have something happen once, while a run opens its data."""

    def arrange(happen):
        real, left = train._open, [happen]

        def spy(job, world):
            if left:
                left.pop()()
            return real(job, world)

        monkeypatch.setattr(train, "_open", spy)

    return arrange


@pytest.mark.parametrize("way", ["SIGTERM", "the file"])
def test_who_asks_a_run_to_leave_while_it_starts_is_heard(make_job, tmp_path, while_starting, caplog, way):
    def ask():
        os.kill(os.getpid(), signal.SIGTERM) if way == "SIGTERM" else (tmp_path / "run" / "stop").touch()

    job = make_job()
    while_starting(ask)
    with caplog.at_level(logging.INFO):
        assert train.run(job).name == "step_00000000"
    assert "left at step 0 of 6 as asked, all of it saved in step_00000000" in caplog.text
    assert "removed" not in caplog.text
    assert not (tmp_path / "run" / "stop").exists()
    train.run(make_job(run={"num_steps": 3}))
    while_starting(ask)
    assert train.run(job).name == "step_00000003"
    straight = train.run(make_job(run={"output": str(tmp_path / "straight")}))
    assert same(train.run(job), straight)


def test_the_wait_for_other_hosts_is_not_one_for_data(make_job, monkeypatch):
    now_s, waits = [0.0], []
    agreed, add = World.agreed, train.Meter.add

    @contextlib.contextmanager
    def slow(self):
        with agreed(self):
            yield
        now_s[0] += 100.0  # until another process has come

    def spy(self, outcome):
        waits.append(outcome.data_s)
        add(self, outcome)

    monkeypatch.setattr(World, "agreed", slow)
    monkeypatch.setattr(train.Meter, "add", spy)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now_s[0])
    train.run(make_job(run={"num_steps": 2}))
    assert waits == [0.0, 0.0]
    assert now_s[0] >= 200


def test_who_asks_to_leave_does_not_wait_for_pictures(make_job, monkeypatch, after_step):
    drawn = []

    class Painter:
        def __init__(self, *_):
            pass

        def is_due(self, step, saved):
            return saved

        def draw(self, model, step):
            drawn.append(step)

    monkeypatch.setattr(train, "Painter", Painter)
    after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train.run(make_job(grid={"num_images": 1}))
    assert drawn == [3]


def test_a_second_ctrl_c_does_not_wait(make_job, tmp_path, after_step):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(4, twice)
    with pytest.raises(KeyboardInterrupt):
        train.run(make_job())
    assert checkpoint.latest(tmp_path / "run").name == "step_00000003"


def test_a_run_that_is_asked_to_leave_at_its_last_step_is_done(make_job, after_step, caplog):
    after_step(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with caplog.at_level(logging.INFO):
        assert train.run(make_job()).name == "step_00000006"
    assert "left at" not in caplog.text


def test_a_step_of_several_batches_has_the_mean_of_their_gradients(make_job, tmp_path):
    job = make_job(data={"batches_per_step": 3}, run={"num_steps": 1, "save_every": 1})
    world = World(0, 1, torch.device("cpu"))
    with contextlib.closing(train._open(job, world)) as dataset:
        network, null = train._begin(job, job.init, dataset, None, world)
        setting = train._setting(job, dataset, null, world)
        for number in range(3):
            losses, _ = steps.batch_losses(network, dataset.read(number), setting)
            (losses.mean() / 3).backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in network.parameters()])
    train.run(job)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["images"] == 12
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    with pytest.raises(ConfigError, match=r"data.batches_per_step: this job has 2, .* has 3"):
        train.run(make_job(data={"batches_per_step": 2}))


def test_the_keys_of_every_step_are_written_for_who_asks_and_again_after_a_restart(make_job, tmp_path, caplog):
    def train_to(num_steps, **run):
        job = make_job(data={"batches_per_step": 2}, run={"num_steps": num_steps, "save_every": 2, **run})
        with caplog.at_level(logging.DEBUG, "pixart_model"):
            train.run(job)
        return job

    job = train_to(2)
    assert not (tmp_path / "run" / "keys.jsonl").exists()
    shutil.rmtree(tmp_path / "run")
    train_to(3, log_keys=True)
    shutil.rmtree(tmp_path / "run" / "step_00000003")  # killed after it had trained on more than it saved
    with (tmp_path / "run" / "keys.jsonl").open("a") as file:
        file.write('{"step": 4, "bat')
    train_to(4, log_keys=True)
    with contextlib.closing(train.open_dataset(job.data, job.run.seed)) as dataset:
        keys = [dataset.read(number).keys for number in range(8)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "keys.jsonl").read_text().splitlines()]
    assert lines == [{"step": k + 1, "batch": 2 * k, "keys": keys[2 * k : 2 * k + 2]} for k in range(4)]
    assert keys[0][0] not in caplog.text


def test_classes_are_learned_by_the_same_loop_and_dropped_ones_become_no_class(make_job, tmp_path, monkeypatch):
    keys = [f"source/{i:03d}" for i in range(25)]
    seen = []
    real = DiT.forward

    def spy(self, x, t, y):
        seen.append(y.tolist())
        return real(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", spy)
    model = {"condition": "class", "num_classes": 7}
    data = {"labels": str(labelled(tmp_path, keys)), "drop_caption": 0.5, "small_buckets": "carry"}

    def train_to(name, num_steps):
        return train.run(make_job(model=model, data=data, run={"output": str(tmp_path / name), "num_steps": num_steps}))

    whole = train_to("whole", 6)
    labels = {key: i % 7 for i, key in enumerate(keys)}
    with contextlib.closing(train._open(make_job(model=model, data=data), World(0, 1, torch.device("cpu")))) as dataset:
        for number, y in enumerate(seen):
            wanted = [labels[key] for key in dataset.read(number).keys]
            assert all(found in (label, 7) for found, label in zip(y, wanted, strict=True))
    assert 0 < sum(y.count(7) for y in seen) < 24
    train_to("cut", 3)
    assert same(whole, train_to("cut", 6))
    assert not list(whole.glob("null*"))


def test_a_run_to_start_from_is_looked_up_once_for_all_processes(make_job, tmp_path, monkeypatch):
    first = train.run(make_job(run={"output": str(tmp_path / "first"), "num_steps": 3}))
    told, resolved = [], []
    tell, resolve, begin = World.first, train.weights.resolve, train.beginnings.begin

    def resolving(source):
        resolved.append(source)
        return resolve(source)

    def telling(self, thing):
        told.append(thing)
        return tell(self, thing)

    def beginning(init, *others):
        assert (None, init) in told, "what the first process has found"
        assert init.weights == str(first)
        return begin(init, *others)

    monkeypatch.setattr(train.weights, "resolve", resolving)
    monkeypatch.setattr(World, "first", telling)
    monkeypatch.setattr(train.beginnings, "begin", beginning)
    job = make_job(init={"weights": str(first.parent)}, run={"num_steps": 1})
    last = train.run(job)
    assert resolved == [str(first.parent)]
    assert f'weights = "{first.parent}"' in (last / "config.toml").read_text(), "as it was written"


def test_going_on_draws_no_weights(make_job, monkeypatch):
    drawn, real = [], PixArt.initialize

    def spy(self):
        drawn.append(self.device.type)
        real(self)

    monkeypatch.setattr(PixArt, "initialize", spy)
    for num_steps in (1, 2):
        train.run(make_job(run={"num_steps": num_steps}))
    assert drawn == ["cpu", "meta"]


def test_a_new_run_starts_from_other_weights_and_goes_on_from_its_own(make_job, tmp_path, caplog):
    first = train.run(make_job(run={"output": str(tmp_path / "first")}))
    still = {"lr": 1e-30, "weight_decay": 0.0}
    init = {"weights": str(first)}
    job = make_job(init=init, optim=still, run={"num_steps": 1})
    a, b = tensors(first), tensors(train.run(job))
    for key in (key for key in b if key[0] == "model.safetensors"):
        assert torch.equal(a["ema.safetensors", key[1]], b[key])
    shutil.rmtree(tmp_path / "first")
    assert train.run(make_job(init=init, optim=still, run={"num_steps": 2})).name == "step_00000002"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train.run(make_job(optim=still, run={"num_steps": 3}))
    assert "run.num_steps: 2 until step 2, 3 from here on" in caplog.text
    assert caplog.text.count("from here on") == 1, "what began a run is not read any more"


def test_compiled_blocks_are_asked_for(make_job, monkeypatch):
    asked = []
    monkeypatch.setattr(PixArt, "compile_blocks", lambda self: asked.append(self))
    train.run(make_job(run={"num_steps": 1}))
    assert not asked
    train.run(make_job(run={"num_steps": 2, "compile": True}))
    assert len(asked) == 1


def test_a_gpu_that_is_full_says_what_to_lower(make_job, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    job = make_job()
    ways = (
        r"^data.batch_size: expected 4 samples .* found it full; set run.grad_checkpointing = true, or start on more "
        r'GPUs with run.parallel = "fsdp", and the run goes on; a smaller data.batch_size .* init.weights = ".*run"'
    )
    with monkeypatch.context() as patch:
        patch.setattr(steps, "batch_losses", full)
        with pytest.raises(JobError, match=ways):
            train.run(job)
        with pytest.raises(JobError, match="found it full; start on more GPUs"):
            train.run(make_job(run={"grad_checkpointing": True}))
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(JobError, match=ways):
        train.run(job)
    monkeypatch.undo()
    train.run(make_job(run={"num_steps": 1}))
    assert train.run(make_job(run={"num_steps": 2, "grad_checkpointing": True})).name == "step_00000002"


def test_a_thread_that_may_not_listen_to_signals_heeds_the_file(make_job, tmp_path, after_step):
    """Ray Train calls the loop in a thread of its worker."""
    handlers, done = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], []
    after_step(2, (tmp_path / "run" / "stop").touch)
    thread = threading.Thread(target=lambda: done.append(train.run(make_job())))
    thread.start()
    thread.join(120)
    assert [path.name for path in done] == ["step_00000002"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
