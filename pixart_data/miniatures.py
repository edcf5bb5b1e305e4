"""Miniatures: models of the real classes with random weights, small enough to build in seconds and offline.

They load through the same `from_pretrained` calls as the real ones, so that a run on them differs from a real run in
nothing but the ids in the job file. Their captions are noise and their pictures are blur: they show that the machinery
works, not what the models can do.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_CORPUS = (
    "Describe this image and its style in a very detailed manner",
    "The image shows a red circle on a blue background, painted in a simple flat style.",
    "A large green square stands to the left of a small yellow triangle, above a striped floor.",
    "In the foreground there are several people, a dog and a bicycle; the background is a quiet street.",
    "The photograph is bright, with soft light, warm colours and a calm atmosphere.",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build(root: Path, seed: int = 0) -> dict[str, Path]:
    """Write `llava`, `t5` and `vae` under `root` and return their folders; the same seed gives the same weights."""
    builders = {"llava": build_llava, "t5": build_t5, "vae": build_vae}
    for name, builder in builders.items():
        builder(root / name, seed)
    return {name: root / name for name in builders}


def build_llava(folder: Path, seed: int = 0) -> None:
    """A `LlavaForConditionalGeneration` with its processor: 56 px images, patches of 14 px, 0.2M parameters."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    text.train_from_iterator(_CORPUS, _bpe_trainer())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    with _seeded(seed):
        config = LlavaConfig(
            vision_config=vision, text_config=language, image_token_index=image_token, image_seq_length=16
        )
        model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    # Whole words only, and not one word for ever: noise that can at least be read and counted.
    words = [token for token in tokenizer.get_vocab().items() if token[0].startswith("Ġ") and token[0][1:].isalpha()]
    model.generation_config.suppress_tokens = sorted(set(range(3, len(tokenizer))) - {index for _, index in words})
    model.generation_config.repetition_penalty = 1.3
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
    _save(folder, model, processor)


def build_t5(folder: Path, seed: int = 0, width: int = 64) -> None:
    """A `T5EncoderModel` of the v1.1 kind (gated GELU) with a Unigram tokenizer that appends `</s>`."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    text = Tokenizer(models.Unigram(_unigrams(), unk_id=2))
    text.normalizer = normalizers.NFKC()
    text.pre_tokenizer = pre_tokenizers.Metaspace()
    text.decoder = decoders.Metaspace()
    text.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with _seeded(seed):
        model = T5EncoderModel(config)
    _save(folder, model, tokenizer)


def build_vae(folder: Path, seed: int = 0) -> None:
    """An `AutoencoderKL` of the Stable Diffusion shape: four levels, 8x downsampling, 4 channels, factor 0.18215."""
    from diffusers import AutoencoderKL

    with _seeded(seed):
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 16, 16, 16],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    _save(folder, model)


def _unigrams() -> list[tuple[str, float]]:
    """Words and letters of the corpus with scores by count; the library's own trainer differs from run to run."""
    words = Counter(f"\u2581{word}" for line in _CORPUS for word in line.split())
    letters = {letter for line in _CORPUS for letter in line.lower() + line.upper() + "\u2581"}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored = [(word, math.log(count / words.total())) for word, count in sorted(words.items())]
    return special + scored + [(letter, -10.0) for letter in sorted(letters - words.keys())]


def _bpe_trainer() -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(folder: Path, *parts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)
