"""Chat completions from OpenAI-compatible servers: who is asked, how many at once, and what happens when they fail.

A server that cannot be reached or says that it is busy (429, 503) rests, for as long as its `Retry-After` asks or
twice as long each time, and is then asked again until the caller's patience ends: it may be restarting. An answer that
is broken (500, a timeout, no JSON) may be the fault of what was asked, so it is tried a limited number of times.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from pixart_data import events
from pixart_data.sections import Server

if TYPE_CHECKING:
    import aiohttp

_BUSY = {408, 425, 429, 503, 529}
_CONNECT_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_MAX_ANSWER_BYTES = 16 << 20
_SHOWN = 200


@dataclass(frozen=True)
class Reply:
    """What a server answered. The counts of tokens are None where it does not say."""

    text: str
    finish_reason: str
    num_prompt_tokens: int | None
    num_tokens: int | None


class ChatError(Exception):
    """Why there is no reply: the root of three signals that the engine turns into rows or errors of the job."""


class Refused(ChatError):
    """The server refused what was asked, with a status from 300 to 499."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Broken(ChatError):
    """Every attempt ended in a broken answer."""


class Away(ChatError):
    """No server could be reached, or all were busy, for as long as patience lasted."""


@dataclass
class Host:
    """One server: how many requests it has, and until when it is left in peace."""

    url: str
    in_flight: int = 0
    rests_until_s: float = 0.0
    num_failures: int = 0

    def rest_s(self) -> float:
        """Return for how long the server is still left in peace."""
        return max(self.rests_until_s - time.monotonic(), 0.0)

    def fail(self, pause_s: float | None) -> None:
        """Let the server rest: as long as it asked, else twice as long as the last time.

        What was in flight when it began to rest fails for the same cause, and does not prolong it.
        """
        now_s = time.monotonic()
        if pause_s is None and now_s < self.rests_until_s:
            return
        pause_s = backoff_s(self.num_failures) if pause_s is None else pause_s
        self.num_failures += 1
        self.rests_until_s = max(self.rests_until_s, now_s + pause_s)


class Chats:
    """Asks the least busy of several servers that serve one model; to be used inside one event loop.

    Attributes:
        hosts: All servers, in the order of the job file.
        usable: Those to ask; the engine adds each one that it has looked at.
    """

    def __init__(self, server: Server, api_key: str | None) -> None:
        import aiohttp

        self.server = server
        self.hosts = [Host(url.rstrip("/")) for url in server.urls]
        self.usable: list[Host] = []
        self._slots = asyncio.Semaphore(server.concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the slots limit it
            timeout=aiohttp.ClientTimeout(total=server.timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def ask(
        self, body: dict[str, Any], patience_s: float | None = None, hosts: Sequence[Host] | None = None
    ) -> Reply:
        """Return the reply to a request.

        Args:
            body: Of a chat completion.
            patience_s: Unset: the job file's.
            hosts: Unset: the usable ones.

        Raises:
            Refused: If a server refuses the request; asking again would not help.
            Broken: If the answers to all attempts were broken.
            Away: If no server was reached, or all were busy, for `patience_s`.
        """
        patience_s = self.server.patience_s if patience_s is None else patience_s
        away_since_s: float | None = None
        num_broken = 0
        while True:
            try:
                async with self._slot(hosts or self.usable) as host:
                    return await self._post(host, body)
            except Away:
                events.note("server_away")
                away_since_s = time.monotonic() if away_since_s is None else away_since_s
                if time.monotonic() - away_since_s >= patience_s:
                    raise
            except Broken:
                events.note("answer_broken")
                num_broken += 1
                if num_broken >= self.server.max_attempts:
                    raise
                await asyncio.sleep(backoff_s(num_broken - 1))

    @contextlib.asynccontextmanager
    async def _slot(self, hosts: Sequence[Host]) -> AsyncIterator[Host]:
        """Wait for a server that does not rest and for one of the requests that may be in flight, in this order.

        A request that waits for a server that is away must not keep others from the servers that are well.
        """
        while True:
            pause_s = _least_busy(hosts).rest_s()
            if pause_s:
                await asyncio.sleep(pause_s)
                continue
            await self._slots.acquire()
            host = _least_busy(hosts)
            if not host.rest_s():
                break
            self._slots.release()
        host.in_flight += 1
        try:
            yield host
        finally:
            host.in_flight -= 1
            self._slots.release()

    async def _post(self, host: Host, body: dict[str, Any]) -> Reply:
        import aiohttp

        url = f"{host.url}/chat/completions"
        try:
            async with self._session.post(url, json=body, allow_redirects=False) as response:
                data = await _read(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            host.fail(None)
            raise Away(f"{host.url} cannot be reached: {_cause(error)}") from error
        except TimeoutError as error:
            raise Broken(f"{host.url} gave no answer within {self.server.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(f"{host.url} broke off: {error or type(error).__name__}") from error
        if response.status in _BUSY:
            host.fail(_retry_after_s(response.headers.get("Retry-After")))
            raise Away(f"{host.url} is busy ({response.status}): {_shown(data)}")
        if response.status >= 500:
            raise Broken(f"{host.url} failed ({response.status}): {_shown(data)}")
        if response.status != 200:
            more = response.headers.get("Location", "")
            raise Refused(response.status, f"{host.url} answered {response.status} {more or _shown(data)}")
        host.num_failures = 0
        return _reply(host, data)


def _least_busy(hosts: Sequence[Host]) -> Host:
    now_s = time.monotonic()
    return min(hosts, key=lambda host: (max(host.rests_until_s - now_s, 0.0), host.in_flight))


def backoff_s(num_failures: int) -> float:
    """Return the pause after a failure: twice as long each time, shortened at random so that clients spread."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(num_failures, 10)) * random.uniform(0.5, 1.0)


def _cause(error: Exception) -> str:
    """Return the words of the operating system where there are some; the library's own name TLS in any case."""
    cause = getattr(error, "os_error", None)
    return str(getattr(cause, "strerror", None) or error)


def _retry_after_s(value: str | None) -> float | None:
    """Read the header in its two forms, seconds and a date; at most the longest pause."""
    if not value:
        return None
    try:
        pause_s = float(value)
    except ValueError:
        try:
            pause_s = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(pause_s, 0.0), _LONGEST_PAUSE_S)


async def _read(response: "aiohttp.ClientResponse") -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > _MAX_ANSWER_BYTES:
            raise Broken(f"{response.url} answered more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _reply(host: Host, data: bytes) -> Reply:
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError("content is no text")
        usage = answer.get("usage") or {}
        counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{host.url} answered no chat completion: {_shown(data)}") from error
    return Reply(text.strip(), str(choice.get("finish_reason") or ""), *counts)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1 << 31 else None


def _shown(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
