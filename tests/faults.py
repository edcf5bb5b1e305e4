"""A proxy that does to object stores what networks and busy stores do: refuse, break off in the middle, dawdle."""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

_ERRORS = {500: ("InternalError", "We encountered an internal error."), 503: ("SlowDown", "Reduce your request rate.")}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "server", "date"}


class FaultyProxy:
    """Forwards HTTP to `target_url`, and injects faults by a seeded die; a context manager.

    Attributes:
        url: What clients are to be given instead of the target.
        counters: Requests seen (`requests`), and faults by kind: `error_500`, `error_503` (the request is not
            forwarded), `reset` (it is, and the answer breaks off in the middle), `slow` (it pauses for `slow_s`).
        error_rate, reset_rate, slow_rate: Shares of requests; may be changed at any time.
    """

    def __init__(
        self,
        target_url: str,
        seed: int = 0,
        error_rate: float = 0.0,
        slow_rate: float = 0.0,
        reset_rate: float = 0.0,
        slow_s: float = 0.2,
    ) -> None:
        parts = urlsplit(target_url)
        self.target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.error_rate, self.slow_rate, self.reset_rate, self.slow_s = error_rate, slow_rate, reset_rate, slow_s
        self.counters: Counter[str] = Counter()
        self._die = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def num_faults(self) -> int:
        """Faults injected so far, slow answers included."""
        return self.counters.total() - self.counters["requests"]

    def draw(self) -> str:
        """Choose what happens to a request: the name of a counter, or an empty string."""
        with self._lock:
            self.counters["requests"] += 1
            number, status = self._die.random(), self._die.choice((500, 503))
            for rate, fault in (
                (self.error_rate, f"error_{status}"),
                (self.reset_rate, "reset"),
                (self.slow_rate, "slow"),
            ):
                if number < rate:
                    self.counters[fault] += 1
                    return fault
                number -= rate
            return ""

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """A client that went away is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def do_GET(self) -> None:
        body = self._request_body()
        fault = self.proxy.draw()
        if fault.startswith("error_"):
            return self._refuse(int(fault[-3:]))
        status, headers, data = self._forward(body)
        if fault == "reset":
            return self._break_off(status, headers, data)
        self._head(status, headers, data)
        if fault == "slow":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(self.proxy.slow_s)
            data = data[len(data) // 2 :]
        self.wfile.write(data)
        return None

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def _request_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return data

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with contextlib.closing(http.client.HTTPConnection(*self.proxy.target, timeout=60)) as target:
            target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    target.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                target.putheader("Content-Length", str(len(body)))
            target.endheaders(body)
            answer = target.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _head(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if "content-length" not in names and status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()

    def _refuse(self, status: int) -> None:
        code, message = _ERRORS[status]
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._head(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _break_off(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        if data:
            self._head(status, headers, data)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a RST, not a FIN
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
