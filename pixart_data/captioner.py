"""The engine in this process: captions from any image-text model that transformers loads, in left-padded batches.

The model is opaque: whatever its processor makes of a conversation goes to `generate` unchanged, because families
differ in what they add (tile sizes, grids, packed pixels). Templates tokenize in one step; rendering to text first and
tokenizing after puts the begin-of-sequence token twice. Continuous batching is not used: in transformers 5 it takes
token ids only and answers, without an error, as if there were no image. For the same reason a model is shown two
pictures before it is believed to see, and every prompt has to be longer for its image.
"""

import functools
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from pixart_data import sections
from pixart_data.batches import Halving
from pixart_data.drawing import Drawing
from pixart_data.errors import ConfigError
from pixart_data.models import loading, placement, provenance, require_weights
from pixart_data.questions import MAIN, Answers, Caption, Decoding, NoCaption, ask, moderate, unasked
from pixart_data.records import Reason

SETTING = "captioner.model"
_CANARIES = ("red", "blue")

Asked = tuple[Image.Image, str, "Decoding | None", int]
"""A picture, the prompt, how to draw the answer (None: as the section says), and the seed of that."""


class Captioner:
    """Describes images. Loading happens once, in the constructor.

    Raises:
        ConfigError: If the model cannot be loaded, is not an image-text model, or does not see what it is shown.
    """

    num_batches = 1

    def __init__(self, config: sections.Captioner) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.config = config
        self.batch_size = config.batch_size
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
        self._describe = Halving(self._generate)
        self._describe_again = Halving(self._generate)  # longer answers need smaller batches, and no others do
        self._num_words = functools.lru_cache(maxsize=1024)(self._count_words)
        self._require_sight()

    def _special_tokens(self) -> list[str]:
        """Return what must not stand in a prompt that a template surrounds: it would mean a second image, or an end.

        The longest come first, so that what is dropped from a raw caption does not depend on the run.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        special.add(str(getattr(self.processor, "image_token", None) or "<image>"))
        prompts = {"prompt": self.config.prompt, "prompt_with_caption": self.config.prompt_with_caption or ""}
        prompts |= {f"prompts.{name}": prompt for name, prompt in self.config.prompts.items()}
        for name, prompt in prompts.items() if self._has_template else ():
            found = [token for token in special if token in prompt]
            if found:
                raise ConfigError(f"captioner.{name}: expected words, found {found[0]!r}, a token of the model")
        return sorted(special, key=lambda token: (-len(token), token))

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _require_sight(self) -> None:
        """Show the model a red and a blue picture: what it makes of them must differ, or it is blind."""
        pictures = [Image.new("RGB", (64, 64), colour) for colour in _CANARIES]
        with torch.inference_mode():
            try:
                inputs = self._inputs(pictures, [self.config.prompt] * len(pictures))
            except ValueError as error:  # a model without a chat template, and a prompt without its image token
                raise ConfigError(f"captioner.prompt: {self.config.model} does not take it: {error}") from error
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=1,
                pad_token_id=self.tokenizer.pad_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        [logits] = output.logits  # (2, vocabulary)
        if torch.equal(logits[0], logits[1]):
            raise ConfigError(
                f"{SETTING}: {self.config.model} answers the same to a red and to a blue picture; use an image-text "
                "model, with the processor that belongs to it"
            )

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the picture itself; the processor resizes it."""
        return moderate(image)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Add a column `answers` to the columns that `questions` names; `image` holds RGB pictures of any size.

        One batch is generated for each column of captions; the pictures are decoded once for all. With a column
        `decoding` only the main question is asked, in a batch for each way of decoding.
        """
        if "decoding" in batch:
            return batch | {"answers": self._again(batch)}
        if self.config.temperature > 0:
            torch.manual_seed(batch["seed"][0])
        answers: list[Answers] = [{} for _ in batch["image"]]
        for name in self.config.questions:
            prompts = [ask(self.config, name, raw, self._special) for raw in batch["raw_caption"]]
            images = [image for image, prompt in zip(batch["image"], prompts, strict=True) if prompt is not None]
            found = iter(self.describe(images, [prompt for prompt in prompts if prompt is not None]))
            for row, prompt in zip(answers, prompts, strict=True):
                row[name] = unasked() if prompt is None else self._checked(next(found))
        return batch | {"answers": answers}

    def _again(self, batch: dict[str, list[Any]]) -> list[Answers]:
        answers: list[Answers] = [{} for _ in batch["image"]]
        for decoding in dict.fromkeys(batch["decoding"]):
            places = [place for place, other in enumerate(batch["decoding"]) if other == decoding]
            asked: list[Asked] = []
            for place in places:
                prompt = ask(self.config, MAIN, batch["raw_caption"][place], self._special)
                asked.append((moderate(batch["image"][place]), prompt or "", decoding, batch["seed"][place]))
            for place, caption in zip(places, self._describe_again(asked), strict=True):
                answers[place] = {MAIN: self._checked(caption)}
        return answers

    def _checked(self, caption: Caption) -> Caption | NoCaption:
        num_words = self._num_words(caption.prompt) if self._has_template else 0
        if (caption.num_prompt_tokens or 0) > num_words:
            return caption
        detail = f"the prompt has {caption.num_prompt_tokens} tokens with the image and {num_words} without"
        return NoCaption(caption.prompt, Reason.IMAGE_UNSEEN, detail)

    def describe(self, images: list[Image.Image], prompts: list[str]) -> list[Caption]:
        """Return one caption for each image; they are generated as one batch, or as several where memory is short."""
        asked: list[Asked] = [(moderate(image), prompt, None, 0) for image, prompt in zip(images, prompts, strict=True)]
        return self._describe(asked) if asked else []

    @torch.inference_mode()
    def _generate(self, asked: list[Asked]) -> list[Caption]:
        """Answer what is asked with one way of decoding."""
        images, prompts, decodings, seeds = (list(column) for column in zip(*asked, strict=True))
        inputs = self._inputs(images, prompts)
        output = self.model.generate(
            **inputs, **self._sampling(decodings[0], seeds), pad_token_id=self.tokenizer.pad_token_id
        )
        prompts_ids = inputs["input_ids"]
        num_padded = prompts_ids.shape[1]
        echoes = output.shape[1] >= num_padded and torch.equal(output[:, :num_padded], prompts_ids)
        answers = output[:, num_padded if echoes else 0 :].tolist()  # encoder-decoder models do not repeat the prompt
        num_prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._caption(*fields) for fields in zip(answers, prompts, (int(n) for n in num_prompt_tokens), strict=True)
        ]

    def _sampling(self, decoding: Decoding | None, seeds: list[int]) -> dict[str, Any]:
        """Return what `generate` is told of the decoding; one that is given is done by a processor of our own."""
        if decoding is not None:
            drawing = LogitsProcessorList([Drawing(decoding, seeds)])
            length = {"max_new_tokens": decoding.max_new_tokens}
            return {"do_sample": False, "num_beams": 1, "logits_processor": drawing, **length}  # noise has no beams
        length = {"max_new_tokens": self.config.max_new_tokens}
        if self.config.temperature > 0:
            return {"do_sample": True, "temperature": self.config.temperature, "top_p": self.config.top_p, **length}
        return {"do_sample": False, **length}

    def _count_words(self, prompt: str) -> int:
        """Return the tokens of a prompt that comes without an image."""
        conversation = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        inputs = self.processor.apply_chat_template(
            [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return int(inputs["attention_mask"].sum())

    def _inputs(self, images: list[Image.Image], prompts: list[str]) -> Any:
        if self._has_template:
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
