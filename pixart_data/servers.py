"""The engine behind a URL: captions from OpenAI-compatible servers such as vLLM and SGLang.

Servers have answered as if they had seen an image that a template, a message format or a proxy had dropped on the way,
and the answer reads like a caption. So every server is shown a red and a blue picture before it is believed, and every
caption's prompt is compared in length with the same words sent without an image.
"""

import asyncio
import base64
import logging
import os
import re
import threading
import zlib
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

from pixart_data import sections
from pixart_data.chats import Away, Broken, ChatError, Chats, Host, Refused, Reply, backoff_s
from pixart_data.errors import ConfigError, JobError, TransientError
from pixart_data.questions import MAIN, Answers, Caption, Decoding, NoCaption, ask, moderate, unasked
from pixart_data.records import Reason

if TYPE_CHECKING:
    from PIL import Image

SETTING = "captioner.server"
SURE_TOKENS = 16
"""A picture of 336 px that adds this many tokens to its prompt is there: words that stand for a lost one are fewer."""

_MIN_TOKENS = 4  # of a small picture; families that add fewer to the canaries are held to what they added there
_CANARIES = ("red", "blue")
_CANARY_SIDE_PX = 336
_CANARY_PROMPT = "What colour is this picture? Answer in one sentence."
_CANARY_TOKENS = 16
_START_PATIENCE_S = 10.0
_OF_THE_ROW = {400, 413, 415, 422}
_SPECIAL = re.compile(r"</?[\w|-]{1,40}>|\[/?(?:INST|IMG\w*)\]")  # as the chat formats of today spell theirs
_REMEMBERED = 1024

log = logging.getLogger(__name__)

T = TypeVar("T")


class ServedCaptioner:
    """Describes images by asking servers. They are looked at in the constructor.

    Attributes:
        facts: Which model it is, for the record.
        batch_size: Images in a call.
        num_batches: Calls that may be made at once, each from a thread of its own.

    Raises:
        ConfigError: If a server refuses the model, the key or the path, or does not see what it is shown.
        JobError: If no server answers.
    """

    batch_size = 1

    def __init__(self, config: sections.Captioner) -> None:
        if config.server is None:
            raise ConfigError(f"{SETTING}: required for an engine that asks servers, and missing; add its URL")
        self.config, self.server = config, config.server
        self.num_batches = self.server.concurrency
        self.facts: dict[str, Any] = {"id": config.model, "engine": "server"}
        self._num_words: dict[str, int | None] = {}
        self._min_tokens = _MIN_TOKENS
        self._late_error: ConfigError | None = None
        self._later: list[asyncio.Task[None]] = []
        key = _api_key(self.server)
        self._pictures = [self.prepare(_canary(colour)) for colour in _CANARIES]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chats", daemon=True)
        self._thread.start()
        try:
            self._chats = self._run(_open(self.server, key))
            self._run(self._look_at_all())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def prepare(self, image: "Image.Image") -> str:
        """Return a picture as it travels: shrunk, as a JPEG in a data URI."""
        from PIL import Image

        image = moderate(image)
        scale = self.server.max_side_px / max(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.server.jpeg_quality, subsampling=0)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Add a column `answers` to the columns that `questions` names; `image` holds what `prepare` returned.

        Threads may call it at the same time; all of them share the requests that may be in flight.

        Raises:
            TransientError: If the servers are away, or fail for pictures that they answered before.
            ConfigError: If a server that was away at the start does not see what it is shown.
        """
        if self._late_error is not None:
            raise self._late_error
        decodings = batch.get("decoding", [None] * len(batch["image"]))
        names = [MAIN] if "decoding" in batch else list(self.config.questions)
        rows = list(zip(batch["image"], batch["raw_caption"], batch["seed"], decodings, strict=True))
        return batch | {"answers": self._run(self._describe(names, rows))}

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _end(self) -> None:
        for task in self._later:
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        if hasattr(self, "_chats"):
            await self._chats.close()

    # Asking

    async def _describe(self, names: list[str], rows: list[tuple[Any, ...]]) -> list[Answers]:
        found = await _all(self._answer(name, *row) for row in rows for name in names)
        return [dict(zip(names, found[i : i + len(names)], strict=True)) for i in range(0, len(found), len(names))]

    async def _answer(
        self, name: str, image: str, raw_caption: str | None, seed: int, decoding: Decoding | None
    ) -> Caption | NoCaption:
        prompt = ask(self.config, name, _SPECIAL.sub(" ", raw_caption or ""), ())
        if prompt is None:
            return unasked()
        try:
            reply = await self._reply(self._body(prompt, image, seed), decoding)
            return await self._checked(reply, prompt)
        except Refused as refused:
            await self._require_pulse(refused)
            return NoCaption(prompt, Reason.REFUSED, str(refused))
        except Broken as broken:
            await self._require_pulse(broken)
            return NoCaption(prompt, Reason.SERVER_ERROR, f"{self.server.max_attempts} attempts; the last: {broken}")
        except Away as away:
            raise _transient(away) from away

    async def _reply(self, body: dict[str, Any], decoding: Decoding | None) -> Reply:
        """Ask; where a server has no room for a longer answer, ask for one of the length of the first."""
        try:
            return await self._chats.ask(body | _drawn(decoding))
        except Refused as refused:
            most = self.config.max_new_tokens
            if decoding is None or decoding.max_new_tokens <= most or refused.status not in _OF_THE_ROW:
                raise
        return await self._chats.ask(body | _drawn(replace(decoding, max_new_tokens=most)))

    def _body(self, prompt: str, image: str | None, seed: int = 0, max_tokens: int | None = None) -> dict[str, Any]:
        """Return a request: of the job's kind, or greedy with `max_tokens`."""
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": image}})
        config = self.config
        return {
            "model": config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens or config.max_new_tokens,
            "temperature": 0.0 if max_tokens else config.temperature,
            "top_p": 1.0 if max_tokens else config.top_p,
            "seed": zlib.crc32(f"{seed}/{prompt}".encode()) >> 1,  # some servers keep it in 32 bits, signed
        }

    async def _require_pulse(self, error: ChatError) -> None:
        """Show a server a picture that it has seen before: only if it answers is the error the row's fault."""
        if isinstance(error, Refused) and error.status not in _OF_THE_ROW:
            raise _transient(error) from error
        try:
            await self._chats.ask(self._body(_CANARY_PROMPT, self._pictures[0], max_tokens=1))
        except ChatError as worse:
            raise _transient(worse) from worse

    # Whether the image was seen

    async def _checked(self, reply: Reply, prompt: str) -> Caption | NoCaption:
        """Turn a reply into a caption, unless its prompt is about as short as one without the image."""
        num_tokens = reply.num_prompt_tokens
        caption = Caption(reply.text, prompt, reply.finish_reason, num_tokens, reply.num_tokens)
        num_words = await self._count_words(_CANARY_PROMPT)
        # A prompt of words has at most the template's tokens and one for each byte: most rows need no second request.
        if num_tokens is None or num_words is None or num_tokens >= num_words + len(prompt.encode()) + SURE_TOKENS:
            return caption
        num_words = await self._count_words(prompt)
        if num_words is None or num_tokens >= num_words + self._min_tokens:
            return caption
        detail = f"the prompt has {num_tokens} tokens with the image and {num_words} without"
        return NoCaption(prompt, Reason.IMAGE_UNSEEN, detail)

    async def _count_words(self, prompt: str, hosts: list[Host] | None = None) -> int | None:
        """Return the tokens of a prompt that is sent without an image; None if that cannot be asked."""
        if prompt not in self._num_words:
            body = self._body(prompt, None, max_tokens=1)
            try:
                num_words = (await self._chats.ask(body, hosts=hosts)).num_prompt_tokens
            except Refused:
                num_words = None
            except Broken:  # for now
                return None
            if len(self._num_words) >= _REMEMBERED:
                self._num_words.clear()
            self._num_words[prompt] = num_words
        return self._num_words[prompt]

    async def _look_at_all(self) -> None:
        """Show every server the canaries; those that are away are looked at when they are back."""
        patience_s = min(self.server.patience_s, _START_PATIENCE_S)
        found = await _all(self._look(host, patience_s) for host in self._chats.hosts)
        missing = [(host, error) for host, error in zip(self._chats.hosts, found, strict=True) if error is not None]
        if len(missing) == len(found):
            raise JobError(
                f"{SETTING}: expected an answer, found none: {missing[0][1]}; start the server, e.g. `vllm serve "
                f"{self.config.model}`, wait until it is ready, and run the same command again"
            )
        for host, error in missing:
            log.warning("%s: goes on without one of its servers: %s", SETTING, error)
            self._later.append(asyncio.create_task(self._look_later(host)))

    async def _look_later(self, host: Host) -> None:
        num_failures = 0
        try:
            while await self._look(host, float("inf")) is not None:
                await asyncio.sleep(backoff_s(num_failures))
                num_failures += 1
        except ConfigError as error:
            self._late_error = error

    async def _look(self, host: Host, patience_s: float) -> ChatError | None:
        """Make a server usable; returns why that is not possible yet.

        Raises:
            ConfigError: If it refuses the canaries or is blind.
        """
        try:
            replies = [
                await self._chats.ask(self._body(_CANARY_PROMPT, picture, 0, _CANARY_TOKENS), patience_s, [host])
                for picture in self._pictures
            ]
            num_words = await self._count_words(_CANARY_PROMPT, [host])
        except Refused as refused:
            raise ConfigError(_remedy(refused, self.config.model)) from refused
        except ChatError as error:
            return error
        counts = [reply.num_prompt_tokens for reply in replies if reply.num_prompt_tokens is not None]
        num_added = None if num_words is None or not counts else min(counts) - num_words
        alike = replies[0].text == replies[1].text
        if (num_added is not None and num_added <= 0) or (alike and (num_added or 0) < SURE_TOKENS):
            raise ConfigError(_blind(host, replies[0], num_added))
        if alike:
            log.warning("%s: %s answers %r to a red and to a blue picture", SETTING, host.url, replies[0].text[:80])
        if num_added is not None:
            self._min_tokens = min(self._min_tokens, num_added)
        self._chats.usable.append(host)
        return None


def _drawn(decoding: Decoding | None) -> dict[str, Any]:
    """Return what a request says instead, where the answer is to be drawn otherwise; all servers know these words."""
    if decoding is None:
        return {}
    penalty = {"frequency_penalty": decoding.frequency_penalty} if decoding.frequency_penalty else {}
    drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p, "max_tokens": decoding.max_new_tokens}
    return {**drawn, **penalty}


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all of them return; where one raises, the others are given up first, lest they go on asking."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def _open(server: sections.Server, key: str | None) -> Chats:
    return Chats(server, key)


def _api_key(server: sections.Server) -> str | None:
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env)
    if not key:
        raise ConfigError(
            f"{SETTING}.api_key_env: expected the key in the environment variable {server.api_key_env}, found it "
            "unset; set it where the workers run, before Ray is started there"
        )
    return key


def _canary(colour: str) -> "Image.Image":
    from PIL import Image

    return Image.new("RGB", (_CANARY_SIDE_PX, _CANARY_SIDE_PX), colour)


def _transient(error: ChatError) -> TransientError:
    return TransientError(f"{SETTING}: expected an answer, found none: {error}; is the server well?")


def _blind(host: Host, reply: Reply, num_added: int | None) -> str:
    found = f"the same answer to a red and to a blue one: {reply.text[:80]!r}"
    if num_added is not None and num_added <= 0:
        found = f"{reply.num_prompt_tokens} tokens in a prompt with a picture, no more than in one without"
    return (
        f"{SETTING}: expected {host.url} to see pictures, found {found}; serve an image-text model with the chat "
        "template that belongs to it"
    )


def _remedy(refused: Refused, model: str) -> str:
    if refused.status in (401, 403):
        remedy = f"name the variable that holds its key in {SETTING}.api_key_env"
    elif refused.status in (404, 405) or refused.status < 400:
        remedy = f"the URL usually ends in /v1, and captioner.model ({model}) must be the name under which it is served"
    else:
        remedy = f"captioner.model ({model}) must be the name of an image-text model that it serves"
    return f"{SETTING}: expected an answer about a picture, found {refused}; {remedy}"
