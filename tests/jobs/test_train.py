"""`pixart train` around training itself: the arithmetic of a dry run, and the prompts of the grid."""

import contextlib
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import ranks, rehearsal
from jobs.prompts import encode_prompts
from jobs.train import train
from pixart_data.errors import ConfigError
from pixart_data.miniatures import build_t5
from pixart_model import grid
from pixart_model import train as training
from pixart_model.config import Train
from pixart_model.costs import samples_seen
from pixart_model.dataset import open_dataset
from pixart_model.flops import train_flops
from pixart_model.parallel import World
from pixart_model.prompts import read_prompts
from pixart_model.savers import Saver
from tests.model.conftest import TEXT_WIDTH, change_manifest, write_image_set, write_text_set


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    keys = [f"source/{i:03d}" for i in range(23)]
    write_image_set(root / "256px", keys, rng)
    write_text_set(root / "text", keys, rng)
    return root


@pytest.fixture
def make_job(features, tmp_path):
    def make(**sections):
        tree = {
            "model": {"size": "tiny", "width": 48, "heads": 4, "base_size": 8, "caption_width": TEXT_WIDTH},
            "data": {"features": str(features), "batch_size": 4},
            "optim": {"ema_decay": 0.8},
            "run": {"output": str(tmp_path / "run"), "num_steps": 23, "device": "cpu"},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return Train.model_validate(tree)

    return make


def dry_run(job, capsys):
    train(job, dry_run=True)
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_counts_the_work_and_says_how_well_it_is_shuffled(make_job, features, tmp_path, capsys):
    lines = dry_run(make_job(), capsys)
    assert lines[0] == "train: from the beginning"
    assert lines[1] == f"train: 23 samples in 5.8 batches an epoch, 23 steps (4.0 epochs) -> {tmp_path / 'run'}"
    assert lines[2].startswith("train: shuffle: a batch of 4 draws from 4.0 runs (4.0), ")
    assert not (tmp_path / "run").exists()
    mix = {"mix": [{"features": str(features), "weight": 3}], "batches_per_step": 2}
    lines = dry_run(make_job(data=mix, run={"num_steps": 46}), capsys)
    assert "46 samples in 11.5 batches an epoch, 46 steps (4.0 + 12.0 epochs)" in lines[1]
    assert len([line for line in lines if line.startswith("train: shuffle")]) == 2
    assert lines[4].endswith("parameters; a step is 2 x 4 = 8 samples, all steps 368")


def test_a_dry_run_says_what_the_job_will_cost(make_job, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data, cost = {"drop_caption": 0.25}, {"dollars_per_gpu_hour": 2.0, "watts_per_gpu": 500.0, "peak_tflops": 1e-6}
    job = make_job(data=data, cost=cost)
    parameters, work, bill = dry_run(job, capsys)[3:]
    # captions have 3 + i % 5 tokens, i from 0 to 22, the empty one 1; the canvas with most images has 6 x 12 cells
    mean_tokens = 0.75 * np.mean([3 + i % 5 for i in range(23)]) + 0.25
    flops = train_flops(job.model, 1000, 18, round(1000 * mean_tokens)) / 1000
    assert parameters.startswith(f"train: {rehearsal.num_parameters(job):,} parameters")
    assert work.startswith(
        f"train: {flops / 1e12:.3g} TFLOP a sample, forward and backward, of 18 image tokens and 3.9 "
    )
    hours = 92 * flops / 0.4e6 / 3600
    assert hours > 0.1
    assert bill == (
        f"train: at 40% of the 1e-06 TFLOP/s of a GPU (cost.peak_tflops), about {hours:.2f} GPU-hours, "
        f"${2 * hours:.2f}, {hours / 2:.2f} kWh, {hours / 5:.2f} kg CO2"
    )
    *_, work, _ = dry_run(make_job(data=data, run={"grad_checkpointing": True}), capsys)
    again = train_flops(job.model, 1000, 18, round(1000 * mean_tokens), grad_checkpointing=True) / 1000
    assert f"{again / 1e12:.3g} with run.grad_checkpointing" in work
    assert again > 1.2 * flops
    *_, bill = dry_run(make_job(data=data), capsys)
    assert "40% of the 312 TFLOP/s of an A100 (set cost.peak_tflops for another GPU)" in bill


@pytest.mark.parametrize(
    ("batch_size", "batches", "num_steps", "side_px", "v100_days"),
    [(178, 64, 150_000, 256, 672), (178, 64, 90_000, 256, 416), (40, 64, 100_000, 512, 320)],
)
def test_the_papers_v100_days_are_what_the_arithmetic_says_at_a_likely_utilisation(
    make_job, batch_size, batches, num_steps, side_px, v100_days
):
    """Table 4: 20 to 30% of a V100's 125 TFLOP/s, which is what fp16 training reached there."""
    job = make_job(
        model={"size": "xl-2", "width": 1152, "heads": 16, "depth": 28, "caption_width": 4096},
        data={"batch_size": batch_size, "batches_per_step": batches},
        run={"num_steps": num_steps},
    )
    assert rehearsal.num_parameters(job) == 610_856_096
    flops = samples_seen(job) * train_flops(job.model, 1, (side_px // 16) ** 2, 107)
    assert 0.19 < flops / (v100_days * 86400 * 125e12) < 0.3


def test_of_classes_no_caption_is_asked_for(make_job, capsys):
    model = {"condition": "class", "num_classes": 1}
    *_, work, _ = dry_run(make_job(model=model, data={"text_set": "none"}), capsys)
    assert ", of 18 image tokens; " in work


@pytest.fixture
def saved(make_job, tmp_path):
    """A run's checkpoint after some steps, as training leaves it; returns a function that writes one."""

    def save(job, step):
        classes = job.model.num_classes if job.model.condition == "class" else None
        with contextlib.closing(open_dataset(job.data, job.run.seed, classes)) as dataset:
            world = World(0, 1, torch.device("cpu"))
            network, null = training._begin(job, job.init, dataset, None, world)
            setting = training._setting(job, dataset, null, world)
            state = training._start(network, job, world)
            state.step = step
            with contextlib.closing(Saver(Path(job.run.output), 3, world)) as saver:
                output = training._Output(Path(job.run.output), None, None)
                return training._save(state, setting, dataset, output, saver)

    return save


def test_where_a_run_begins_is_said_and_looked_at(make_job, saved, capsys, tmp_path, caplog):
    before = saved(make_job(run={"output": str(tmp_path / "before")}), 5)
    with caplog.at_level("INFO"):
        lines = dry_run(make_job(init={"weights": str(tmp_path / "before")}), capsys)
    assert lines[0] == f"train: from {tmp_path / 'before'}"
    assert f"starts from {before}; PixArt; its moving average" in caplog.text
    for init, model, said in (
        ({"weights": str(tmp_path / "gone")}, {}, "gone: expected a checkpoint or a run of"),
        ({"weights": str(before)}, {"width": 96}, "^model.width: .*48"),
        ({"null_caption": "reference"}, {}, "^init.null_caption: expected init.weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(make_job(init=init, model=model), dry_run=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_looked_at_and_what_is_left_is_reckoned(make_job, saved, capsys, tmp_path):
    cost = {"peak_tflops": 1e-6}
    work, bill = dry_run(make_job(cost=cost), capsys)[-2:]
    last = saved(make_job(), 13)
    first, *_, rest, bill_of_rest = dry_run(make_job(cost=cost), capsys)
    assert first == f"train: from {last}"
    assert " in all" in work
    assert " for the 10 steps that are left" in rest
    hours, hours_left = (float(line.split(" about ")[1].split()[0]) for line in (bill, bill_of_rest))
    assert hours_left == pytest.approx(hours * 10 / 23, rel=0.05)
    for change, said in (
        ({"run": {"seed": 1}}, "^run.seed: this job has 1"),
        ({"model": {"depth": 1}}, "^model.depth"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(make_job(**change), dry_run=True)
    [line] = dry_run(make_job(run={"num_steps": 13}), capsys)
    assert line == f"train: {tmp_path / 'run'}: finished: 13 of 13 steps; nothing to do"
    [line] = dry_run(make_job(run={"num_steps": 5}), capsys)
    assert line.endswith("finished: 13 steps are done, 5 were asked for; nothing to do")


def test_a_dry_run_says_that_the_average_will_be_of_the_beginning(make_job, capsys):
    *_, line = dry_run(make_job(optim={"ema_decay": 0.9999}), capsys)
    assert line.startswith("train: optim.ema_decay: the moving average, ")
    assert "still holds 100% of the weights it began with after 23 steps; set optim.ema_decay = 0.8, or have" in line


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"num_workers": 3}, "data": {"batches_per_step": 4}}, "^data.batches_per_step: .* = 6, or start"),
        ({"run": {"wandb_project": "p"}}, "^run.wandb_project: expected the package wandb"),
        ({"grid": {"num_images": 1, "vae": "/nowhere/vae"}}, "^grid.vae: /nowhere/vae cannot be loaded"),
    ],
    ids=["workers", "trackers", "grid"],
)
def test_a_dry_run_finds_what_training_would_stop_at(make_job, monkeypatch, sections, said):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(ConfigError, match=said):
        train(make_job(**sections), dry_run=True)


def test_a_dry_run_finds_prompts_that_cannot_be_encoded(make_job, monkeypatch, capsys):
    monkeypatch.setattr(grid, "load_vae", lambda given, facts: None)
    job = make_job(grid={"prompts": ["a fox"]})  # these features do not say how captions were cleaned and cut
    with pytest.raises(ConfigError, match="^grid.prompts: expected features that name their text encoder"):
        train(job, dry_run=True)


def test_the_length_of_captions_is_that_of_the_mix(make_job, features, tmp_path):
    root = tmp_path / "two"
    shutil.copytree(features, root)
    rng = np.random.default_rng(0)
    write_text_set(root / "short", ["source/000"], rng)  # one of 3 tokens, and one image that has it
    job = make_job(data={"features": str(root), "text_mix": {"text": 1.0, "short": 23.0}, "drop_caption": 0.0})
    with contextlib.closing(open_dataset(job.data)) as dataset:
        found = rehearsal.mean_text_tokens(job, dataset)
    mean = np.mean([3 + i % 5 for i in range(23)])
    assert found == pytest.approx((mean + 3) / 2)


def test_a_gpu_that_is_not_known_is_named(make_job, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Odd 1")
    assert (
        rehearsal._peak(make_job())[1]
        == "an A100 (that of this machine's NVIDIA Odd 1 is not known: set cost.peak_tflops)"
    )


def test_a_process_that_is_not_the_first_says_nothing(make_job, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    assert dry_run(make_job(), capsys) == []


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    build_t5(folder, width=TEXT_WIDTH)
    return folder


@pytest.fixture
def encoded(features, encoder, tmp_path):
    """Features whose manifest names a text encoder that is there."""
    root = tmp_path / "encoded"
    shutil.copytree(features, root)

    def name_it(fields):
        fields["model"] |= {"id": str(encoder), "revision": None, "subfolder": None, "tokenizer_subfolder": None}
        fields["policy"] = {"max_tokens": 5, "cleaning": "whitespace-1"}

    change_manifest(root / "text", name_it)
    return root


def test_prompts_are_encoded_once_as_the_captions_were(make_job, encoded, encoder, tmp_path, monkeypatch, caplog):
    from pixart_data.encoders import TextEncoder
    from pixart_data.sections import TextFeatures
    from pixart_data.shards import read_manifest

    prompts = ["a  fox", "a very long prompt that has more than five tokens"]
    job = make_job(data={"features": str(encoded)}, grid={"prompts": prompts})
    texts = read_manifest(encoded / "text")
    with caplog.at_level("INFO"):
        encode_prompts(job)
        assert "encoding 2 prompts with" in caplog.text
        found = read_prompts(tmp_path / "run", prompts, texts)
        wanted = TextEncoder(TextFeatures(model=str(encoder), max_tokens=5, device="cpu")).encode(prompts)
        assert [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True, True]
        assert len(found[1]) == 5
        [path] = (tmp_path / "run").glob("*")
        before = path.stat().st_mtime_ns
        caplog.clear()
        encode_prompts(job)
        assert "the prompts of the grid are encoded in" in caplog.text
        assert path.stat().st_mtime_ns == before
        encode_prompts(make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]}))
    assert read_prompts(tmp_path / "run", ["a fox"], texts) is not None
    assert path.stat().st_mtime_ns == before, "a run that goes on may read these"


def test_for_a_finished_run_no_encoder_is_loaded(make_job, encoded, saved, tmp_path, monkeypatch):
    from pixart_data import encoders

    monkeypatch.setattr(encoders, "TextEncoder", lambda *_, **__: pytest.fail("nothing is drawn any more"))
    job = make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]}, run={"num_steps": 3})
    saved(job, 3)
    encode_prompts(job)
    assert not list((tmp_path / "run").glob("prompts*"))


@pytest.mark.parametrize(
    "grid", [{"prompts": []}, {"prompts": ["a fox"], "num_images": 0}], ids=["no prompts", "no pictures"]
)
def test_nothing_is_encoded_that_is_not_drawn(make_job, tmp_path, grid):
    encode_prompts(make_job(grid=grid))
    assert not (tmp_path / "run").exists()


def test_only_the_first_of_several_processes_encodes(make_job, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    encode_prompts(make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]}))
    assert not (tmp_path / "run").exists()


def test_a_package_that_encoding_needs_is_named(make_job, encoded, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    job = make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]})
    with pytest.raises(
        ConfigError, match=r"^grid.prompts: encoding them needs a package: .*pip install 'pixart-toolkit"
    ):
        encode_prompts(job)


def test_features_that_do_not_name_their_encoder_cannot_have_prompts(make_job, encoded):
    change_manifest(encoded / "text", lambda fields: fields["policy"].pop("max_tokens"))
    job = make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]})
    with pytest.raises(
        ConfigError, match="^grid.prompts: expected features that name their text encoder, found no max_"
    ):
        encode_prompts(job)


def test_an_encoder_that_was_exchanged_is_refused(make_job, encoded):
    change_manifest(encoded / "text", lambda fields: fields["model"].update(width=32))
    job = make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]})
    with pytest.raises(ConfigError, match="^grid.prompts: expected an encoder of width 32, .* has 24"):
        encode_prompts(job)
