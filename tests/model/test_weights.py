import argparse
import collections
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from pixart_data.errors import ConfigError, DataError
from pixart_model import weights
from pixart_model.networks import build
from pixart_model.sizes import Model
from tests.officials import dit_pt, dit_shapes, drawn, pixart_pth, pixart_shapes

BESIDE = ("pos_embed", "y_embedder.y_embedding")
HEADS = {"heads": 4}


def alike(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def bare(state):
    return {name: tensor for name, tensor in state.items() if name not in BESIDE}


# .pth of PixArt

LAYOUTS = {
    "256": (pixart_pth(16), 32, 1.0, False),
    "512": (pixart_pth(32), 64, 1.0, False),
    "1024-MS": (pixart_pth(64, 2.0, micro=True), 128, 2.0, True),
    "sigma-256": (pixart_pth(16, 0.5), 32, 0.5, False),
}


@pytest.mark.parametrize(("state", "base_size", "scale", "micro"), LAYOUTS.values(), ids=LAYOUTS)
def test_published_pixart_file_tells_its_model(tmp_path, state, base_size, scale, micro):
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    found = weights.read(tmp_path / "x.pth", given=HEADS)
    assert (found.config.base_size, found.config.interpolation_scale) == (base_size, scale)
    assert found.config.micro_conditioning is micro
    assert (found.config.depth, found.config.width, found.config.caption_width) == (2, 96, 32)
    assert found.assumed == ()
    assert (found.features, found.null_caption, found.is_ema) == (None, None, False)
    alike(found.tensors, bare(state))
    assert torch.equal(found.null_table, state["y_embedder.y_embedding"])
    build(found.config).load_state_dict(found.tensors, strict=True)


def test_a_file_without_positions_says_what_it_assumes(tmp_path):
    state = pixart_pth()
    del state["pos_embed"], state["y_embedder.y_embedding"]
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    found = weights.read(str(tmp_path / "x.pth"), given=HEADS)
    assert found.assumed == ("base_size", "interpolation_scale")
    assert found.null_table is None
    known = weights.read(tmp_path / "x.pth", given={**HEADS, "base_size": 64, "interpolation_scale": 2.0})
    assert (known.config.base_size, known.config.interpolation_scale, known.assumed) == (64, 2.0, ())


def test_moving_average_is_taken_where_there_is_one_with_the_null_table_of_the_weights(tmp_path):
    plain, average = pixart_pth(seed=1), pixart_pth(seed=2)
    content = {"state_dict": plain, "state_dict_ema": average, "epoch": 3, "scheduler": {"last_epoch": 7}}
    torch.save(content, tmp_path / "epoch_3_step_7.pth")
    found = weights.read(tmp_path / "epoch_3_step_7.pth", given=HEADS)
    alike(found.tensors, bare(average))
    assert found.is_ema
    assert torch.equal(found.null_table, plain["y_embedder.y_embedding"])
    without = weights.read(tmp_path / "epoch_3_step_7.pth", use_ema=False, given=HEADS)
    alike(without.tensors, bare(plain))
    assert not without.is_ema


def test_heads_are_those_of_a_published_width_or_asked_for(tmp_path):
    torch.save(drawn(pixart_shapes(1, 384, 16, False)), tmp_path / "s.pth")
    assert weights.read(tmp_path / "s.pth").config.heads == 6
    assert weights.read(tmp_path / "s.pth", given={"heads": 8}).config.heads == 8
    torch.save(pixart_pth(), tmp_path / "x.pth")
    with pytest.raises(
        ConfigError,
        match=r"x.pth: expected a width .*384, 768.*, found 96; give heads, --set heads=N, a divisor of 96 \(4 if it "
        r"is of size tiny\)$",
    ):
        weights.read(tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"expected weights of PixArt or DiT, found .*multiple of 7"):
        weights.read(tmp_path / "x.pth", given={"heads": 7})


def test_positions_that_are_not_the_formula_s_are_refused(tmp_path):
    state = pixart_pth()
    turned, short = state["pos_embed"].flip(1), state["pos_embed"][:, :7]
    for wrong, words in ((turned, "found others"), (short, "positions of a square")):
        torch.save({"state_dict": {**state, "pos_embed": wrong}}, tmp_path / "x.pth")
        with pytest.raises(DataError, match=f"pos_embed: .*{words}.*; give base_size and interpolation_scale"):
            weights.read(tmp_path / "x.pth", given=HEADS)
        weights.read(tmp_path / "x.pth", given={**HEADS, "base_size": 32, "interpolation_scale": 1.0})


def test_half_precision_files_keep_their_type(tmp_path):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in pixart_pth(64, 2.0, micro=True).items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    found = weights.read(tmp_path / "x.pth", given=HEADS)
    assert found.config.interpolation_scale == 2.0
    alike(found.tensors, bare(state))


# .pt of DiT


@pytest.mark.parametrize("kind", ["flat", "training"])
def test_dit_file(tmp_path, kind):
    plain, average = dit_pt(seed=1), dit_pt(seed=2)
    training = {"model": collections.OrderedDict(plain), "ema": average, "opt": {"state": {}, "param_groups": []}}
    training["args"] = argparse.Namespace(model="DiT-XL/2", global_batch_size=256, ckpt_every=50_000)
    torch.save(plain if kind == "flat" else training, tmp_path / "dit.pt")
    found = weights.read(tmp_path / "dit.pt", given=HEADS)
    assert (found.config.condition, found.config.num_classes, found.config.base_size) == ("class", 10, 32)
    alike(found.tensors, bare(plain if kind == "flat" else average))
    assert found.is_ema == (kind == "training")
    assert found.null_table is None
    build(found.config).load_state_dict(found.tensors, strict=True)


def test_names_of_the_network_are_dit_s():
    model = build(Model(depth=2, width=96, heads=4, condition="class", num_classes=10))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == dit_shapes(2, 96, 10)


# Whatever our own models can be


@pytest.mark.parametrize(
    "section",
    [
        {"mlp_ratio": 2.0},
        {"mlp_ratio": 2.3},
        {"patch": 4, "in_channels": 16, "base_size": 64},
        {"qk_norm": True},
        {"modulation": "blocks", "micro_conditioning": True},
        {"depth": 3, "kv_compression": "conv", "kv_compression_factor": 4, "kv_compression_from": 1},
        {"condition": "class", "num_classes": 3, "qk_norm": True},
    ],
    ids=str,
)
def test_every_model_is_known_by_its_shapes(tmp_path, section):
    config = Model.model_validate({"depth": 2, "width": 96, "heads": 4, "caption_width": 24, **section})
    state = build(config).state_dict()
    torch.save(state, tmp_path / "x.pt")
    found = weights.read(tmp_path / "x.pt", given={"heads": 4, "base_size": config.base_size}).config
    told = (set(section) | {"depth", "width"}) - {"mlp_ratio"}  # a ratio is known up to rounding, its shapes exactly
    assert {key: getattr(found, key) for key in told} == {key: getattr(config, key) for key in told}
    assert {name: t.shape for name, t in build(found).state_dict().items()} == {n: t.shape for n, t in state.items()}


# Files that are wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is missing"),
        (lambda s: s.pop("x_embedder.proj.weight"), "x_embedder.proj.weight is missing"),
        (lambda s: s.update({"blocks.0.extra": torch.zeros(2)}), "blocks.0.extra is one too many"),
        (lambda s: s.update({"blocks.7.scale_shift_table": torch.zeros(6, 96)}), "blocks.2.attn.proj.bias is missing"),
        (
            lambda s: s.update({"t_block.1.bias": torch.zeros(5)}),
            r"t_block.1.bias: .* \(576,\), found \(5,\)",
        ),
        (lambda s: s.update({"t_block.1.bias": torch.zeros(576).int()}), "t_block.1.bias: .* found int32"),
        (lambda s: s.update({"t_block.1.bias": torch.zeros(576).to_sparse()}), "t_block.1.bias: .* found sparse_coo"),
        (lambda s: s.update({"t_block.1.bias": [0.0]}), "t_block.1.bias: expected a tensor, found list"),
        (lambda s: s.update({"y_embedder.y_embedding": torch.zeros(120, 5)}), r"y_embedding: .*\(L, 32\).*\(120, 5\)"),
        (
            lambda s: s.update({"y_embedder.y_embedding": torch.zeros(120, 32, dtype=torch.int8)}),
            "y_embedding: expected floating-point numbers, found int8",
        ),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(4)}), "x_embedder.proj.weight: expected 4 axes"),
        (
            lambda s: s.update({"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}),
            r"x_embedder.proj.weight: expected 4 axes of at least 1, found shape \(0, 4, 2, 2\)",
        ),
        (lambda s: s.update({"foo.bar.attn.sr.weight": torch.zeros(1)}), "foo.bar.attn.sr.weight is one too many"),
        (
            lambda s: s.update({"blocks.999999999.x": torch.zeros(1)}),  # a model of so many would never be built
            r"blocks\.2\.\S+ is missing .*, though block 999999999 is there",
        ),
        (lambda s: s.update({f"blocks.{'9' * 5000}.x": torch.zeros(1)}), r"blocks\.99\d+\.x is one too many"),
    ],
)
def test_wrong_weights_are_named(tmp_path, change, words):
    state = pixart_pth()
    change(state)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(DataError, match=words) as raised:
        weights.read(tmp_path / "x.pth", given=HEADS)
    assert str(raised.value).startswith(f"{tmp_path}/x.pth: ")
    assert "\n" not in str(raised.value)


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["alone", "beside", "namespace", "legacy"])
def test_a_file_that_would_run_something_is_refused_in_one_line(tmp_path, place):
    evil, proof = tmp_path / "evil.pth", tmp_path / "proof"
    content = {"state_dict": Evil(proof)}
    if place == "beside":
        content = {"state_dict": pixart_pth(), "optimizer": Evil(proof)}
    elif place == "namespace":
        content = {"model": dit_pt(), "args": argparse.Namespace(x=Evil(proof))}
    torch.save(content, evil, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(DataError, match=r"expected tensors, .*, found posix.system, .* as .safetensors$") as raised:
        weights.read(evil, given=HEADS)
    assert "\n" not in str(raised.value)
    assert not proof.exists()
    torch.load(evil, weights_only=False)  # it would have run
    assert proof.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil(tmp_path / "proof")}))
    with pytest.raises(DataError, match="cannot be read as weights"):
        weights.read(tmp_path / "evil.pth")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        ("x.pth", b"<html>not found</html>", "cannot be read as weights .no file of torch or safetensors"),
        ("x.pth", b"hello\n", "cannot be read as weights .no file of torch or safetensors"),
        ("x.pth", b"", "cannot be read as weights .no file of torch or safetensors"),
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be read as weights"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
    ],
)
def test_damaged_file(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: .*{words}.*; ") as raised:
        weights.read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_truncated_file(tmp_path):
    torch.save({"state_dict": pixart_pth()}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be read as weights .*copy or download it again"):
        weights.read(tmp_path / "x.pth")


def test_a_flipped_bit_in_a_tensor_is_found_before_anything_is_read(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": pixart_pth()}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 4
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch alone takes it
    with pytest.raises(DataError, match=rf"x\.pth: expected the bytes .* member {largest.filename} .*; copy"):
        weights.read(path, given=HEADS)


def test_a_file_saved_without_sums_is_read_and_one_of_the_old_format(tmp_path):
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(pixart_pth(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    torch.save(pixart_pth(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("x.pth", "old.pth"):
        alike(weights.read(tmp_path / name, given=HEADS).tensors, bare(pixart_pth()))


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": {}}, {"state_dict": 3}, {}, {"state_dict": pixart_pth(), "pixart_model": 3}],
    ids=["list", "empty", "number", "nothing", "section"],
)
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"x.pth: (pixart_model: )?expected .*; give another file"):
        weights.read(tmp_path / "x.pth")


def test_nothing_there(tmp_path):
    for source in (tmp_path / "none", "nothing.pth", "weights/nothing.pth"):
        with pytest.raises(ConfigError, match=r"expected a checkpoint or a run .* found nothing there; check the path"):
            weights.read(source)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").touch()
    with pytest.raises(ConfigError, match=r"expected a checkpoint .*, found cat.jpg; give one of them"):
        weights.read(tmp_path / "pictures")


def test_a_run_is_resolved_to_its_last_checkpoint_and_all_else_stays(tmp_path):
    for step in (3, 12):
        folder = tmp_path / "run" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "meta.json").touch()
    assert weights.resolve(tmp_path / "run") == str(tmp_path / "run" / "step_00000012")
    first = tmp_path / "run" / "step_00000003"
    for source in (str(first), str(tmp_path / "x.pth"), str(tmp_path), "PixArt-alpha/PixArt-XL-2-256x256"):
        assert weights.resolve(source) == source


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / ".lease").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"expected a run with a checkpoint, found one that has saved none yet; wait"):
        weights.read(tmp_path)


def test_a_checkpoint_that_lost_its_meta_is_not_half_read(tmp_path):
    for name in ("model", "ema"):
        save_file(bare(pixart_pth()), tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"expected a checkpoint .*, found ema.safetensors"):
        weights.read(tmp_path, given=HEADS)
    (tmp_path / "ema.safetensors").unlink()
    assert weights.read(tmp_path, given=HEADS).where == str(tmp_path / "model.safetensors")


# safetensors and diffusers


def test_safetensors_with_native_names(tmp_path):
    state = pixart_pth(64, 2.0, micro=True)
    save_file(state, tmp_path / "x.safetensors")
    found = weights.read(tmp_path / "x.safetensors", given=HEADS)
    alike(found.tensors, bare(state))
    assert found.config.base_size == 128
    assert torch.equal(found.null_table, state["y_embedder.y_embedding"])


@pytest.mark.parametrize(
    ("more", "metadata", "words"),
    [
        ({"null_caption": torch.zeros(1, 5)}, {}, r"null_caption: expected shape \(L, 32\), found \(1, 5\)"),
        ({"null_caption": torch.zeros(0, 32)}, {}, r"null_caption: expected shape \(L, 32\), found \(0, 32\)"),
        ({"null_caption": torch.zeros(1, 32).int()}, {}, "null_caption: expected floating-point numbers, found int32"),
        ({}, {"pixart_features": "[1]"}, "pixart_features: expected an object"),
        ({}, {"pixart_features": "{"}, "cannot be read as weights"),
        ({}, {"pixart_model": "[]"}, "cannot be read as weights"),
    ],
)
def test_what_stands_beside_weights_is_checked(tmp_path, more, metadata, words):
    save_file({**pixart_pth(), **more}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(DataError, match=words) as raised:
        weights.read(tmp_path / "x.safetensors", given=HEADS)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "micro"])
def theirs(request):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, num_layers=2, cross_attention_dim=96, caption_channels=24,
        sample_size=128 if request.param else 64, use_additional_conditions=request.param,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["folder", "pipeline", "sharded", "file"])
def test_diffusers_folder(tmp_path, theirs, place):
    micro = theirs.use_additional_conditions
    folder = tmp_path / "transformer" if place == "pipeline" else tmp_path
    theirs.save_pretrained(folder, max_shard_size="500KB" if place == "sharded" else "1GB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists() == (place == "sharded")
    found = weights.read(tmp_path / "diffusion_pytorch_model.safetensors" if place == "file" else tmp_path)
    config = found.config
    assert (config.heads, config.depth, config.caption_width, config.micro_conditioning) == (3, 2, 24, micro)
    assert (config.base_size, config.interpolation_scale) == ((128, 2.0) if micro else (64, 1.0))
    assert found.assumed == ()
    qkv = [theirs.state_dict()[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"]
    assert torch.equal(found.tensors["blocks.1.attn.qkv.weight"], torch.cat(qkv))
    assert set(found.tensors) == set(pixart_shapes(2, 96, 24, micro))
    told_otherwise = weights.read(tmp_path, given={"heads": 12}) if place == "folder" else found
    assert told_otherwise.config.heads == 3


def test_a_folder_as_first_released(tmp_path, theirs):
    """Under the class that PixArt shared with others then, and without a scale, which the class knows."""
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "sample_size": 128}
    del config["interpolation_scale"]
    path.write_text(json.dumps(config))
    found = weights.read(tmp_path).config
    assert (found.base_size, found.interpolation_scale, found.heads) == (128, 2.0, 3)


def test_wrong_diffusers_folder(tmp_path, theirs):
    theirs.save_pretrained(tmp_path, max_shard_size="500KB")
    lost = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{lost.name} is missing, which .*index.json names"):
        weights.read(tmp_path)
    (tmp_path / "elsewhere").rename(lost)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, error, words in (
        ({"_class_name": "AutoencoderKL"}, ConfigError, "expected a PixArtTransformer2DModel, found AutoencoderKL"),
        ({"sample_size": "large"}, DataError, "config.json: cannot be read as a configuration"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=words):
            weights.read(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        weights.read(tmp_path)
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"expected diffusion_pytorch_model.safetensors, found none"):
        weights.read(tmp_path)


def test_diffusers_weights_that_are_wrong_are_named(tmp_path, theirs):
    state = theirs.state_dict()
    for change, words in (
        ({"proj_out.bias": None}, "proj_out.bias is missing"),
        ({"transformer_blocks.0.lora": torch.zeros(1)}, "transformer_blocks.0.lora is one too many"),
        ({"transformer_blocks.0.attn1.to_k.bias": torch.zeros(7)}, r"attn1.to_k.bias: expected shape \(96,\)"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(DataError, match=words):
            weights.read(tmp_path / "x.safetensors", given={"heads": 3})


def test_hub_id(tmp_path, theirs, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="500KB")
    asked = []

    def download(name, file, local_files_only):
        assert not local_files_only
        asked.append((name, file))
        if not (tmp_path / file).is_file():
            raise hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    found = weights.read("someone/pixart")
    assert found.config.heads == 3
    assert {name for name, _ in asked} == {"someone/pixart"}
    assert all(file.rpartition("/")[0] in ("", "transformer") for _, file in asked)  # and no other part of a pipeline


def test_a_path_that_is_mistyped_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for source in ("out/nothere", "./nothere", "../nothere", "~/nothere", "a/b/c", "nobody/nothing.pt"):
        with pytest.raises(ConfigError, match=r"expected a checkpoint or a run .* found nothing there; check the path"):
            weights.read(source)


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_serves(tmp_path, theirs, monkeypatch, caplog):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def silent(*_, **__):
        asked.append("info")
        raise ConnectionError("no answer. More words")

    monkeypatch.setattr(hub.HfApi, "model_info", silent)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nobody/nothing: .* found neither \(no answer\); check the name"):
        weights.read("nobody/nothing")
    assert (asked, caplog.text) == (["info"], "")
    cached = tmp_path / "models--nobody--nothing"
    commit = "0123456789abcdef0123456789abcdef01234567"
    theirs.save_pretrained(cached / "snapshots" / commit / "transformer")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert weights.read("nobody/nothing").config.heads == 3


def test_hub_that_is_out_of_reach():
    with pytest.raises(ConfigError, match=r"nobody/nothing: expected a path, or an id .*; check the name") as raised:
        weights.read("nobody/nothing")
    assert "\n" not in str(raised.value)
