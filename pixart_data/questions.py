"""What a captioning engine is asked and what it answers, whichever engine does the work.

An engine is called with a batch of columns `image` (what its own `prepare` made of a picture), `raw_caption` (may be
None) and `seed` (of the sampling; greedy decoding ignores it). It adds a column `answers`: for each image a dict from
the names of `Captioner.questions` to a `Caption` or `NoCaption`. With a column `decoding` it asks the main question
only, and draws each answer as that says, from the row's own seed: what else is in the batch decides nothing then.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixart_data.records import Reason
from pixart_data.sections import Captioner

if TYPE_CHECKING:
    from PIL import Image

MAIN = "caption"
_QUOTE = "{caption}"
_MAX_ASPECT = 16


@dataclass(frozen=True)
class Caption:
    """One answer of the model.

    Attributes:
        finish_reason: "stop", "length" where max_new_tokens cut it off, or another word of a server's.
        num_prompt_tokens: Image tokens included; None if a server does not say.
        num_tokens: Of the answer; None if a server does not say. Servers count the token that ends it, too.
    """

    text: str
    prompt: str
    finish_reason: str
    num_prompt_tokens: int | None
    num_tokens: int | None


@dataclass(frozen=True)
class NoCaption:
    """Why there is no answer: the row's fault, not the engine's. `prompt` is None where nothing was asked."""

    prompt: str | None
    reason: Reason
    detail: str


Answers = dict[str, Caption | NoCaption]


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn that is asked for again, in place of what the section says.

    Attributes:
        temperature: 0 decodes greedily.
        top_p: Share of the probability that sampling draws from.
        frequency_penalty: Taken off a token's score for each time that the answer has it already, as OpenAI's API has
            it.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    frequency_penalty: float = 0.0


def columns(name: str, answer: Caption | NoCaption) -> dict[str, Any]:
    """Return the columns of a table of captions for one answer: `caption_short`, `num_tokens_short` ...

    Args:
        name: Of the question, which is the name of the column of captions.
    """
    suffix = name.removeprefix(MAIN)
    if isinstance(answer, NoCaption):
        return {f"error{suffix}": str(answer.reason)}
    return {
        f"caption{suffix}": answer.text or None,
        f"finish_reason{suffix}": answer.finish_reason,
        f"num_prompt_tokens{suffix}": answer.num_prompt_tokens,
        f"num_tokens{suffix}": answer.num_tokens,
        f"error{suffix}": None if answer.text else str(Reason.EMPTY_CAPTION),
    }


def ask(config: Captioner, name: str, raw_caption: str | None, special: Iterable[str]) -> str | None:
    """Return the words to ask with for a column of captions.

    The raw caption is quoted where the prompt has room for one and there is one to quote. Special tokens in it are
    dropped: `<image>` in alt text would stand for a second image.

    Returns:
        The prompt; None for a further column whose prompt quotes a raw caption that the image does not have.
    """
    words = raw_caption or ""
    for token in special:
        words = words.replace(token, " ")
    words = " ".join(words.split())
    prompt = config.questions[name]
    if name != MAIN:
        return prompt.replace(_QUOTE, words) if words or _QUOTE not in prompt else None
    if config.prompt_with_caption and words:
        return config.prompt_with_caption.replace(_QUOTE, words)
    return prompt


def unasked() -> NoCaption:
    """Return the answer to a question that quotes a raw caption, for an image without one."""
    return NoCaption(None, Reason.NO_CAPTION, "its prompt quotes a raw caption, and the image has none")


def moderate(image: "Image.Image") -> "Image.Image":
    """Cut the centre out of a strip: processors resize the short side first, and a line would become a giant."""
    longest_px = _MAX_ASPECT * min(image.size)
    width, height = min(image.width, longest_px), min(image.height, longest_px)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
