import logging

import pytest
import torch

from pixart_data.errors import ConfigError, DataError
from pixart_model import train
from pixart_model.beginnings import _require_same_trunk, begin
from pixart_model.checkpoint import Meta, load_null_caption, load_weights
from pixart_model.config import Init
from pixart_model.dit import DiT
from pixart_model.networks import build
from pixart_model.nulls import NullCaption
from pixart_model.packing import pack
from pixart_model.parallel import World
from pixart_model.reparameterisation import reparameterise
from pixart_model.savers import Saver
from pixart_model.sizes import Model
from tests.officials import dit_pt, pixart_pth

WIDTH, CAPTION_WIDTH, TEXT_WIDTH = 96, 32, 24  # the last one of the features in conftest
FEATURES = {
    "image": {"model": {"id": "tiny/vae", "revision": "abc", "scaling_factor": 0.18215, "shift_factor": None}},
    "text": {"model": {"id": "tiny/t5", "revision": "def", "width": CAPTION_WIDTH}, "policy": {"max_tokens": 120}},
    "resolution_px": 256,
}


def section(**more):
    return Model(**{"size": "tiny", "depth": 2, "width": WIDTH, "heads": 4, "caption_width": CAPTION_WIDTH, **more})


def other(**facts):
    """FEATURES with other facts, each given as `image__id = ...`."""
    changed = dict(FEATURES)
    for name, value in facts.items():
        part, _, fact = name.partition("__")
        changed[part] = {**changed[part], "model": {**changed[part]["model"], fact: value}}
    return changed


def fresh(config, seed=7):
    torch.manual_seed(seed)
    return build(config)


def trained(config, seed=1):
    model = fresh(config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(folder, model, ema=None, features=FEATURES, null=None):
    """A run with a checkpoint, as training writes it."""
    if model.config.condition == "caption":
        null = null or NullCaption(torch.ones(2, model.config.caption_width).bfloat16())
    ema = model if ema is None else ema
    saver = Saver(folder, 1, World(0, 1, torch.device("cpu")))
    meta = Meta(3, model.config.model_dump(), features, {})
    saver.save(meta, model, ema, torch.optim.AdamW(model.parameters()), null, "")
    saver.wait()
    saver.close()
    return folder


def write(path, content):
    torch.save(content, path)
    return path


def start(source, model, features=FEATURES, **options):
    return begin(Init(weights=str(source), **options), model, features)


def alike(found, expected, names=None):
    assert names is None or names <= set(expected)
    for name in expected if names is None else names:
        assert torch.equal(found[name], expected[name]), name


def said(caplog):
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pixart_model.beginnings"]
    assert "\n" not in line
    return line


@pytest.fixture(autouse=True)
def _listening(caplog):
    caplog.set_level(logging.INFO, logger="pixart_model.beginnings")


# The same kind


def test_without_weights_the_model_stays_as_it_was_drawn(caplog):
    model = fresh(section())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert begin(Init(), model, FEATURES) is None
    alike(model.state_dict(), before)


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_run_is_taken_whole(tmp_path, caplog, use_ema):
    plain, average = trained(section()), trained(section(), seed=2)
    run = save(tmp_path / "run", plain, average)
    model = fresh(section())
    assert start(run, model, use_ema=use_ema) is None
    alike(model.state_dict(), (average if use_ema else plain).state_dict())
    line = said(caplog)
    assert f"{run / 'step_00000003'}" in line
    assert f"; its {'moving average' if use_ema else 'weights'};" in line
    assert "drawn anew: nothing" in line


def test_the_stages_go_from_256_to_512_to_1024_by_one_key(tmp_path, caplog):
    small, medium = section(base_size=32), section(base_size=64)
    large = section(base_size=128, interpolation_scale=2.0, micro_conditioning=True)
    first = trained(small)
    second = fresh(medium)
    start(save(tmp_path / "256", first), second)
    alike(second.state_dict(), first.state_dict())
    assert "base_size 32 -> 64" in said(caplog)
    caplog.clear()

    third = fresh(large)
    start(save(tmp_path / "512", second), third)
    alike(third.state_dict(), first.state_dict(), set(first.state_dict()))
    line = said(caplog)
    assert "base_size 64 -> 128; interpolation_scale 1.0 -> 2.0" in line
    assert "drawn anew: ar_embedder.mlp.0, csize_embedder.mlp.0" in line
    cpu = torch.device("cpu")  # twice as many tokens on a side lie half as far apart
    assert torch.equal(third.positions(64, 64, cpu)[0, 2], second.positions(32, 32, cpu)[0, 1])


def test_micro_conditioning_is_added_without_a_change_of_the_function(tmp_path):
    old = trained(section())
    model = fresh(section(micro_conditioning=True))
    before = model.state_dict()["csize_embedder.mlp.0.weight"].clone()
    start(save(tmp_path / "run", old), model)
    assert torch.equal(model.state_dict()["csize_embedder.mlp.0.weight"], before)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    y = pack([torch.randn(n, CAPTION_WIDTH) for n in (3, 1)])
    size_px, ratio = torch.tensor([[300.0, 411.0], [64.0, 64.0]]), torch.tensor([0.72, 1.0])
    with torch.no_grad():
        expected, found = old(x, t, y), model(x, t, y, None, size_px, ratio)
    assert expected.abs().mean() > 0.05
    assert torch.equal(found, expected)


def test_full_attention_becomes_compressed_and_not_back(tmp_path, caplog):
    old = trained(section())
    model = fresh(section(kv_compression="conv"))
    convolution = model.state_dict()["blocks.1.attn.sr.weight"].clone()
    run = save(tmp_path / "run", old)
    start(run, model)
    alike(model.state_dict(), old.state_dict(), set(old.state_dict()))
    assert torch.equal(model.state_dict()["blocks.1.attn.sr.weight"], convolution)
    assert "drawn anew: blocks.*.attn.norm, blocks.*.attn.sr" in said(caplog)

    compressed = save(tmp_path / "compressed", model)
    with pytest.raises(ConfigError, match=r"model\.kv_compression: expected 'conv', .* found None"):
        start(compressed, fresh(section()))
    with pytest.raises(ConfigError, match=r"model\.kv_compression_from: expected 1, .* found 0"):
        start(compressed, fresh(section(kv_compression="conv", kv_compression_from=0)))
    start(compressed, fresh(section(kv_compression="conv", kv_compression_from=1)))  # the same, said outright


def test_an_official_file_is_taken_and_what_it_does_not_say_is_said(tmp_path, caplog):
    content = pixart_pth()
    del content["pos_embed"]
    model = fresh(section(base_size=64))
    start(write(tmp_path / "PixArt-XL-2-256x256.pth", {"state_dict": content}), model)
    alike(model.state_dict(), content, set(model.state_dict()))
    line = said(caplog)
    assert "base_size 64, theirs is not told" in line
    assert "trained on features of encoders that it does not name" in line


def test_weights_of_other_types_become_those_of_the_model(tmp_path):
    content = {name: tensor.half() for name, tensor in pixart_pth().items()}
    model = fresh(section())
    start(write(tmp_path / "half.pth", content), model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.state_dict()["t_block.1.weight"], content["t_block.1.weight"].float())


# From DiT


@pytest.mark.parametrize("options", [{}, {"shared_mlp": "first", "without_class": "null"}, {"without_class": "mean"}])
def test_dit_becomes_pixart(tmp_path, caplog, options):
    content = dit_pt()
    config = section(micro_conditioning=True)
    model = fresh(config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start(write(tmp_path / "DiT.pt", content), model, **options)
    options = {"shared_mlp": "mean", "without_class": "zero"} | options
    weights = {name: tensor for name, tensor in content.items() if name != "pos_embed"}
    dit = section(condition="class", num_classes=10)
    alike(model.state_dict(), reparameterise(weights, dit, config, base=base, **options))
    line = said(caplog)
    assert "DiT, re-parameterised at t = 500" in line
    assert all(f"{key} = {value}" in line for key, value in options.items())
    assert "drawn anew: ar_embedder.mlp.0, blocks.*.cross_attn.kv_linear, blocks.*.cross_attn.q_linear, " in line


def test_an_option_that_is_not_used_is_not_said(tmp_path, caplog):
    start(write(tmp_path / "DiT.pt", dit_pt()), fresh(section(modulation="blocks")))
    assert "at t = 500 (without_class = zero)" in said(caplog)


def test_our_own_stage_one_becomes_pixart(tmp_path):
    facts = {"image": FEATURES["image"], "resolution_px": 256, "classes": []}
    dit = trained(section(condition="class", num_classes=10))
    model = fresh(section())
    start(save(tmp_path / "run", dit, features=facts), model)
    alike(model.state_dict(), dit.state_dict(), {"x_embedder.proj.weight", "blocks.1.attn.qkv.weight"})


def test_dit_goes_on_as_dit(tmp_path):
    content = dit_pt()
    model = fresh(section(condition="class", num_classes=10))
    assert isinstance(model, DiT)
    start(write(tmp_path / "DiT.pt", {"model": dit_pt(seed=1), "ema": content}), model)
    alike(model.state_dict(), content, set(model.state_dict()))


def test_pixart_does_not_become_dit(tmp_path):
    model = fresh(section(condition="class"))
    with pytest.raises(ConfigError, match="expected weights of a DiT.* a PixArt's in .*set model.condition = 'cap"):
        start(write(tmp_path / "x.pth", pixart_pth()), model)


# Refusals


@pytest.mark.parametrize(
    ("key", "found", "wanted", "said"),
    [
        ("depth", {"depth": 3}, {}, r"model\.depth: expected 3, as .*run.*, found 2; set model\.depth = 3"),
        ("width", {"width": 48}, {}, r"model\.width: expected 48, .* found 96"),
        ("patch", {}, {"patch": 4}, r"model\.patch: expected 2, .* found 4"),
        ("heads", {"heads": 8}, {}, r"model\.heads: expected 8, .* found 4"),
        ("qk_norm", {}, {"qk_norm": True}, r"model\.qk_norm: expected false, .* found true"),
        ("modulation", {"modulation": "blocks"}, {}, r"model\.modulation: expected 'blocks', .* found 'single'"),
        ("caption_width", {}, {"caption_width": 16}, r"model\.caption_width: expected 32, .* init\.other_features"),
        ("in_channels", {"in_channels": 16}, {}, r"model\.in_channels: expected 16, .* init\.other_features"),
        (
            "micro_conditioning",
            {"micro_conditioning": True},
            {},
            r"model\.micro_conditioning: expected true, .* found false; set model\.micro_conditioning = true",
        ),
    ],
)
def test_another_size_is_refused_by_its_key_and_nothing_is_loaded(tmp_path, key, found, wanted, said):
    run = save(tmp_path / "run", trained(section(**found)))
    model = fresh(section(**wanted))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        start(run, model)
    alike(model.state_dict(), before)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"size": "s-2"}, 'model.depth, model.width, model.heads: expected 2, 96, 4, as W has it, found 12, 384, 6; '
         'set model.size = "tiny"'),
        ({"size": "s-2", "depth": 3}, "model.depth, model.width, model.heads: expected 2, 96, 4, as W has it, found 3, "
         "384, 6; set model.depth = 2, model.width = 96, model.heads = 4"),
        ({"size": "s-2", "qk_norm": True}, "model.depth, model.width, model.heads, model.qk_norm: expected 2, 96, 4, "
         'false, as W has it, found 12, 384, 6, true; set model.size = "tiny", model.qk_norm = false'),
    ],
)  # fmt: skip
def test_all_that_differs_in_size_is_named_at_once(wanted, said):
    found, wanted = Model(size="tiny"), Model(**wanted)
    with pytest.raises(ConfigError) as raised:
        _require_same_trunk(found, wanted, "W")
    assert str(raised.value) == said


def test_heads_that_a_file_does_not_tell_hide_no_size(tmp_path):
    source = write(tmp_path / "x.pth", pixart_pth())  # of the size tiny
    with pytest.raises(ConfigError, match=r'model\.depth, model\.width: .*; set model\.size = "tiny"$'):
        start(source, fresh(section(size="s-2", depth=12, width=384, heads=6)))


def test_other_classes_and_another_size_of_dit_are_refused(tmp_path):
    source = write(tmp_path / "DiT.pt", dit_pt())
    with pytest.raises(ConfigError, match=r"model\.num_classes: expected 10, .* found 7"):
        start(source, fresh(section(condition="class", num_classes=7)))
    with pytest.raises(ConfigError, match=r"model\.depth: expected 2, as .*DiT\.pt has it, found 3"):
        start(source, fresh(section(depth=3)))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"image__scaling_factor": 0.13025}, "VAE .scaling_factor 0.13025.* trained with scaling_factor 0.18215"),
        ({"image__shift_factor": 0.1}, "VAE .shift_factor 0.1"),
        ({"image__id": "other/vae"}, "VAE .id other/vae.* trained with id tiny/vae"),
        ({"text__id": "other/t5"}, "text encoder .id other/t5.* trained with id tiny/t5"),
    ],
)
def test_features_of_other_encoders_are_refused_unless_allowed(tmp_path, caplog, facts, said):
    old = trained(section())
    run = save(tmp_path / "run", old)
    with pytest.raises(ConfigError, match=f"{said}.*init.other_features = true"):
        start(run, fresh(section()), other(**facts))
    model = fresh(section())
    start(run, model, other(**facts), other_features=True)
    alike(model.state_dict(), old.state_dict())
    (name, value), *_ = facts.items()
    assert f": {name.partition('__')[2]} " in caplog.text
    assert f"-> {value}" in caplog.text


def test_a_revision_or_an_absent_shift_makes_no_difference(tmp_path):
    run = save(tmp_path / "run", trained(section()))
    start(run, fresh(section()), other(image__revision="xyz", image__shift_factor=0.0))


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (("/models/t5", "folder:a"), ("/scratch/t5", "folder:a"), True),
        (("/models/t5", "folder:a"), ("/models/t5", "folder:b"), False),
        (("x/t5", "x/t5@1/"), ("x/t5", "x/t5@2/"), True),  # another revision
        (("x/t5", "x/t5@1/"), ("y/t5", "y/t5@1/"), False),
        (("x/t5", "x/t5@1/"), ("/models/t5", "folder:a"), False),
        (("x/t5", None), ("x/t5", "x/t5@1/"), True),
        (("x/t5", None), ("y/t5", None), False),
    ],
)
def test_encoders_are_the_same_by_what_is_in_their_folders_or_else_by_name(tmp_path, before, now, same):
    had, has = (other(text__id=name, text__identity=content) for name, content in (before, now))
    run = save(tmp_path / "run", trained(section()), features=had)
    if same:
        start(run, fresh(section()), has)
        return
    place = 1 if before[0] == now[0] else 0
    words = f"text encoder .{('id', 'identity')[place]} {now[place]}.*trained with .* {before[place]};"
    with pytest.raises(ConfigError, match=words):
        start(run, fresh(section()), has)


@pytest.mark.parametrize(
    ("wanted", "anew"),
    [
        ({"in_channels": 16}, {"x_embedder.proj", "final_layer.linear"}),
        ({"caption_width": 16}, {"y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"}),
    ],
)
def test_other_features_of_another_width_have_their_layers_drawn_anew(tmp_path, caplog, wanted, anew):
    old = trained(section())
    model = fresh(section(**wanted))
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start(save(tmp_path / "run", old), model, other(text__width=16), other_features=True)
    names = {name for name in drawn if name.rpartition(".")[0] in anew}
    assert len(names) == 4
    alike(model.state_dict(), drawn, names)
    alike(model.state_dict(), old.state_dict(), set(drawn) - names)
    assert f"drawn anew: {', '.join(sorted(anew))};" in said(caplog)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.bias", "y_embedder.y_embedding"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_loaded(tmp_path, name, value):
    content = pixart_pth()
    content[name].view(-1)[3] = value
    model = fresh(section())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=rf"x\.pth: {name}: expected finite numbers, found NaN or infinity; start"):
        start(write(tmp_path / "x.pth", content), model)
    alike(model.state_dict(), before)


def test_damaged_files_are_refused(tmp_path):
    whole = write(tmp_path / "whole.pth", {"state_dict": pixart_pth()})
    torn = tmp_path / "torn.pth"
    torn.write_bytes(whole.read_bytes()[:-20_000])
    with pytest.raises(DataError, match="torn.pth"):
        start(torn, fresh(section()))
    content = pixart_pth()
    del content["blocks.1.mlp.fc1.bias"]
    with pytest.raises(DataError, match=r"blocks\.1\.mlp\.fc1\.bias is missing"):
        start(write(tmp_path / "short.pth", content), fresh(section()))
    with pytest.raises(ConfigError, match="nowhere"):
        start(tmp_path / "nowhere.pth", fresh(section()))


# The null caption


def test_the_references_null_caption_is_taken_on_request(tmp_path, caplog):
    content = pixart_pth()
    source = write(tmp_path / "x.pth", {"state_dict": content})
    assert start(source, fresh(section())) is None
    assert "null caption: of the empty string from now on" in said(caplog)
    caplog.clear()
    null = start(source, fresh(section()), null_caption="reference")
    assert null.follows_caption
    assert torch.equal(null.features, content["y_embedder.y_embedding"].bfloat16())
    assert len(null.at(17)) == 17
    assert "null caption" not in said(caplog)
    caplog.clear()
    content["y_embedder.y_embedding"] = content["y_embedder.y_embedding"][:1].repeat(120, 1)  # as we write ours
    start(write(tmp_path / "ours.pth", {"state_dict": content}), fresh(section()))
    assert "null caption" not in said(caplog)


def test_it_goes_on_from_stage_to_stage(tmp_path):
    table = NullCaption(torch.randn(120, CAPTION_WIDTH).bfloat16(), follows_caption=True)
    run = save(tmp_path / "run", trained(section()), null=table)
    null = start(run, fresh(section()), null_caption="reference")
    assert null.follows_caption
    assert torch.equal(null.features, table.features)


def test_a_missing_or_unfit_null_caption_is_refused(tmp_path):
    content = pixart_pth()
    source = write(tmp_path / "x.pth", content)
    longer = {**FEATURES, "text": {**FEATURES["text"], "policy": {"max_tokens": 300}}}
    with pytest.raises(ConfigError, match=r"at most 120 tokens, .* found features of up to 300; .*max_tokens = 120"):
        start(source, fresh(section()), longer, null_caption="reference")
    with pytest.raises(ConfigError, match=r"text features' width 16, found 32"):
        start(
            source, fresh(section(caption_width=16)), other(text__width=16), null_caption="reference",
            other_features=True,
        )  # fmt: skip
    del content["y_embedder.y_embedding"]
    model = fresh(section())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"y_embedding, found none in .*bare\.pth; set init\.null_caption"):
        start(write(tmp_path / "bare.pth", content), model, null_caption="reference")
    alike(model.state_dict(), before)
    run = save(tmp_path / "run", trained(section()))
    with pytest.raises(ConfigError, match="found none in"):
        start(run, fresh(section()), null_caption="reference")
    with pytest.raises(ConfigError, match=r"init\.null_caption: expected init\.weights"):
        begin(Init(null_caption="reference"), fresh(section()), FEATURES)


def test_a_run_keeps_the_null_caption_it_began_with_when_it_goes_on(make_job, tmp_path, caplog):
    content = pixart_pth(width=48, caption_width=TEXT_WIDTH)
    source = write(tmp_path / "x.pth", {"state_dict": content})
    given = {"init": {"weights": str(source), "null_caption": "reference"}, "data": {"drop_caption": 0.5}}
    first = train.run(make_job(**given, run={"num_steps": 1}))
    assert "starts from" in said(caplog)
    last = train.run(make_job(**given, run={"num_steps": 2}))
    assert said(caplog)  # not a second time
    for path in (first, last):
        null = load_null_caption(path)
        assert null.follows_caption
        assert torch.equal(null.features, content["y_embedder.y_embedding"].bfloat16())
    begun = load_weights(first, use_ema=False)
    assert all((begun[name] - content[name]).abs().max() < 0.1 for name in begun)  # a step from there
    assert any(not torch.equal(begun[name], content[name]) for name in begun)
