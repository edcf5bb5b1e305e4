"""A web of hosts on loopback that misbehave on purpose. Every host of 127.0.0.0/8 answers; each has a robots.txt."""

import asyncio
import contextlib
import gzip
import io
import random
import socket
import struct
import threading
import zlib
from collections import Counter

from PIL import Image


def picture(width_px=64, height_px=48, form="JPEG", seed=0, **options):
    """Return an image file of noise, which no other seed gives."""
    pixels = random.Random(f"{seed} {width_px} {height_px}").randbytes(width_px * height_px * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (width_px, height_px), pixels).save(out, form, **options)
    return out.getvalue()


def bomb_png(width_px=60_000, height_px=60_000):
    """Return a small PNG whose header claims gigabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def http(status=200, body=b"", *headers, length=True):
    """Return a whole answer; `headers` are lines."""
    lines = [f"HTTP/1.1 {status} Whatever", *headers, "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def gzip_bomb(megabytes=100):
    return gzip.compress(bytes(megabytes << 20), 9)


def name_server(monkeypatch):
    """Answer for names of .invalid at once, as a name server does; those of `busy.invalid` it cannot tell now."""
    real = socket.getaddrinfo
    asked = Counter()

    def resolve(host, *args, **options):
        name = host.decode() if isinstance(host, bytes) else str(host)
        if not name.endswith(".invalid"):
            return real(host, *args, **options)
        asked[name] += 1
        number = socket.EAI_AGAIN if name == "busy.invalid" else socket.EAI_NONAME
        raise socket.gaierror(number, "no such name" if number == socket.EAI_NONAME else "try again")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


class Web:
    """The hosts. `pages` maps a path to bytes sent as they are, or to `async (request, writer)`.

    Attributes:
        robots: What a host (`127.0.0.5`) sends for robots.txt; 404 where it is not set.
        asked: How often each path was asked for; robots.txt as `host/robots.txt`.
        connections: How many were made, by host.
    """

    def __init__(self, ssl_context=None):
        self.pages = {}
        self.robots = {}
        self.asked = Counter()
        self.agents = set()
        self.connections = Counter()
        self._ssl = ssl_context
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def url(self, path, host="127.0.0.1"):
        return f"{'https' if self._ssl else 'http'}://{host}:{self.port}/{path}"

    def _run(self):
        asyncio.set_event_loop(self._loop)
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self):
        self._stop = asyncio.Event()
        self._tasks = set()
        hosts = [f"127.0.0.{n}" for n in range(1, 60)]
        first = await asyncio.start_server(self._answer, hosts[0], 0, ssl=self._ssl)
        self.port = first.sockets[0].getsockname()[1]
        rest = await asyncio.start_server(self._answer, hosts[1:], self.port, ssl=self._ssl)
        self._ready.set()
        await self._stop.wait()
        for server in (first, rest):
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        host = writer.get_extra_info("sockname")[0]
        self.connections[host] += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await self._send(request, host, writer)
                await writer.drain()
        finally:
            self._tasks.discard(asyncio.current_task())
            with contextlib.suppress(OSError):
                writer.close()

    async def _send(self, request, host, writer):
        path = request.split(" ")[1].lstrip("/")
        self.agents |= {line for line in request.splitlines() if line.lower().startswith("user-agent:")}
        if path == "robots.txt":
            self.asked[f"{host}/robots.txt"] += 1
            page = self.robots.get(host, http(404))
        else:
            self.asked[path] += 1
            page = self.pages.get(path.partition("?")[0], http(404))
        if isinstance(page, bytes):
            writer.write(page)
        else:
            await page(request, writer)


# Pages that need more than bytes


def after(seconds, page):
    async def send(request, writer):
        await asyncio.sleep(seconds)
        writer.write(page)

    return send


def stall(page):
    """Send a part, then nothing more."""

    async def send(request, writer):
        writer.write(page)
        await writer.drain()
        await asyncio.sleep(60)

    return send


def trickle(page, step_bytes=1, pause_s=0.05):
    """Send a page slowly, but never silent for long."""

    async def send(request, writer):
        for i in range(0, len(page), step_bytes):
            writer.write(page[i : i + step_bytes])
            await writer.drain()
            await asyncio.sleep(pause_s)

    return send


def endless(head, chunk=b"x" * 65536):
    async def send(request, writer):
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()

    return send


def reset(page):
    """Send a part, then reset the connection."""

    async def send(request, writer):
        writer.write(page)
        await writer.drain()
        await asyncio.sleep(0.05)
        connection = writer.get_extra_info("socket")
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )  # SO_LINGER: close sends RST
        writer.transport.abort()

    return send


def in_turn(*pages):
    """Send one page after another, the last one again and again."""
    left = list(pages)

    async def send(request, writer):
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return send
