"""One request and its answer, bounded in time and bytes whatever the server does.

Every way in which a server, or the way to it, can fail comes out as `Failure`, with the row's reason and whether asking
again may help. Redirects are answers here: who follows them checks each hop.
"""

import asyncio
import email.utils
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from socket import EAI_FAIL, EAI_NODATA, EAI_NONAME
from typing import Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy
from yarl import URL

from pixart_data.addresses import PrivateAddress, PublicResolver, guarded_socket
from pixart_data.records import Reason
from pixart_data.sections import Downloads

Headers = CIMultiDictProxy[str]
REDIRECTS = (301, 302, 303, 307, 308)

_CHUNK_BYTES = 1 << 16
_NAMES_KEPT_S = 300
_RESOLVER_THREADS = 64


class Failure(Exception):
    """Why there is no image: a signal for the row, not an error of the job.

    Attributes:
        status: Of the answer, if there was one.
        transient: Asking again may help.
        retry_after_s: The server's wish.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str,
        *,
        status: int | None = None,
        transient: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.status = status
        self.transient = transient
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Answer:
    """A server's answer: the content of a 200 or 203, the target of a redirect, and nothing else."""

    status: int
    headers: Headers
    body: bytes


class Client:
    """Asks servers; keeps no cookies and follows nothing."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(
        self, url: URL, timeout_s: float, max_bytes: int, look: Callable[[Headers], None], cut: bool = False
    ) -> Answer:
        """Ask for a URL.

        Args:
            timeout_s: From the first packet to the last byte.
            look: Sees the headers before anything of the body is read, and may raise `Failure`.
            cut: Return the first `max_bytes` of a longer body.

        Raises:
            Failure: For every other answer than a 200, a 203 or a redirect, and for none.
        """
        status = None
        try:
            async with asyncio.timeout(timeout_s), self._session.get(url, allow_redirects=False) as response:
                status = response.status
                _check_status(status, response.headers)
                look(response.headers)
                body = b"" if status in REDIRECTS else await _body(response, max_bytes, cut)
                return Answer(status, response.headers, body)  # a connection with more to read is closed
        except Failure as failure:
            failure.status = status
            raise
        except _FAILURES as error:
            found = _failure(error, timeout_s)
            found.status = status
            raise found from error


@asynccontextmanager
async def open_client(config: Downloads) -> AsyncIterator[Client]:
    """Connect as the settings say, for as long as the context lasts."""
    asyncio.get_running_loop().set_default_executor(  # resolves names; those of the dead take long
        ThreadPoolExecutor(min(config.concurrency, _RESOLVER_THREADS), thread_name_prefix="resolve")
    )
    guards: dict[str, Any] = {"resolver": PublicResolver(), "socket_factory": guarded_socket}
    connector = aiohttp.TCPConnector(
        limit=0,  # who asks keeps to limits of its own
        ttl_dns_cache=_NAMES_KEPT_S,
        **({} if config.allow_private_addresses else guards),
    )
    agent = f"{config.user_agent}/{version('pixart-toolkit')}" + (f" (+{config.contact})" if config.contact else "")
    async with aiohttp.ClientSession(
        connector=connector,
        headers={"User-Agent": agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s, sock_read=config.read_timeout_s),
        auto_decompress=False,  # or a small answer unpacks to any size before it can be measured
        trust_env=False,
    ) as session:
        yield Client(session)


# Status


def _check_status(status: int, headers: Headers) -> None:
    if status in (200, 203) or status in REDIRECTS:
        return
    what = f"the server answered {status}"
    if status in (404, 410):
        raise Failure(Reason.NOT_FOUND, what)
    if status == 429:
        raise Failure(Reason.RATE_LIMITED, what, transient=True, retry_after_s=_retry_after_s(headers))
    if status == 408:
        raise Failure(Reason.TIMED_OUT, what, transient=True)
    if 500 <= status < 600:
        raise Failure(Reason.SERVER_ERROR, what, transient=True, retry_after_s=_retry_after_s(headers))
    if 400 <= status < 500:
        raise Failure(Reason.ACCESS_DENIED, what)
    raise Failure(Reason.BAD_RESPONSE, f"{what}, which is no image")


def _retry_after_s(headers: Headers) -> float | None:
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return None


# Body


async def _body(response: aiohttp.ClientResponse, max_bytes: int, cut: bool) -> bytes:
    """Read and unpack at most `max_bytes`, and not one chunk more."""
    declared = response.content_length
    if declared is not None and declared > max_bytes and not cut:
        raise Failure(Reason.TOO_LARGE, f"the server announces {declared} bytes, more than {max_bytes}")
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    unpacker = None if encoding in ("", "identity") else _Unpacker(encoding)
    body = bytearray()
    received = 0
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        received += len(chunk)
        body += unpacker.unpack(chunk, max_bytes + 1 - len(body)) if unpacker else chunk
        if len(body) > max_bytes or received > max_bytes:
            if cut:
                return bytes(body[:max_bytes])
            raise Failure(Reason.TOO_LARGE, f"more than {max_bytes} bytes; the rest was not read")
    if unpacker and received and not unpacker.is_whole:
        raise Failure(Reason.BAD_RESPONSE, f"the {encoding} data ends too early")
    return bytes(body)


class _Unpacker:
    """Undoes a Content-Encoding that was not asked for, a bounded piece at a time."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise Failure(Reason.BAD_RESPONSE, f"Content-Encoding {encoding[:40]!a}, which was not asked for")
        self._encoding = encoding
        self._zlib: Any = None

    def unpack(self, chunk: bytes, max_bytes: int) -> bytes:
        if self._zlib is None:  # `deflate` means zlib's format, and often enough bare deflate data
            bare = self._encoding == "deflate" and chunk[0] & 0x0F != 8
            self._zlib = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        return bytes(self._zlib.decompress(chunk, max_bytes))

    @property
    def is_whole(self) -> bool:
        return bool(self._zlib.eof)


# Failure

# TimeoutError and ssl.SSLError are OSErrors, UnicodeError is a ValueError.
_FAILURES = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError, EOFError, zlib.error)

_KINDS: tuple[tuple[Any, Reason, bool], ...] = (  # the first that fits, and whether asking again may help
    (aiohttp.ClientConnectorDNSError, Reason.HOST_NOT_FOUND, True),
    ((aiohttp.InvalidURL, UnicodeError), Reason.BAD_URL, False),  # the latter: a host that IDNA cannot spell
    ((aiohttp.ClientSSLError, ssl.SSLError), Reason.CONNECTION_FAILED, False),
    ((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError), Reason.CONNECTION_FAILED, True),
)
_FINAL_NAME_ERRORS = (EAI_NONAME, EAI_NODATA, EAI_FAIL)


def _failure(error: BaseException, timeout_s: float) -> Failure:
    text = str(error).replace("\n", " ")[:300] or type(error).__name__
    cause = getattr(error, "os_error", error)
    if isinstance(cause, PrivateAddress):
        return Failure(Reason.PRIVATE_ADDRESS, str(cause))
    if isinstance(error, TimeoutError):
        what = text if isinstance(error, aiohttp.ServerTimeoutError) else f"not done after {timeout_s:.1f} s"
        return Failure(Reason.TIMED_OUT, what, transient=True)
    for kinds, reason, transient in _KINDS:
        if isinstance(error, kinds):
            again = transient and getattr(cause, "errno", None) not in _FINAL_NAME_ERRORS
            return Failure(reason, text, transient=again)
    return Failure(Reason.BAD_RESPONSE, f"not an answer in HTTP: {text}")
