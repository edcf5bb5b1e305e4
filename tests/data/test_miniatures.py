import hashlib

import pytest
import torch
from transformers.utils import logging

from pixart_data.miniatures import build, build_t5

logging.disable_progress_bar()


def weights(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path):
    first, again, other = (build(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert set(first) == {"llava", "t5", "vae"}
    for name, folder in first.items():
        assert folder == tmp_path / "a" / name
        assert weights(folder) == weights(again[name])
        differ = {path.suffix for path, digest in weights(folder).items() if weights(other[name])[path] != digest}
        assert differ == {".safetensors"}


def test_building_leaves_the_global_seed_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_t5(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_real_classes_load_them(miniatures):
    from diffusers import AutoencoderKL
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        T5EncoderModel,
    )

    models = {
        LlavaForConditionalGeneration: AutoModelForImageTextToText.from_pretrained(miniatures["llava"]),
        LlavaProcessor: AutoProcessor.from_pretrained(miniatures["llava"]),
        T5EncoderModel: T5EncoderModel.from_pretrained(miniatures["t5"]),
        AutoencoderKL: AutoencoderKL.from_pretrained(miniatures["vae"]),
    }
    assert all(type(model) is kind for kind, model in models.items())
    assert AutoTokenizer.from_pretrained(miniatures["t5"])("a red house")["input_ids"][-1] == 1  # </s>


@pytest.mark.parametrize("text", ["a red house", "The IMAGE shows a Green square.", "Ünïcode, 123 & 红色"])
def test_the_t5_tokenizer_ends_every_caption_once(miniatures, text):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(miniatures["t5"])(text)["input_ids"]
    assert ids.count(1) == 1
    assert ids[-1] == 1


@pytest.mark.parametrize("width", [32, 128])
def test_t5_comes_in_widths(tmp_path, width):
    from transformers import T5EncoderModel

    build_t5(tmp_path, width=width)
    assert T5EncoderModel.from_pretrained(tmp_path).config.d_model == width


def test_miniatures_are_small(miniatures):
    from pathlib import Path

    sizes = [sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) for folder in miniatures.values()]
    assert max(sizes) < 2 << 20
