"""`pixart train` around training itself: the arithmetic of a dry run, and the prompts of the grid."""

import sys

import numpy as np
import pytest
import torch

from jobs import ranks, rehearsal
from jobs.prompts import encode_prompts
from jobs.train import train
from pixart_data.errors import ConfigError
from pixart_data.miniatures import build_t5
from pixart_model.config import Train
from pixart_model.costs import samples_seen
from pixart_model.flops import train_flops
from pixart_model.prompts import read_prompts
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
    data, cost = {"drop_caption": 0.0}, {"dollars_per_gpu_hour": 2.0, "watts_per_gpu": 500.0, "peak_tflops": 1e-6}
    job = make_job(data=data, cost=cost)
    parameters, work, bill = dry_run(job, capsys)[3:]
    # captions have 3 + i % 5 tokens, i from 0 to 22; the canvas with most images has 6 x 12 cells
    mean_tokens = np.mean([3 + i % 5 for i in range(23)])
    flops = train_flops(job.model, 1000, 18, round(1000 * mean_tokens)) / 1000
    assert parameters.startswith(f"train: {rehearsal.num_parameters(job):,} parameters")
    assert work.startswith(
        f"train: {flops / 1e12:.3g} TFLOP a sample, forward and backward, of 18 image tokens and 4.9 "
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


def test_where_a_run_begins_is_said(make_job, capsys, tmp_path):
    assert dry_run(make_job(init={"weights": "owner/name"}), capsys)[0] == "train: from owner/name"


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
    import shutil

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
        before = (tmp_path / "run" / "prompts.safetensors").stat().st_mtime_ns
        caplog.clear()
        encode_prompts(job)
        assert "the prompts of the grid are encoded in" in caplog.text
        assert (tmp_path / "run" / "prompts.safetensors").stat().st_mtime_ns == before
        encode_prompts(make_job(data={"features": str(encoded)}, grid={"prompts": ["a fox"]}))
    assert read_prompts(tmp_path / "run", ["a fox"], texts) is not None
    assert read_prompts(tmp_path / "run", prompts, texts) is None


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
