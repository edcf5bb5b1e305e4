import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from pixart_data.encoders import ImageEncoder, TextEncoder
from pixart_data.errors import ConfigError
from pixart_data.miniatures import build_t5
from pixart_data.sections import ImageFeatures, TextFeatures

logging.disable_progress_bar()

CAPTIONS = [
    "a red house",
    "",
    "The photograph is bright, with soft light, warm colours and a calm atmosphere. " * 3,
    "In the foreground there are several people, a dog and a bicycle",
    "x",
    "A large green square stands to the left of a small yellow triangle",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae(miniatures):
    return ImageEncoder(ImageFeatures(model=miniatures["vae"]))


@pytest.fixture(scope="module")
def t5(miniatures):
    return TextEncoder(TextFeatures(model=miniatures["t5"]))


def text_encoder(miniatures, **settings):
    return TextEncoder(TextFeatures(model=miniatures["t5"], **settings))


def pixels(batch=3, height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def floats(bits):
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128), (128, 32)])
def test_moments_are_mean_and_std_in_cells_of_eight_pixels(vae, height, width):
    moments = vae({"pixels": pixels(2, height, width)})["moments"]
    assert moments.shape == (2, 2, 4, height // 8, width // 8)
    assert moments.dtype == np.float16
    assert (moments[:, 1] > 0).all()
    assert np.isfinite(moments).all()


def test_moments_are_those_of_diffusers(vae):
    batch = pixels()
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        posterior = vae.vae.encode(x).latent_dist
    moments = vae({"pixels": batch})["moments"].astype(np.float32)
    np.testing.assert_allclose(moments[:, 0], posterior.mean.numpy(), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(moments[:, 1], posterior.std.numpy(), rtol=2e-3, atol=1e-4)


def test_an_image_is_encoded_alike_in_any_batch(vae):
    batch = pixels(4)
    together = vae({"pixels": batch})["moments"].astype(np.float32)
    alone = np.concatenate([vae({"pixels": batch[i : i + 1]})["moments"] for i in range(4)]).astype(np.float32)
    np.testing.assert_allclose(together, alone, rtol=2e-3, atol=1e-4)


def test_other_columns_are_kept(vae, t5):
    out = vae({"pixels": pixels(1), "key": ["a"]})
    assert out.keys() == {"pixels", "moments", "key"}
    assert t5({"caption": ["a"], "key": ["k"]})["key"] == ["k"]


def test_black_white_and_turned_pixels_are_read_as_such(vae):
    flat = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    seen = []
    encode = vae.vae.encode
    vae.vae.encode = lambda x: seen.append(x) or encode(x)
    try:
        vae({"pixels": flat})
        vae({"pixels": pixels(1)[:, ::-1]})  # a view with negative strides
    finally:
        del vae.vae.encode
    assert [seen[0][i].unique().tolist() for i in range(2)] == [[-1.0], [1.0]]
    np.testing.assert_allclose((seen[1][0, :, 0, 5].numpy() + 1) * 127.5, pixels(1)[0, -1, 5], atol=1e-3)


def test_latents_come_back_as_pictures(vae):
    pictures = vae.decode(torch.zeros(2, 4, 6, 9))
    assert [(picture.size, picture.mode) for picture in pictures] == [((72, 48), "RGB")] * 2


def test_facts_tell_what_training_and_sampling_need(vae, t5, miniatures):
    assert vae.facts["scaling_factor"] == pytest.approx(0.18215)
    assert {name: vae.facts[name] for name in ("shift_factor", "channels", "downsampling", "dtype", "id")} == {
        "shift_factor": 0.0,
        "channels": 4,
        "downsampling": 8,
        "dtype": "float32",
        "id": miniatures["vae"],
    }
    assert (t5.facts["width"], t5.facts["dtype"], t5.facts["tokenizer_subfolder"]) == (64, "float32", None)


def test_a_vae_that_downsamples_otherwise_is_a_setting_to_mend(tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    small = AutoencoderKL(**blocks, block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=4)
    small.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"expected a VAE that downsamples by 8, {tmp_path} does by 4"):
        ImageEncoder(ImageFeatures(model=str(tmp_path)))


@pytest.mark.parametrize("damage", ["half", "missing", "other", "fewer"])
@pytest.mark.parametrize(("name", "setting"), [("vae", "image.model"), ("t5", "text.model")])
def test_a_damaged_model_is_one_line_that_names_the_setting(miniatures, tmp_path, name, setting, damage):
    folder = shutil.copytree(miniatures[name if damage != "other" else "llava"], tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        if damage == "half":
            path.write_bytes(path.read_bytes()[:3000])
        elif damage == "missing":
            path.unlink()
        elif damage == "fewer":
            weights = load_file(path)
            weights.pop(max(name for name in weights if name.startswith("encoder.")))
            save_file(weights, path)
    encoder, section = (ImageEncoder, ImageFeatures) if name == "vae" else (TextEncoder, TextFeatures)
    with pytest.raises(ConfigError) as caught:
        encoder(section(model=str(folder)))
    assert str(caught.value).startswith(f"{setting}: {folder} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_vae_with_the_names_of_old_is_read_in_full(miniatures, tmp_path, vae):
    """`stabilityai/sd-vae-ft-ema` calls its attention layers `query`, `key`, `value` and `proj_attn`."""
    folder = shutil.copytree(miniatures["vae"], tmp_path / "vae")
    [path] = folder.glob("*.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(path).items():
        for new, old in names.items():
            name = name.replace(new, old)
        renamed[name] = weight
    assert any(name.endswith("proj_attn.weight") for name in renamed)
    save_file(renamed, path)
    batch = {"pixels": pixels(1)}
    read = ImageEncoder(ImageFeatures(model=str(folder)))
    assert np.array_equal(read(batch)["moments"], vae(batch)["moments"])


def test_the_encoder_of_a_whole_t5_is_enough(tmp_path, miniatures):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = shutil.copytree(miniatures["t5"], tmp_path / "t5")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    assert TextEncoder(TextFeatures(model=str(folder))).facts["width"] == 64


def test_captions_keep_their_order_and_true_tokens(t5):
    out = t5({"caption": CAPTIONS})
    lengths = [len(t5.tokenizer(" ".join(caption.split()))["input_ids"]) for caption in CAPTIONS]
    assert [features.shape for features in out["t5"]] == [(min(n, 120), 64) for n in lengths]
    assert all(features.dtype == np.uint16 for features in out["t5"])
    assert out["truncated"] == [n > 120 for n in lengths]
    assert len(out["t5"][1]) == 1  # of the empty caption, the end of the sequence


def test_padding_does_not_leak(miniatures):
    """Batched and alone agree within bf16 rounding."""
    encoder = text_encoder(miniatures, batch_tokens=10**6)
    together = encoder.encode(CAPTIONS)
    for caption, features in zip(CAPTIONS, together, strict=True):
        [alone] = encoder.encode([caption])
        torch.testing.assert_close(features, alone, rtol=2**-7, atol=1e-5)


def test_batches_do_not_change_features(miniatures):
    reference = text_encoder(miniatures, batch_tokens=1).encode(CAPTIONS)  # each by itself
    for batch_tokens in (50, 200):
        encoded = text_encoder(miniatures, batch_tokens=batch_tokens).encode(CAPTIONS)
        for features, expected in zip(encoded, reference, strict=True):
            torch.testing.assert_close(features, expected, rtol=2**-7, atol=1e-5)


def test_a_batch_never_holds_more_padded_tokens_than_asked_for(miniatures, monkeypatch):
    encoder = text_encoder(miniatures, batch_tokens=60)
    shapes, model = [], encoder.model

    def spy(ids, attention_mask):
        shapes.append(tuple(ids.shape))
        return model(ids, attention_mask=attention_mask)

    monkeypatch.setattr(encoder, "model", spy)
    encoder.encode(CAPTIONS * 3)
    assert sum(rows for rows, _ in shapes) == 18
    assert all(rows * length <= 60 or rows == 1 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 3


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_cut_caption_still_ends(miniatures, max_tokens):
    encoder = text_encoder(miniatures, max_tokens=max_tokens)
    [features] = encoder.encode([CAPTIONS[2]])
    assert len(features) == max_tokens
    ids = encoder.tokenizer(" ".join(CAPTIONS[2].split()))["input_ids"]
    cut = torch.tensor([[*ids[: max_tokens - 1], 1]])
    with torch.inference_mode():
        expected = encoder.model(cut).last_hidden_state[0].to(torch.bfloat16)
    torch.testing.assert_close(features, expected, rtol=2**-7, atol=1e-5)
    assert encoder({"caption": [CAPTIONS[2], "" if max_tokens < 3 else "x"]})["truncated"] == [True, False]


def test_a_caption_of_exactly_the_limit_is_whole(miniatures, t5):
    num_tokens = len(t5.encode([CAPTIONS[3]])[0])
    whole = text_encoder(miniatures, max_tokens=num_tokens)({"caption": [CAPTIONS[3]]})
    cut = text_encoder(miniatures, max_tokens=num_tokens - 1)({"caption": [CAPTIONS[3]]})
    assert (whole["truncated"], cut["truncated"]) == ([False], [True])
    torch.testing.assert_close(floats(whole["t5"][0]), t5.encode([CAPTIONS[3]])[0].float())


def test_extraction_and_sampling_see_the_same_features(t5):
    stored = t5({"caption": CAPTIONS})["t5"]
    for bits, features in zip(stored, t5.encode(CAPTIONS), strict=True):
        assert torch.equal(floats(bits), features.float())


def test_captions_are_cleaned_before_they_are_encoded(t5):
    out = t5({"caption": ["  a\n red\thouse "]})
    assert out["caption"] == ["a red house"]
    assert torch.equal(floats(out["t5"][0]), t5.encode(["a red house"])[0].float())


def test_no_captions_are_no_features(t5):
    assert t5.encode([]) == []
    assert t5({"caption": []})["t5"] == []


def test_special_words_in_a_caption_do_not_break_it(t5):
    assert len(t5.encode(["</s> <pad> <unk>", "\x00", "\u202e", "红" * 500, "a</s>b"])) == 5


def test_encoder_and_tokenizer_may_lie_in_subfolders(miniatures, tmp_path, t5):
    """As in the repositories of diffusers: `text_encoder` and `tokenizer`."""
    shutil.copytree(miniatures["t5"], tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for path in (tmp_path / "text_encoder").glob("tokenizer*"):
        path.rename(tmp_path / "tokenizer" / path.name)
    settings = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    split = TextEncoder(TextFeatures(model=str(tmp_path), **settings))
    assert torch.equal(split.encode(CAPTIONS[:1])[0], t5.encode(CAPTIONS[:1])[0])
    assert split.facts["subfolder"] == "text_encoder"


def test_a_width_is_that_of_the_model(tmp_path):
    build_t5(tmp_path, width=32)
    encoder = TextEncoder(TextFeatures(model=str(tmp_path)))
    assert encoder.facts["width"] == 32
    assert encoder.encode(["a"])[0].shape[1] == 32


def test_fp16_keeps_in_fp32_what_t5_needs_there(miniatures):
    encoder = text_encoder(miniatures, dtype="fp16")
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in encoder.model.named_parameters()}
    assert dtypes["wo"] == torch.float32
    assert dtypes["q"] == torch.float16


def test_a_released_t5_whose_tokenizer_is_a_spiece_model_only(miniatures, tmp_path):
    """DeepFloyd's and Google's checkpoints come without tokenizer.json; reading spiece.model needs sentencepiece."""
    import sentencepiece

    folder = tmp_path / "t5"
    shutil.copytree(miniatures["t5"], folder)
    (folder / "tokenizer.json").unlink()
    lines = ["a red circle on a blue background", "the photograph is bright, with soft light"] * 20
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=60, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = TextEncoder(TextFeatures(model=str(folder)))
    [short, long] = encoder.encode(["a red circle", "a red circle on a blue background"])
    assert len(short) < len(long)
    assert encoder.tokenizer("a red circle")["input_ids"][-1] == 1
