import errno
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_data.errors import ConfigError, DataError, JobError
from pixart_model import checkpoint
from pixart_model.model import PixArt
from pixart_model.sizes import Model

TINY = Model(size="tiny", depth=1, width=24, heads=2, caption_width=16)


@pytest.fixture
def snapshot():
    torch.manual_seed(0)
    model, ema = PixArt(TINY), PixArt(TINY)
    training = {"optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}}
    training["position"] = {"seed": 0, "epoch": 1, "step": 2}

    def at(step):
        meta = checkpoint.Meta(step, TINY.model_dump(), {"text": {"model": {"id": "t5"}}}, {"run.seed": 0})
        null = torch.randn(1, 16).bfloat16()
        return checkpoint.Snapshot(meta, model.state_dict(), ema.state_dict(), null, training, "a = 1\n")

    return at


def test_what_is_saved_is_what_is_loaded(tmp_path, snapshot):
    first = snapshot(12)
    path = checkpoint.save(tmp_path, first, keep_last=2)
    assert path == tmp_path / "step_00000012"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors", "ema.safetensors", "null_caption.safetensors", "state.pt", "config.toml", "meta.json",
    }  # fmt: skip
    found = checkpoint.load(path)
    assert found.meta == first.meta
    assert found.job_toml == "a = 1\n"
    assert torch.equal(found.null_caption, first.null_caption)
    for name in ("model", "ema"):
        a, b = getattr(found, name), getattr(first, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(
        found.training["optimizer"]["state"][0]["exp_avg"], first.training["optimizer"]["state"][0]["exp_avg"]
    )
    assert found.training["position"] == {"seed": 0, "epoch": 1, "step": 2}
    assert found.meta.model_config == TINY


def test_only_the_last_are_kept_in_order_of_steps(tmp_path, snapshot):
    for step in (9, 10, 99999999, 123456789):
        last = checkpoint.save(tmp_path, snapshot(step), keep_last=2)
    assert checkpoint.latest(tmp_path) == last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_123456789", "step_99999999"]


def test_leftovers_of_a_kill_are_neither_read_nor_kept(tmp_path, snapshot):
    (tmp_path / ".tmp-step_00000099-xyz").mkdir()
    (tmp_path / ".tmp-step_00000099-xyz" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_kill_while_writing_leaves_no_checkpoint(tmp_path, snapshot, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 150_000])
def test_storage_that_refuses_is_one_line(tmp_path, snapshot, limit):
    """A limit on the size of files stands in for a full disk; 150 kB let the weights through, then stop the state."""
    big = snapshot(1)
    big.training["optimizer"]["state"][0]["exp_avg"] = torch.zeros(100_000)
    assert 100 < sum(t.nbytes for t in big.model.values()) < 140_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(JobError, match="cannot write: File too large; check the storage, then run again") as error:
            checkpoint.save(tmp_path, big, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ("state.pt" in str(error.value)) == (limit > 100)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_so(tmp_path, snapshot, monkeypatch):
    def full(*_):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert errno.ENOSPC == 28
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(JobError, match="model.safetensors: cannot write: the disk is full"):
        checkpoint.save(tmp_path, snapshot(1), keep_last=2)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_missing_surplus_and_misshapen_weights_are_named(tmp_path, snapshot, name):
    path = checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    weights = load_file(path / name)
    key = "blocks.0.attn.qkv.bias"
    for changed, complaint in (
        ({k: v for k, v in weights.items() if k != key}, f"{key} is missing"),
        ({**weights, "pos_embed": torch.zeros(2)}, "pos_embed is one too many"),
        ({**weights, key: torch.zeros(5)}, rf"{key}: expected shape \(72,\), found \(5,\)"),
    ):
        save_file(changed, path / name)
        with pytest.raises(DataError, match=f"{name}: {complaint}"):
            checkpoint.load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "null_caption.safetensors", "state.pt", "meta.json"])
def test_a_damaged_or_missing_file_is_named(tmp_path, snapshot, name):
    path = checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    (path / name).write_bytes((path / name).read_bytes()[:40])
    with pytest.raises(DataError, match=f"{name}: damaged"):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing from the checkpoint"):
        checkpoint.load(path)


def test_a_state_that_would_run_code_is_refused(tmp_path, snapshot):
    path = checkpoint.save(tmp_path, snapshot(1), keep_last=2)

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"optimizer": Evil()}, path / "state.pt")
    with pytest.raises(DataError, match="state.pt: damaged"):
        checkpoint.load(path)


def test_another_version_is_refused(tmp_path, snapshot):
    path = checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "version": 2}))
    with pytest.raises(DataError, match="expected pixart-checkpoint version 1"):
        checkpoint.read_meta(path)


def test_find_takes_a_checkpoint_or_a_run(tmp_path, snapshot):
    path = checkpoint.save(tmp_path, snapshot(1), keep_last=2)
    assert checkpoint.find(path) == checkpoint.find(tmp_path) == path
    with pytest.raises(ConfigError, match="expected a checkpoint or a run with one"):
        checkpoint.find(tmp_path / "nowhere")


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_model_is_rebuilt_for_sampling(tmp_path, snapshot, use_ema):
    first = snapshot(1)
    path = checkpoint.save(tmp_path, first, keep_last=2)
    model = checkpoint.load_model(path, use_ema, torch.device("cpu"), torch.bfloat16)
    assert not model.training
    expected = first.ema if use_ema else first.model
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, expected[name].bfloat16())
