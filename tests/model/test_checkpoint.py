import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.config import Inspect
from jobs.inspect import inspect
from pixart_data.config import digest
from pixart_data.errors import ConfigError, DataError
from pixart_model import checkpoint
from pixart_model.networks import build
from pixart_model.nulls import NullCaption
from pixart_model.parallel import World
from pixart_model.savers import Saver
from pixart_model.sizes import Model
from pixart_model.states import optimizer_of, restore, weights_of

TINY = Model(size="tiny", depth=1, width=24, heads=2, caption_width=16)
CLASSES = Model(size="tiny", depth=1, width=24, heads=2, condition="class", num_classes=5)
ALONE = World(0, 1, torch.device("cpu"))
SHARD = "optimizer/shard-00001.safetensors"
WEIGHTS = ["model.safetensors", "ema.safetensors"]
FILES = [*WEIGHTS, "null_caption.safetensors", SHARD, "config.toml", "meta.json"]


def start(config=TINY, seed=0):
    """A model, its average and its optimizer."""
    torch.manual_seed(seed)
    model = build(config)
    ema = copy.deepcopy(model).requires_grad_(False)
    return model, ema, torch.optim.AdamW(model.parameters(), lr=0.01)


def advance(model, ema, optimizer, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 0.5)


def tensors_of(model, ema, optimizer):
    """Copies of all that training changes, by name."""
    state = {f"{i}.{name}": t for i, fields in optimizer.state_dict()["state"].items() for name, t in fields.items()}
    networks = {f"{i}.{name}": t for i, network in enumerate((model, ema)) for name, t in network.state_dict().items()}
    return {name: tensor.clone() for name, tensor in (state | networks).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def meta_at(step, config=TINY):
    features = {"text": {"model": {"id": "t5"}}, "counts": {"samples": 23}}
    position = {"seed": 7, "step": step, "batch": 2 * step}
    return checkpoint.Meta(step, config.model_dump(), features, {"run.seed": 7}, position, {"size": 1})


NULL = NullCaption(torch.arange(32.0).reshape(2, 16).bfloat16())


@pytest.fixture(scope="module")
def training():
    parts = start()
    advance(*parts, 1)
    advance(*parts, 2)
    return parts


def write(run_dir, training, step=1, null=NULL, config=TINY):
    saver = Saver(run_dir, 2, ALONE)
    path = saver.save(meta_at(step, config), *training, null, "a = 1\n")
    saver.wait()
    saver.close()
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory, training):
    return write(tmp_path_factory.mktemp("run"), training, step=12)


@pytest.fixture
def path(original, tmp_path):
    """A checkpoint of the training, in `tmp_path`."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def test_what_is_saved_is_what_is_restored(tmp_path, training, path):
    assert path == tmp_path / "step_00000012"
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == set(FILES)
    assert (path / "config.toml").read_text() == "a = 1\n"

    fresh = start(seed=1)
    assert not same(tensors_of(*fresh), tensors_of(*training))
    restore(path, *fresh, ALONE)
    assert same(tensors_of(*fresh), tensors_of(*training))
    going_on = copy.deepcopy(training)
    for parts in (fresh, going_on):
        advance(*parts, 3)
    assert same(tensors_of(*fresh), tensors_of(*going_on)), "one more step is the same, too"


def test_meta_says_what_a_checkpoint_is(path):
    meta = checkpoint.read_meta(path)
    assert meta.position == {"seed": 7, "step": 12, "batch": 24}
    assert (meta.step, meta.world, meta.resumes) == (12, {"size": 1}, {"run.seed": 7})
    assert meta.model_config == TINY
    assert meta.null_caption == "own_length"
    sizes = {file.path: file.size_bytes for file in meta.files}
    assert sizes == {name: (path / name).stat().st_size for name in FILES if name != "meta.json"}


def test_inspect_says_where_a_run_goes_on(path, capsys):
    inspect(Inspect(path=str(path.parent)), dry_run=False)
    lines = capsys.readouterr().out.splitlines()
    size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert lines[1] == f"  checkpoint {path}, step 12, {size_bytes:,} bytes"
    assert lines[4:8] == [
        "  dropped    captions become that of the empty string",
        "  trained on samples 23",
        "  goes on    seed 7, step 12, batch 24",
        "  written by size 1",
    ]


def test_learning_rate_and_decay_stay_those_of_the_job(training, path):
    model, ema, _ = start(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    restore(path, model, ema, optimizer, ALONE)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert same(tensors_of(model, ema, optimizer), tensors_of(*training))


def test_before_the_first_step_there_is_no_optimizer_state_to_save_or_restore(tmp_path):
    parts, fresh = start(), start(seed=1)
    path = write(tmp_path, parts, step=0)
    assert list((path / "optimizer").iterdir()) == []
    restore(path, *fresh, ALONE)
    for one in (parts, fresh):
        advance(*one, 1)
    assert same(tensors_of(*parts), tensors_of(*fresh))


def test_only_the_last_are_kept_in_order_of_steps(tmp_path, training):
    for step in (9, 10, 99999999, 123456789):
        last = write(tmp_path, training, step)
    assert checkpoint.latest(tmp_path) == last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_123456789", "step_99999999"]
    checkpoint.prune(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_123456789"], "the last one is never deleted"


def test_leftovers_of_a_kill_are_neither_read_nor_kept(tmp_path, training):
    (tmp_path / ".tmp-step_00000099-xyz").mkdir()
    (tmp_path / ".tmp-step_00000099-xyz" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    write(tmp_path, training)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_surplus_and_misshapen_weights_are_named(path, name):
    weights = load_file(path / name)
    key = "blocks.0.attn.qkv.bias"
    for changed, complaint in (
        ({k: v for k, v in weights.items() if k != key}, f"{key} is missing"),
        ({**weights, "pos_embed": torch.zeros(2)}, "pos_embed is one too many"),
        ({**weights, key: torch.zeros(5)}, rf"{key}: expected shape \(72,\), found \(5,\)"),
    ):
        save_file(changed, path / name)
        with pytest.raises(DataError, match=f"{name}: {complaint}"):
            checkpoint.load_weights(path, use_ema=name.startswith("ema"))
        with pytest.raises(DataError, match=f"{name}: {complaint}"):
            restore(path, *start(), ALONE)


def reseal(path):
    """Make `meta.json` vouch for the files as they are."""
    fields = json.loads((path / "meta.json").read_text())
    for entry in fields["files"]:
        entry["size_bytes"] = (path / entry["path"]).stat().st_size
        entry["sha256"] = checkpoint.file_sha256(path / entry["path"])
    del fields["sha256"]
    (path / "meta.json").write_text(json.dumps({**fields, "sha256": digest(fields)}))


def test_missing_surplus_and_misshapen_state_of_the_optimizer_is_named(path):
    state = load_file(path / SHARD)
    key = "state.blocks.0.attn.qkv.bias.exp_avg"
    for changed, complaint in (
        ({k: v for k, v in state.items() if k != key}, f"{key} is missing"),
        ({**state, "state.pos_embed.step": torch.zeros(2)}, "state.pos_embed.step is one too many"),
        ({**state, key: torch.zeros(5)}, rf"{key}: expected shape \(72,\), found \(5,\)"),
        ({**state, key: state[key].double()}, f"{key}: expected torch.float32, found torch.float64"),
    ):
        save_file(changed, path / SHARD)
        reseal(path)
        with pytest.raises(DataError, match=f"optimizer: {complaint}"):
            restore(path, *start(), ALONE)


def test_a_part_of_a_spread_tensor_that_is_not_there_is_noticed(path):
    """As if a process had written the second half, whose file nobody lists."""
    state = load_file(path / SHARD)
    key = "state.blocks.0.attn.qkv.bias.exp_avg"
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in state.items()}
    offsets[key] = {"saved_offsets": [36]}
    save_file({**state, key: state[key][36:].clone()}, path / SHARD, {"DCP_SHARDING_INFO": json.dumps(offsets)})
    reseal(path)
    with pytest.raises(DataError, match=rf"optimizer: damaged \({key}: expected 72 numbers, found 36\)"):
        restore(path, *start(), ALONE)


def test_a_file_that_nobody_wrote_is_not_read(path):
    save_file({"x": torch.zeros(1)}, path / "optimizer" / "copy.safetensors")
    with pytest.raises(DataError, match="copy.safetensors: not a part of the checkpoint; delete this file"):
        restore(path, *start(), ALONE)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, cut_short, flip])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_restored(path, name, harm):
    harm(path / name)
    fresh = start(seed=1)
    before = tensors_of(*fresh)
    with pytest.raises(DataError, match=rf"{name}: damaged .*; delete the checkpoint's folder to use the one before"):
        restore(path, *fresh, ALONE)
    assert same(tensors_of(*fresh), before)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing from the checkpoint; delete its folder") as error:
        restore(path, *start(), ALONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("harm", [truncate, flip])
def test_readers_notice_damage_too(path, harm):
    for name in FILES[:3]:
        harm(path / name)
    for use_ema, name in enumerate(WEIGHTS):
        with pytest.raises(DataError, match=f"{name}: damaged"):
            checkpoint.load_weights(path, bool(use_ema))
    with pytest.raises(DataError, match="null_caption.safetensors: damaged"):
        checkpoint.load_null_caption(path)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_nothing_that_would_run_code_is_opened(path, capsys):
    (path / "optimizer" / ".metadata").write_bytes(pickle.dumps(Evil()))  # of the default format of torch's library
    restore(path, *start(), ALONE)
    for name in (*WEIGHTS, SHARD):
        torch.save({"x": Evil()}, path / name)
        reseal(path)
        with pytest.raises(DataError, match="damaged"):
            restore(path, *start(), ALONE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (1, 'found version 1; choose another run.output, and init.weights = ".*/step_00000012/ema.safetensors"'),
        (3, "found version 3; it was written by a newer version of this toolkit"),
    ],
)
def test_another_version_is_refused_with_what_to_do(path, version, advice):
    fields = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**fields, "version": version}))
    with pytest.raises(DataError, match=f"expected version 2 of checkpoints, {advice}"):
        checkpoint.read_meta(path)


def test_find_takes_a_checkpoint_or_a_run(tmp_path, path):
    assert checkpoint.find(path) == checkpoint.find(tmp_path) == path
    with pytest.raises(ConfigError, match="expected a checkpoint or a run with one"):
        checkpoint.find(tmp_path / "nowhere")


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_model_is_rebuilt_for_sampling(path, training, use_ema):
    model = checkpoint.load_model(path, use_ema, torch.device("cpu"), torch.bfloat16)
    assert not model.training
    expected = training[use_ema].state_dict()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, expected[name].bfloat16())
    assert not torch.equal(*(parts.blocks[0].attn.qkv.bias for parts in training[:2]))


@pytest.mark.parametrize("null", [NULL, NullCaption(NULL.features, follows_caption=True)])
def test_the_null_caption_keeps_its_convention(tmp_path, training, null):
    found = checkpoint.load_null_caption(write(tmp_path, training, null=null))
    assert torch.equal(found.features, null.features)
    assert found.features.dtype == torch.bfloat16
    assert found.follows_caption == null.follows_caption


def test_a_model_of_classes_has_no_null_caption(tmp_path):
    parts, fresh = start(CLASSES), start(CLASSES, seed=1)
    advance(*parts, 1)
    path = write(tmp_path, parts, null=None, config=CLASSES)
    assert not (path / "null_caption.safetensors").exists()
    assert checkpoint.load_null_caption(path) is None
    restore(path, *fresh, ALONE)
    assert same(tensors_of(*parts), tensors_of(*fresh))
    found = checkpoint.load_model(path, False, torch.device("cpu"), torch.float32)
    assert torch.equal(found.y_embedder.embedding_table.weight, parts[0].y_embedder.embedding_table.weight)


def test_a_model_of_another_size_is_refused_with_the_key(path):
    with pytest.raises(DataError, match=r"model.safetensors: \S+: expected shape .*of another model configuration"):
        restore(path, *start(TINY.model_copy(update={"width": 48})), ALONE)
    with pytest.raises(DataError, match=r"model.safetensors: blocks.1.\S+ is missing"):
        restore(path, *start(TINY.model_copy(update={"depth": 2})), ALONE)


def test_compiled_blocks_leave_no_trace_in_the_names():
    parts = start()
    advance(*parts, 1)
    model, _, optimizer = parts
    names, state = weights_of(model).keys(), optimizer_of(model, optimizer).keys()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    assert weights_of(model).keys() == names
    assert optimizer_of(model, optimizer).keys() == state
