"""Captions from any image-text model that transformers loads, in left-padded batches.

The model is opaque: whatever its processor makes of a conversation goes to `generate` unchanged, because families
differ in what they add (tile sizes, grids, packed pixels). Templates tokenize in one step; rendering to text first and
tokenizing after puts the begin-of-sequence token twice. Continuous batching is not used: in transformers 5 it takes
token ids only and answers, without an error, as if there were no image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from pixart_data import sections
from pixart_data.errors import ConfigError
from pixart_data.models import loading, placement, provenance, require_weights

SETTING = "captioner.model"
_MAX_ASPECT = 16


@dataclass(frozen=True)
class Caption:
    """One answer of the model. `finish_reason` is "stop" or, where max_new_tokens cut it off, "length"."""

    text: str
    prompt: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


class Captioner:
    """Describes images. Loading happens once, in the constructor.

    Raises:
        ConfigError: If the model cannot be loaded or is not an image-text model.
    """

    def __init__(self, config: sections.Captioner) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.config = config
        self.placement = placement(config.device, config.dtype)
        with loading(SETTING, config.model):
            _allow_missing_torchvision()
            self.processor = AutoProcessor.from_pretrained(config.model, revision=config.revision)
            self.model, info = AutoModelForImageTextToText.from_pretrained(
                config.model, revision=config.revision, dtype=self.placement.dtype, output_loading_info=True
            )
            require_weights(info)
            self.tokenizer = self.processor.tokenizer
        self.model.to(self.placement.device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._special = self._special_tokens()
        self.facts = {
            **provenance(self.model.config, config.model, config.revision, None),
            "dtype": str(self.placement.dtype).removeprefix("torch."),
        }

    def _special_tokens(self) -> set[str]:
        """Return what must not stand in a prompt that a template surrounds: it would mean a second image, or an end."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        special.add(str(getattr(self.processor, "image_token", None) or "<image>"))
        for name in ("prompt", "prompt_with_caption") if getattr(self.processor, "chat_template", None) else ():
            found = [token for token in special if token in (getattr(self.config, name) or "")]
            if found:
                raise ConfigError(f"captioner.{name}: expected words, found {found[0]!r}, a token of the model")
        return special

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Add a column `answer` of `Caption`s to columns `image` (RGB, any size) and `raw_caption` (may be None)."""
        prompts = [self.prompt(raw) for raw in batch["raw_caption"]]
        return batch | {"answer": self.describe(batch["image"], prompts)}

    def prompt(self, raw_caption: str | None) -> str:
        """Return the words to ask with: the quoting prompt where there is a raw caption to quote.

        Special tokens in a raw caption are dropped: `<image>` in it would stand for a second image.
        """
        words = raw_caption or ""
        for token in self._special:
            words = words.replace(token, " ")
        words = " ".join(words.split())
        if self.config.prompt_with_caption and words:
            return self.config.prompt_with_caption.replace("{caption}", words)
        return self.config.prompt

    def seed(self, seed: int) -> None:
        """Fix the sampling that follows; greedy decoding ignores it."""
        torch.manual_seed(seed)

    @torch.inference_mode()
    def describe(self, images: list[Image.Image], prompts: list[str]) -> list[Caption]:
        """Return one caption for each image; they are generated as one batch."""
        inputs = self._inputs([_moderate(image) for image in images], prompts)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.config.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.config.temperature, "top_p": self.config.top_p}
        output = self.model.generate(
            **inputs,
            **sampling,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        prompts_ids = inputs["input_ids"]
        num_padded = prompts_ids.shape[1]
        echoes = output.shape[1] >= num_padded and torch.equal(output[:, :num_padded], prompts_ids)
        answers = output[:, num_padded if echoes else 0 :].tolist()  # encoder-decoder models do not repeat the prompt
        num_prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._caption(*fields) for fields in zip(answers, prompts, (int(n) for n in num_prompt_tokens), strict=True)
        ]

    def _inputs(self, images: list[Image.Image], prompts: list[str]) -> Any:
        if getattr(self.processor, "chat_template", None):
            conversations = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image, prompt in zip(images, prompts, strict=True)
            ]
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        else:
            inputs = self.processor(images=images, text=prompts, return_tensors="pt", padding=True)
        if not any("pixel" in name for name in inputs):
            raise ConfigError(
                f"{SETTING}: the processor of {self.config.model} drops the image; use an image-text model"
            )
        return inputs.to(self.placement.device, dtype=self.placement.dtype)

    def _caption(self, answer: list[int], prompt: str, num_prompt_tokens: int) -> Caption:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends, self.tokenizer.eos_token_id}
        length = next((i for i, token in enumerate(answer) if token in ends), len(answer))
        stopped = length < len(answer)
        text = self.tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
        return Caption(text, prompt, "stop" if stopped else "length", num_prompt_tokens, length)


def _moderate(image: Image.Image) -> Image.Image:
    """Cut the centre out of a strip: processors resize the short side first, and a line would become a giant."""
    longest_px = _MAX_ASPECT * min(image.size)
    width, height = min(image.width, longest_px), min(image.height, longest_px)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _allow_missing_torchvision() -> None:
    """Let processors that also handle video load without torchvision, for images alone.

    Some processors ask for a video processor, and every one of those needs torchvision, which has no build for all
    the platforms torch has. Patches the library in place, once; `tests/data/test_captioner.py` fails if it goes stale.
    """
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    if is_torchvision_available() or getattr(ProcessorMixin, "_pixart_images_only", False):
        return
    original = ProcessorMixin.get_attributes.__func__

    def images_only(cls: type) -> list[str]:
        return [name for name in original(cls) if name != "video_processor"]

    ProcessorMixin.get_attributes = classmethod(images_only)
    ProcessorMixin._pixart_images_only = True
