"""Many URLs to images: politely, bounded, and with a verdict on every one of them.

A host is asked by a few requests at a time, paused when it says so, and left alone when it keeps failing; its
robots.txt is read first. Slow hosts do not hold up others: a request waits for its host before it takes one of the
worker's slots, and an image is held in memory only as long as it has a slot.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import urljoin

from yarl import URL

from pixart_data.addresses import Refused, parse_url
from pixart_data.answers import REDIRECTS, Answer, Client, Failure, Headers, open_client
from pixart_data.checks import ImageFacts, check_image
from pixart_data.images import ImageRejected
from pixart_data.records import Reason
from pixart_data.robots import MAX_ROBOTS_BYTES, Rules, RulesCache, opted_out
from pixart_data.sections import Downloads
from pixart_data.units import storable

T = TypeVar("T")

_ROBOTS_REDIRECTS = 5  # RFC 9309, 2.3.1.2
_NO_ROBOTS = (Reason.NOT_FOUND, Reason.ACCESS_DENIED, Reason.TOO_MANY_REDIRECTS, Reason.BAD_URL)  # RFC 9309, 2.3.1.3
_FAILURES_IN_A_ROW = 12
_HOST_FAILS = (Reason.HOST_NOT_FOUND, Reason.CONNECTION_FAILED, Reason.TIMED_OUT, Reason.RATE_LIMITED)  # and costs time
_CHECK_THREADS = 4
_MAX_DETAIL_CHARS = 500


@dataclass(frozen=True)
class Download:
    """What became of a URL: an image and its facts, or the reason why there is none.

    Attributes:
        http_status: Of the last answer, None if there was none.
        num_attempts: How often the server was asked.
    """

    url: str
    data: bytes = b""
    facts: ImageFacts | None = None
    error: Reason | None = None
    detail: str = ""
    http_status: int | None = None
    num_attempts: int = 0


class Downloader:
    """Downloads one batch of URLs after another; what it learnt of robots.txt it keeps."""

    def __init__(self, config: Downloads) -> None:
        self.config = config
        self._rules = RulesCache()

    def fetch(self, urls: Iterable[str], done: Callable[[Download], None]) -> None:
        """Download, and call `done` once for each URL, as they end; what `done` raises ends the batch."""
        asyncio.run(self._fetch(urls, done))

    async def _fetch(self, urls: Iterable[str], done: Callable[[Download], None]) -> None:
        async with AsyncExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(_CHECK_THREADS, thread_name_prefix="check"))
            client = await stack.enter_async_context(open_client(self.config))
            visit = _Visit(self.config, client, threads, self._rules)
            tasks = [asyncio.ensure_future(visit.download(url, done)) for url in urls]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Host:
    """How to treat one host: its slots, the pause it asked for, its failures in a row and the reason of the last."""

    slots: asyncio.Semaphore
    not_before_s: float = 0.0
    num_failures: int = 0
    reason: Reason = Reason.CONNECTION_FAILED


@dataclass
class _Trace:
    """What is written down of a URL's way."""

    attempt: int = 0
    num_attempts: int = 0
    status: int | None = None


@dataclass(frozen=True)
class _Errand(Generic[T]):
    """What is asked for, and what is made of it in a thread; `polite` ones keep to robots.txt and to opt-outs."""

    use: Callable[[bytes], T]
    max_bytes: int
    max_redirects: int
    polite: bool


@dataclass
class _Visit:
    """One batch: everything here belongs to one event loop."""

    config: Downloads
    client: Client
    threads: ThreadPoolExecutor
    known: RulesCache
    slots: asyncio.Semaphore = field(init=False)
    hosts: dict[str, _Host] = field(default_factory=dict)
    robots: dict[str, "asyncio.Future[Rules | Failure]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.config.concurrency)

    async def download(self, text: str, done: Callable[[Download], None]) -> None:
        """Bring one URL to its end."""
        config, trace = self.config, _Trace()
        errand = _Errand(partial(_checked, config=config), config.max_bytes, config.max_redirects, polite=True)
        try:
            data, facts = await self._run(parse_url(text), errand, trace)
        except (Refused, Failure, ImageRejected) as verdict:
            detail = storable(verdict.detail[:_MAX_DETAIL_CHARS])
            done(Download(text, b"", None, verdict.reason, detail, trace.status, trace.num_attempts))
        else:
            done(Download(text, data, facts, None, "", trace.status, trace.num_attempts))

    async def _run(self, url: URL, errand: _Errand[T], trace: _Trace) -> T:
        """Try until it is done or trying again does not help."""
        for trace.attempt in itertools.count(1):
            try:
                return await self._attempt(url, errand, trace)
            except Failure as failure:
                pause_s = self._pause_s(failure, trace.attempt)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    def _pause_s(self, failure: Failure, attempt: int) -> float | None:
        if not failure.transient or attempt >= self.config.max_attempts:
            return None
        if failure.retry_after_s is not None:
            return failure.retry_after_s if failure.retry_after_s <= self.config.max_wait_s else None
        return min(self.config.backoff_s * 2.0 ** (attempt - 1), self.config.max_wait_s) * random.uniform(0.5, 1.0)

    async def _attempt(self, url: URL, errand: _Errand[T], trace: _Trace) -> T:
        """Ask once, through all redirects; waiting for a turn does not count against the time."""
        left_s = self.config.total_timeout_s
        for _ in range(errand.max_redirects + 1):
            if errand.polite and self.config.robots:
                await self._permit(url)
            host = self._host(url)
            async with host.slots:
                await asyncio.sleep(max(0.0, host.not_before_s - time.monotonic()))
                async with self.slots:
                    started_s = time.monotonic()
                    answer = await self._ask(url, left_s, errand, host, trace)
                    left_s -= time.monotonic() - started_s
                    if answer.status not in REDIRECTS:
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(self.threads, errand.use, answer.body)
            url = _target(url, answer)
        raise Failure(Reason.TOO_MANY_REDIRECTS, f"more than {errand.max_redirects} redirects, the last to {url}"[:300])

    async def _ask(self, url: URL, left_s: float, errand: _Errand[T], host: _Host, trace: _Trace) -> Answer:
        if host.num_failures >= _FAILURES_IN_A_ROW:
            detail = f"{_FAILURES_IN_A_ROW} requests in a row to {url.host} failed; it is left alone in this unit"
            raise Failure(host.reason, detail)
        trace.num_attempts = trace.attempt
        look = self._refuse_opt_outs if errand.polite else _accept
        try:
            answer = await self.client.get(url, left_s, errand.max_bytes, look, cut=not errand.polite)
        except Failure as failure:
            host.reason = failure.reason
            host.num_failures = host.num_failures + 1 if failure.reason in _HOST_FAILS else 0
            if failure.retry_after_s is not None:
                pause_s = min(failure.retry_after_s, self.config.max_wait_s)
                host.not_before_s = max(host.not_before_s, time.monotonic() + pause_s)
            trace.status = failure.status
            raise
        host.num_failures = 0
        trace.status = answer.status
        return answer

    def _host(self, url: URL) -> _Host:
        name = (url.host or "").lower()
        if name not in self.hosts:
            self.hosts[name] = _Host(asyncio.Semaphore(self.config.concurrency_per_host))
        return self.hosts[name]

    # Politeness

    def _refuse_opt_outs(self, headers: Headers) -> None:
        directives = self.config.opt_out_directives
        found = opted_out(headers.getall("X-Robots-Tag", ()), self.config.user_agent, directives)
        if found:
            raise Failure(Reason.OPTED_OUT, f"X-Robots-Tag: {found}")
        if directives and headers.get("tdm-reservation", "").strip() == "1":
            raise Failure(Reason.OPTED_OUT, "tdm-reservation: 1")

    async def _permit(self, url: URL) -> None:
        """Keep to the robots.txt of a URL's origin, which the first that comes reads for all."""
        place = url.join(URL("/robots.txt"))
        origin = str(place).lower()
        rules: Rules | Failure | None = self.known.get(origin)
        if rules is None:
            if origin not in self.robots:
                self.robots[origin] = asyncio.ensure_future(self._read_robots(place))
            rules = await asyncio.shield(self.robots[origin])
            if isinstance(rules, Rules):
                self.known.put(origin, rules)
        if isinstance(rules, Failure):
            why = "" if rules.status is None else "; until it can be read, nothing may be asked for"
            raise Failure(rules.reason, f"{place}: {rules.detail}{why}")
        if not rules.allow(url, self.config.user_agent):
            raise Failure(Reason.ROBOTS_DISALLOWED, f"{place} disallows it to {self.config.user_agent}")

    async def _read_robots(self, place: URL) -> Rules | Failure:
        """Read the rules; a server that has none allows all, one that cannot say forbids all (RFC 9309, 2.3.1)."""
        errand = _Errand(Rules.parse, MAX_ROBOTS_BYTES, _ROBOTS_REDIRECTS, polite=False)
        trace = _Trace()
        try:
            return await self._run(place, errand, trace)
        except (Failure, Refused) as verdict:
            answered = verdict.reason is Reason.BAD_RESPONSE and trace.status is not None
            if isinstance(verdict, Failure) and verdict.reason not in _NO_ROBOTS and not answered:
                return verdict
            return Rules()


def _accept(headers: Headers) -> None:
    """Mind no header: robots.txt is there to be read."""


def _checked(data: bytes, config: Downloads) -> tuple[bytes, ImageFacts]:
    return data, check_image(data, config)


def _target(url: URL, answer: Answer) -> URL:
    place = answer.headers.get("Location", "")
    if not place.strip():
        raise Failure(Reason.BAD_RESPONSE, f"the server answered {answer.status} without a Location")
    try:
        return parse_url(urljoin(str(url), place.strip()))
    except ValueError as error:
        raise Refused(Reason.BAD_URL, f"redirected to {place[:80]!a}: {error}") from error
    except Refused as refused:
        raise Refused(refused.reason, f"redirected: {refused.detail}") from refused
