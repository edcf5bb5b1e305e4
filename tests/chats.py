"""A chat-completion server that misbehaves on request, for tests of what asks such servers."""

import base64
import json
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

from PIL import Image

CANARY = "What colour is this picture?"
NUM_IMAGE_TOKENS = 64


class Request:
    """What a test may want to know of a request."""

    def __init__(self, body, headers):
        self.body, self.headers, self.at_s = body, headers, time.monotonic()
        content = body["messages"][0]["content"]
        self.prompt = " ".join(part["text"] for part in content if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        self.image = Image.open(BytesIO(base64.b64decode(urls[0].partition(",")[2]))) if urls else None
        self.is_canary = CANARY in self.prompt

    @property
    def is_of_a_row(self):
        return self.image is not None and not self.is_canary


def completion(text, num_prompt_tokens=None, num_tokens=3, finish_reason="stop"):
    """The body of a good answer."""
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


def answer(handler, request):
    """Say the prompt and the mean colour of the picture; count a token for each byte and 64 for a picture."""
    colour = request.image and request.image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    num_image_tokens = NUM_IMAGE_TOKENS if request.image else 0
    num_tokens = 5 + len(request.prompt.encode()) + num_image_tokens
    handler.say(200, completion(f"{colour}: {request.prompt}", num_tokens))


def status(code, body="no", **headers):
    return lambda handler, request: handler.say(code, body, {k.replace("_", "-"): v for k, v in headers.items()})


def reset(handler, request):
    """Break the connection off without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hang(handler, request):
    """Answer when the server is closed, which is too late."""
    handler.server.closing.wait(30)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections.append(self.connection)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.chat.handle(self, Request(json.loads(data), self.headers))

    def say(self, code, body, headers=None):
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class ChatServer:
    """Answers well, but for the requests that a test plans something else for.

    Attributes:
        plan: What to do with the next requests of rows, one after the other; when it is empty, `usual`.
        usual: What to do with all other requests of rows.
        others: What to do with canaries and with requests that have no picture.
        requests: What came in.
        max_in_flight: How many were in flight at once, at most.
    """

    def __init__(self, port=0):
        self.plan, self.usual, self.others = deque(), answer, answer
        self.requests, self.max_in_flight, self._in_flight = [], 0, 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self._http.daemon_threads = True
        self._http.request_queue_size = 128
        self._http.handle_error = lambda *_: None
        self._http.chat, self._http.closing = self, threading.Event()
        self._http.connections = []
        self._http.server_bind()
        self._http.server_activate()
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.closing.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in self._http.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle(self, handler, request):
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
            action = self.others
            if request.is_of_a_row:
                action = self.plan.popleft() if self.plan else self.usual
        try:
            with suppress(OSError):  # whoever asked has gone
                action(handler, request)
        finally:
            with self._lock:
                self._in_flight -= 1

    @property
    def of_rows(self):
        return [request for request in self.requests if request.is_of_a_row]


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
