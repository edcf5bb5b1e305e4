"""What stands in the files that `pixart convert` writes, and that what reads weights takes their folders."""

import pytest
import torch

from jobs import layouts
from jobs.cli import main
from pixart_data.errors import ConfigError
from pixart_model import weights
from pixart_model.beginnings import begin
from pixart_model.config import Init
from pixart_model.networks import build
from pixart_model.sizes import Model
from pixart_model.weights import Weights
from tests.officials import dit_pt, pixart_pth

CONFIG = Model(size="tiny", caption_width=32)
FEATURES = {
    "image": {"model": {"id": "tiny/vae", "scaling_factor": 0.18215}},
    "text": {"model": {"id": "tiny/t5", "width": 32}, "policy": {"max_tokens": 50}},
}


def made(**more):
    """Weights as a checkpoint has them."""
    torch.manual_seed(0)
    null = torch.randn(1, 32).bfloat16()
    return Weights(build(CONFIG).state_dict(), CONFIG, None, FEATURES, null, "runs/x", is_ema=True, **more)


def test_one_file_begins_a_run_as_its_checkpoint_would(tmp_path):
    """With the encoders that it was trained on, which are compared."""
    layouts.write_safetensors(made(), tmp_path)
    source = str(tmp_path / "model.safetensors")
    begin(Init(weights=source), build(CONFIG), FEATURES)
    others = {**FEATURES, "image": {"model": {"id": "tiny/vae", "scaling_factor": 0.13}}}
    with pytest.raises(ConfigError, match="VAE .scaling_factor 0.13.* trained with scaling_factor 0.18215"):
        begin(Init(weights=source), build(CONFIG), others)


def test_one_file_of_a_checkpoint_becomes_the_reference_s_with_its_null_caption(tmp_path):
    layouts.write_safetensors(made(), tmp_path)
    found = layouts.null_table(weights.read(tmp_path))
    assert torch.equal(found, made().null_caption.float().expand(50, -1))


def test_pth_holds_the_numbers_of_a_view_and_not_all_that_it_is_a_view_of(tmp_path):
    source = made()
    name = "y_embedder.y_proj.fc1.bias"
    plain = tmp_path / "plain"
    plain.mkdir()
    layouts.write_pth(source, None, plain)
    source.tensors[name] = torch.zeros(1_000_000)[: len(source.tensors[name])]
    layouts.write_pth(source, None, tmp_path)
    sizes_bytes = [(folder / "model.pth").stat().st_size for folder in (plain, tmp_path)]
    assert abs(sizes_bytes[1] - sizes_bytes[0]) < 1000
    assert torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"][name].count_nonzero() == 0


def test_pth_tells_its_heads(tmp_path):
    """Which no width tells but published ones, so that what was written is read without being told again."""
    layouts.write_pth(made(), None, tmp_path)
    assert weights.read(tmp_path).config == CONFIG
    assert weights.read(tmp_path, given={"heads": 8}).config == CONFIG


@pytest.mark.parametrize(
    ("content", "layout", "file"),
    [
        (pixart_pth, "safetensors", "model.safetensors"),
        (pixart_pth, "pth", "model.pth"),
        (dit_pt, "pth", "model.pt"),
    ],
)
def test_the_folder_of_a_file_is_as_good_as_the_file(tmp_path, capsys, content, layout, file):
    torch.save(content(), tmp_path / "x.pth")
    out = tmp_path / "out"
    words = ["--to", layout, "--out", str(out), "--set", "heads=4"]
    assert main(["convert", str(tmp_path / "x.pth"), *words]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    folder = capsys.readouterr().out
    assert main(["inspect", str(out / file)]) == 0
    assert folder.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:]
    assert folder.startswith(f"{out}: weights\n")
    found = weights.read(out, given={"heads": 4})
    assert found.where == str(out / file)
    assert torch.equal(found.tensors["blocks.1.attn.qkv.weight"], content()["blocks.1.attn.qkv.weight"])


def test_inspect_tells_an_average_and_whose_null_caption_it_is(tmp_path, capsys):
    layouts.write_safetensors(made(), tmp_path)
    layouts.write_pth(made(), None, tmp_path)
    for name, average in (("model.safetensors", ", the moving average of the weights"), ("model.pth", "")):
        assert main(["inspect", str(tmp_path / name)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].endswith(f" numbers in {len(made().tensors)} tensors{average}")
        assert "  dropped    captions become that of the empty string" in lines
