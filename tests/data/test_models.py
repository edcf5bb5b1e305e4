import shutil
from types import SimpleNamespace

import pytest
import torch

from pixart_data import models
from pixart_data.errors import ConfigError, JobError
from pixart_data.models import loading, placement, provenance, versions


def identity(model, revision, subfolder):
    return models.identity("image.model", model, revision, subfolder)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def folder(tmp_path):
    """A model of 5 MiB: large enough that its identity reads parts of it."""
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "vae" / "weights.safetensors").write_bytes(bytes(range(256)) * (5 << 12))
    return folder


def changed(folder, place):
    path = folder / "vae" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return identity(str(folder), None, None)


def test_cuda_that_is_not_there_is_a_setting_to_mend(no_cuda):
    with pytest.raises(ConfigError, match="device: expected a CUDA device, found none; use device = 'auto' or 'cpu'"):
        placement("cuda", "auto")


def test_auto_is_fp32_on_a_cpu(no_cuda):
    place = placement("auto", "auto")
    assert (place.device, place.dtype) == (torch.device("cpu"), torch.float32)


def test_auto_is_bf16_on_a_gpu(with_cuda):
    place = placement("auto", "auto")
    assert (place.device, place.dtype) == (torch.device("cuda"), torch.bfloat16)
    assert placement("cpu", "auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_named_dtype_is_taken(no_cuda, name, dtype):
    assert placement("cpu", name).dtype == dtype


@pytest.mark.parametrize(
    "error",
    [
        OSError("no file named model.safetensors\n\nlong story"),
        ValueError("Unrecognized configuration class\nModel type should be one of A, B"),
        KeyError("layer"),
        RuntimeError("\n  size mismatch\nfor weight"),
        TypeError(),
        AttributeError("x" * 5000),
        ConnectionError("no route to host"),
    ],
)
def test_a_failure_to_load_is_one_line_that_names_the_setting(error):
    with pytest.raises(ConfigError) as caught, loading("image.model", "owner/name"):
        raise error
    text = str(caught.value)
    assert text.startswith("image.model: owner/name cannot be loaded: ")
    assert text.endswith("or a hub id that is reachable or in the local cache")
    assert "\n" not in text
    assert len(text) < 600
    assert caught.value.__cause__ is error


def test_a_missing_package_is_named():
    expected = pytest.raises(ConfigError, match="text.model: loading owner/name needs a package: .*sentencepiece")
    with expected, loading("text.model", "owner/name"):
        raise ImportError("T5Tokenizer requires the sentencepiece library\nbut it was not found")


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    expected = pytest.raises(ConfigError, match=f"image.model: no such folder: {tmp_path}/no; give a folder")
    with expected, loading("image.model", f"{tmp_path}/no"):
        pytest.fail("tried to load")


def test_a_folder_that_is_not_there_has_no_identity(tmp_path):
    with pytest.raises(ConfigError, match=f"image.model: no such folder: {tmp_path}/no"):
        identity(f"{tmp_path}/no", None, None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), JobError("the disk is full")])
def test_what_is_no_fault_of_the_model_passes(error):
    with pytest.raises(type(error)) as caught, loading("image.model", "owner/name"):
        raise error
    assert caught.value is error


def test_a_copied_or_touched_model_is_the_same_model(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    (copied / "vae" / "weights.safetensors").touch()
    assert identity(str(copied), None, None) == identity(str(folder), None, None)
    assert identity(str(copied), None, "vae") == identity(str(folder), "any", "vae")


def test_other_weights_of_the_same_shape_are_another_model(folder):
    size_bytes = (folder / "vae" / "weights.safetensors").stat().st_size
    seen = {identity(str(folder), None, None)}
    for place in (0, (1 << 20) - 1, size_bytes // 2 + 5, size_bytes - (1 << 20), size_bytes - 1):
        seen.add(changed(folder, place))
    assert len(seen) == 6


def test_files_that_come_go_or_move_make_another_model(folder):
    seen = {identity(str(folder), None, None)}
    (folder / "generation_config.json").write_text("{}")
    seen.add(identity(str(folder), None, None))
    (folder / "generation_config.json").rename(folder / "preprocessor_config.json")
    seen.add(identity(str(folder), None, None))
    (folder / "preprocessor_config.json").unlink()
    assert len(seen) == 3
    assert identity(str(folder), None, None) in seen


def test_only_the_subfolder_counts_where_there_is_one(folder):
    before = identity(str(folder), None, "vae")
    (folder / "config.json").write_text('{"other": 1}')
    assert identity(str(folder), None, "vae") == before
    changed(folder, 0)
    assert identity(str(folder), None, "vae") != before


def test_a_hub_id_is_told_by_what_was_asked_for():
    asked = [("o/n", None, None), ("o/n", "v2", None), ("o/n", None, "vae"), ("o/m", None, None)]
    assert len({identity(*one) for one in asked}) == 4
    assert identity("o/n", None, None) == identity("o/n", "main", None)


@pytest.mark.parametrize("config", [SimpleNamespace(_commit_hash="abc"), {"_commit_hash": "abc"}])
def test_provenance_prefers_the_commit_that_was_loaded(config):
    facts = provenance(config, "o/n", "main", "vae")
    assert facts == {"id": "o/n", "subfolder": "vae", "revision": "abc", "identity": identity("o/n", "abc", "vae")}


@pytest.mark.parametrize("config", [SimpleNamespace(), SimpleNamespace(_commit_hash=None), {}])
def test_provenance_without_a_commit_is_what_was_asked_for(config):
    assert provenance(config, "o/n", "v1", None)["revision"] == "v1"
    assert provenance(config, "o/n", None, None)["revision"] is None


def test_versions_are_of_what_is_installed():
    found = versions("torch", "no-such-package-at-all")
    assert found == {"torch": torch.__version__}
