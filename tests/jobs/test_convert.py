"""`pixart convert`: what other programs open, and that nothing changes on the way there and back."""

import contextlib
import os
import re

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jobs import assembly, layouts
from jobs.cli import main
from pixart_data.buckets import Bucket
from pixart_model import train as training
from pixart_model import weights
from pixart_model.checkpoint import EMA, MODEL, load_model, load_null_caption, read_meta
from pixart_model.config import Train
from pixart_model.dataset import open_dataset
from pixart_model.diffusion import generator
from pixart_model.sampling import _scheduler, sample_latents
from tests.model.conftest import TEXT_WIDTH, change_manifest, write_image_set, write_text_set
from tests.officials import dit_pt, pixart_pth

BESIDE = ("pos_embed", "y_embedder.y_embedding")
HEADS = ("--set", "heads=4")


def convert(*words):
    return main(["convert", *map(str, words)])


def alike(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "micro"])
def run(request, tmp_path_factory):
    """A run of a few steps on feature shards, of the model that diffusers' pipeline can drive; and its job."""
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    keys = [f"source/{i:03d}" for i in range(12)]
    write_image_set(root / "256px", keys, rng)
    write_text_set(root / "text", keys, rng)
    if request.param:  # the pipeline conditions on sizes at 1024 px only
        change_manifest(root / "256px", lambda fields: fields["policy"].update(resolution_px=1024))
    model = {"size": "tiny", "width": 48, "heads": 4, "caption_width": TEXT_WIDTH, "micro_conditioning": request.param}
    model |= {"base_size": 128, "interpolation_scale": 2.0} if request.param else {"base_size": 8}
    job = Train.model_validate({
        "model": model,
        "data": {"features": str(root), "batch_size": 2},
        "optim": {"lr": 1e-2, "warmup_steps": 0, "clip_grad_norm": 1.0, "ema_decay": 0.2},
        "run": {"output": str(root / "run"), "num_steps": 4, "save_every": 4, "device": "cpu"},
    })  # fmt: skip
    torch.set_num_threads(1)
    return training.run(job), job


# A run's checkpoint, out


def test_pipeline_of_the_exported_transformer_draws_what_our_sampler_draws(run, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    checkpoint, job = run
    assert convert(checkpoint.parent, "--to", "diffusers", "--out", tmp_path / "out") == 0
    transformer, info = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values())
    with contextlib.closing(open_dataset(job.data)) as dataset:
        captions = dataset.first_captions(2)
    null = load_null_caption(checkpoint)
    bucket, seeds, steps = Bucket("0.50", 48, 96), [3, 4], 12
    noise = torch.stack([torch.randn(4, 6, 12, generator=generator("cpu", seed)) for seed in seeds])

    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(diffusers), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    length = max(map(len, captions))

    def draw(texts, scheduler, **options):
        pipeline.scheduler = scheduler
        padded, mask = zip(*(pad(text, length) for text in texts), strict=True)
        nulls, null_mask = zip(*[pad(null.features, length)] * len(texts), strict=True)
        return pipeline(
            prompt=None, negative_prompt=None,
            prompt_embeds=torch.stack(padded), prompt_attention_mask=torch.stack(mask),
            negative_prompt_embeds=torch.stack(nulls), negative_prompt_attention_mask=torch.stack(null_mask),
            num_inference_steps=steps, height=48, width=96, use_resolution_binning=False, latents=noise.clone(),
            **options,
        ).images  # fmt: skip

    def fractional():
        scheduler = _scheduler(steps, torch.device("cpu"))
        scheduler.set_timesteps = lambda *_, **__: None  # the pipeline would go back to whole timesteps
        return scheduler

    pictures = draw(captions, assembly._scheduler())
    assert [picture.size for picture in pictures] == [(96, 48)] * 2
    ours = sample_latents(
        load_model(checkpoint, True, torch.device("cpu"), torch.float32), captions, null, bucket, seeds, 4.5, steps
    )
    scale = ours.abs().max()
    theirs = draw(captions, fractional(), output_type="latent")
    assert (theirs - ours).abs().max() < 1e-5 * scale
    whole = draw(captions, assembly._scheduler(), output_type="latent")
    assert (whole - ours).abs().max() < 1e-2 * scale  # rounds timesteps
    swapped = draw(captions[::-1], fractional(), output_type="latent")
    assert (swapped - theirs).abs().max() > 1e-2 * scale  # captions count, so that agreeing on them means something


def pad(text, length):
    padded = torch.zeros(length, TEXT_WIDTH)
    padded[: len(text)] = text.float()
    return padded, (torch.arange(length) < len(text)).long()


def tiny_vae(diffusers):
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def test_checkpoint_becomes_the_reference_s_file(run, tmp_path):
    checkpoint, job = run
    assert convert(checkpoint, "--to", "pth", "--out", tmp_path / "out") == 0
    content = load(tmp_path / "out" / "model.pth")
    side = job.model.base_size // 2
    layout = pixart_pth(side, job.model.interpolation_scale, job.model.micro_conditioning, 48, 2, TEXT_WIDTH)
    null = load_null_caption(checkpoint).features.float()
    assert len(null) == 1
    assert content.keys() == {"state_dict", "state_dict_ema", "pixart_model"}
    for key, file in (("state_dict", MODEL), ("state_dict_ema", EMA)):
        state = content[key]
        assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in layout.items()}
        assert torch.equal(state["pos_embed"], layout["pos_embed"])
        assert torch.equal(state["y_embedder.y_embedding"], null.expand(120, -1))
        alike({name: t for name, t in state.items() if name not in BESIDE}, load_file(checkpoint / file))
    assert convert(checkpoint, "--to", "pth", "--out", tmp_path / "plain", "--no-ema") == 0
    plain = load(tmp_path / "plain" / "model.pth")
    assert plain.keys() == {"state_dict", "pixart_model"}
    alike(plain["state_dict"], content["state_dict"])


def test_checkpoint_as_one_file_is_complete(run, tmp_path):
    checkpoint, job = run
    for words, file in (((), EMA), (("--no-ema",), MODEL)):
        out = tmp_path / file
        assert convert(checkpoint, "--to", "safetensors", "--out", out, *words) == 0
        found = weights.read(out / "model.safetensors")
        alike(found.tensors, load_file(checkpoint / file))
        assert found.assumed == ()
        known = weights.read(checkpoint, use_ema=not words)
        assert (found.features, found.is_ema) == (known.features, not words)
        assert torch.equal(found.null_caption, known.null_caption)
        keys = ("depth", "width", "heads", "base_size", "interpolation_scale", "micro_conditioning", "caption_width")
        assert {key: getattr(found.config, key) for key in keys} == {key: getattr(job.model, key) for key in keys}


def test_weights_of_a_checkpoint_come_with_what_it_knows(run):
    checkpoint, job = run
    found = weights.read(checkpoint.parent, use_ema=False)
    alike(found.tensors, load_file(checkpoint / MODEL))
    assert found.config == job.model
    assert found.features == read_meta(checkpoint).features
    assert torch.equal(found.null_caption, load_null_caption(checkpoint).features)
    assert (found.null_table, found.is_ema) == (None, False)


def test_published_file_becomes_a_run_and_comes_out_again(run, tmp_path):
    """A step so small that it changes nothing: what is left are the ways in and out."""
    _, job = run
    micro, side, scale = job.model.micro_conditioning, job.model.base_size // 2, job.model.interpolation_scale
    state = pixart_pth(side, scale, micro, 48, 2, TEXT_WIDTH)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    init = {"weights": str(tmp_path / "x.pth"), "null_caption": "reference", "other_features": True}
    changes = {"init": init, "optim": {"lr": 1e-30}, "run": {"output": str(tmp_path / "run"), "num_steps": 1}}
    tree = job.model_dump(exclude_none=True)
    training.run(Train.model_validate({**tree, **{name: tree[name] | change for name, change in changes.items()}}))
    assert convert(tmp_path / "run", "--to", "pth", "--out", tmp_path / "out") == 0
    back = load(tmp_path / "out" / "model.pth")
    table = "y_embedder.y_embedding"
    alike(back["state_dict"], {**state, table: state[table].bfloat16().float()})  # checkpoints hold captions as bf16
    alike(back["state_dict_ema"], back["state_dict"])


def test_pipeline_takes_the_encoders_that_the_checkpoint_names(run, tmp_path, capsys):
    checkpoint, _ = run
    assert convert(checkpoint, "--to", "pipeline", "--out", tmp_path / "out") == 2
    assert "text_encoder: tiny/t5 cannot be loaded" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# There and back


@pytest.mark.parametrize(
    ("side", "scale", "micro"), [(16, 1.0, False), (32, 1.0, False), (64, 2.0, True)], ids=["256", "512", "1024-MS"]
)
@pytest.mark.parametrize("between", ["safetensors", "diffusers", "pth"])
def test_published_file_survives_the_round_trip_bit_for_bit(tmp_path, side, scale, micro, between):
    plain, average = pixart_pth(side, scale, micro, seed=1), pixart_pth(side, scale, micro, seed=2)
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "x.pth")
    average["y_embedder.y_embedding"] = plain["y_embedder.y_embedding"]  # its own is noise in the reference's files
    assert convert(tmp_path / "x.pth", "--to", between, "--out", tmp_path / "between", *HEADS) == 0
    file = {"safetensors": "model.safetensors", "diffusers": ".", "pth": "model.pth"}[between]
    words = HEADS if between == "pth" else ()
    assert convert(tmp_path / "between" / file, "--to", "pth", "--out", tmp_path / "back", *words) == 0
    back = load(tmp_path / "back" / "model.pth")
    if between == "pth":
        alike(back["state_dict"], plain)
        alike(back["state_dict_ema"], average)
        return
    known = average if between == "safetensors" else {n: t for n, t in average.items() if n != BESIDE[1]}
    assert back.keys() == {"state_dict", "pixart_model"}
    alike(back["state_dict"], known)


def test_files_from_diffusers_survive_the_round_trip_bit_for_bit(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, num_layers=2, cross_attention_dim=96, caption_channels=24,
        sample_size=32,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", "--to", "pth", "--out", tmp_path / "b") == 0
    assert convert(tmp_path / "b" / "model.pth", "--to", "diffusers", "--out", tmp_path / "c", "--set", "heads=3") == 0
    first, last = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in "ac")
    alike(load_file(last), load_file(first))
    again = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "c", low_cpu_mem_usage=False)
    told = {key: value for key, value in model.config.items() if not key.startswith("_")}
    told |= {"interpolation_scale": 1.0, "use_additional_conditions": False}  # unset means these
    assert {key: again.config[key] for key in told} == told


def test_dit_file_survives_the_round_trip_bit_for_bit(tmp_path):
    plain, average = dit_pt(seed=1), dit_pt(seed=2)
    torch.save({"model": plain, "ema": average}, tmp_path / "dit.pt")
    assert convert(tmp_path / "dit.pt", "--to", "pth", "--out", tmp_path / "out", *HEADS) == 0
    back = load(tmp_path / "out" / "model.pt")
    assert back.keys() == {"model", "ema", "pixart_model"}
    alike(back["model"], plain)
    alike(back["ema"], average)


# A whole pipeline


def test_pipeline_folder_opens_and_draws(tmp_path, miniatures, capsys):
    diffusers = pytest.importorskip("diffusers")
    width = weights._json(weights.Path(miniatures["t5"]) / "config.json").get("d_model")
    width = width or weights._json(weights.Path(miniatures["t5"]) / "text_encoder" / "config.json")["d_model"]
    torch.save({"state_dict": pixart_pth(caption_width=width)}, tmp_path / "x.pth")
    parts = [f"text_encoder={miniatures['t5']}", f"vae={miniatures['vae']}"]
    words = [word for part in parts for word in ("--set", part)]
    assert convert(tmp_path / "x.pth", "--to", "pipeline", "--out", tmp_path / "out", *HEADS, *words) == 0
    assert "convert: 4" in capsys.readouterr().out
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = pipeline.scheduler.config
    assert (settings.final_sigmas_type, settings.lower_order_final, settings.algorithm_type) == (
        "sigma_min", False, "dpmsolver++",
    )  # fmt: skip
    assert (settings.beta_schedule, settings.beta_start, settings.beta_end) == ("linear", 1e-4, 2e-2)
    options = {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    picture = pipeline("a cactus", num_inference_steps=2, **options).images[0]
    assert picture.size == (64, 64)
    found = weights.read(tmp_path / "out")
    alike(found.tensors, weights.read(tmp_path / "x.pth", given={"heads": 4}).tensors)


def test_pipeline_whose_parts_do_not_fit(tmp_path, miniatures, capsys):
    torch.save({"state_dict": pixart_pth(caption_width=7)}, tmp_path / "x.pth")
    words = ["--to", "pipeline", "--out", tmp_path / "out", *HEADS]
    assert convert(tmp_path / "x.pth", *words) == 2
    assert re.search("text_encoder: expected the model .* give --set text_encoder=ID", capsys.readouterr().err)
    words += ["--set", f"text_encoder={miniatures['t5']}"]
    assert convert(tmp_path / "x.pth", *words) == 2
    assert "vae: expected the model" in capsys.readouterr().err
    assert convert(tmp_path / "x.pth", *words, "--set", f"vae={miniatures['t5']}") == 2
    assert "vae: expected a model of kind Autoencoder, found" in capsys.readouterr().err
    assert convert(tmp_path / "x.pth", *words, "--set", f"vae={miniatures['vae']}") == 2
    assert "text_encoder: expected width 7, which the transformer has" in capsys.readouterr().err
    torch.save({"state_dict": pixart_pth(32, micro=True)}, tmp_path / "y.pth")
    assert convert(tmp_path / "y.pth", *words, "--set", f"vae={miniatures['vae']}") == 2
    assert "model.micro_conditioning: PixArtAlphaPipeline has it with base_size 128 only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# What is refused


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"condition": "class"}, r"model.condition: .* has captions, got classes \(DiT\); convert with --to pth"),
        ({"mlp_ratio": 2.0}, r"model.mlp_ratio: .* has 4, got 2.0"),
        ({"modulation": "blocks"}, 'model.modulation: .* has "single", got "blocks"'),
        ({"qk_norm": True}, "model.qk_norm: .* has none, got one"),
        ({"kv_compression": "conv"}, 'model.kv_compression: .* has none, got "conv"'),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express(tmp_path, capsys, section, words):
    from pixart_model.networks import build
    from pixart_model.sizes import Model

    config = Model.model_validate({"depth": 2, "width": 96, "heads": 4, **section})
    torch.save(build(config).state_dict(), tmp_path / "x.pth")
    given = [*HEADS, "--set", "base_size=32", "--set", "interpolation_scale=1.0"]
    assert convert(tmp_path / "x.pth", "--to", "diffusers", "--out", tmp_path / "out", *given) == 2
    assert re.search(words, capsys.readouterr().err)
    assert convert(tmp_path / "x.pth", "--to", "safetensors", "--out", tmp_path / "out", *given) == 0
    alike(weights.read(tmp_path / "out" / "model.safetensors").tensors, load(tmp_path / "x.pth"))


def test_positions_are_asked_for_and_not_guessed(tmp_path, capsys):
    state = pixart_pth()
    del state["pos_embed"]
    torch.save(state, tmp_path / "x.pth")
    words = [tmp_path / "x.pth", "--to", "diffusers", "--out", tmp_path / "out", *HEADS]
    assert convert(*words) == 2
    assert re.search(
        "expected positions .* give base_size and interpolation_scale, e.g. --set", capsys.readouterr().err
    )
    assert convert(*words, "--set", "base_size=64", "--set", "interpolation_scale=0.5") == 0
    found = weights.read(tmp_path / "out").config
    assert (found.base_size, found.interpolation_scale) == (64, 0.5)


def test_what_the_source_denies(tmp_path, capsys):
    torch.save(pixart_pth(), tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", "--to", "diffusers", "--out", tmp_path / "out", *HEADS) == 0
    assert convert(tmp_path / "out", "--to", "pth", "--out", tmp_path / "b", "--set", "heads=8") == 2
    assert re.search("heads: expected 4, which .* tells, found 8; leave heads out", capsys.readouterr().err)


def test_output_is_never_something_else(tmp_path, capsys):
    torch.save(pixart_pth(), tmp_path / "x.pth")
    words = [tmp_path / "x.pth", "--to", "safetensors", *HEADS]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert convert(*words, "--out", tmp_path / "mine") == 2
    assert "expected a new or empty folder, found notes.txt" in capsys.readouterr().err
    assert convert(*words, "--out", tmp_path / "x.pth") == 2
    assert "expected a folder, found a file" in capsys.readouterr().err
    assert convert(*words, "--out", "s3://bucket/x") == 2
    assert "expected a local folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert convert(*words, "--out", tmp_path / "empty") == 0
    assert convert(tmp_path / "x.pth", "--to", "pth", *HEADS, "--out", tmp_path / "empty") == 2
    assert "found another conversion" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "empty")) == ["job.toml", "model.safetensors"]
    assert (tmp_path / "empty" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert main(["convert", str(tmp_path / "empty" / "job.toml")]) == 0


def test_dry_run_writes_nothing(tmp_path, capsys):
    torch.save({"state_dict_ema": pixart_pth(), "state_dict": pixart_pth()}, tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", "--to", "pth", *HEADS, "--out", tmp_path / "out", "--dry-run") == 0
    assert re.search(
        r"would write [\d,]+ weights \(moving average\) of a PixArt, 2 blocks of width 96", capsys.readouterr().out
    )
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch, capsys):
    torch.save(pixart_pth(), tmp_path / "x.pth")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(layouts, "save_file", fail)
    left = tmp_path / ".tmp-out-elsewhere.1.2"
    left.mkdir()
    assert convert(tmp_path / "x.pth", "--to", "safetensors", *HEADS, "--out", tmp_path / "out") == 4
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == [".tmp-out-elsewhere.1.2", "x.pth"]  # of a machine that may be at work


def test_inspect_says_what_weights_are_of(tmp_path, capsys):
    torch.save({"state_dict": pixart_pth(64, 2.0, micro=True)}, tmp_path / "x.pth")
    assert main(["inspect", str(tmp_path / "x.pth")]) == 0
    shown = capsys.readouterr().out
    assert "x.pth: weights" in shown
    assert re.search("model .*base_size 128, interpolation_scale 2.0, micro_conditioning True, .*heads not told", shown)
    assert "  dropped    captions become the reference's table, cut at their length, 120 rows\n" in shown
    assert convert(tmp_path / "x.pth", "--to", "diffusers", "--out", tmp_path / "out", *HEADS) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert re.search(r"out: weights\n  [\d,]+ numbers in 53 tensors\n  model .*heads 4\n$", capsys.readouterr().out)
