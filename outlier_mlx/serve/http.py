"""The HTTP side of the server: checks headers and bodies before any work is done."""

import io
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from outlier_mlx.serve.access import Access, Refused
from outlier_mlx.serve.apis import error_answer, new_apis
from outlier_mlx.serve.apis.api import Answer, Api
from outlier_mlx.serve.apis.endpoints import methods
from outlier_mlx.serve.connections import BODY_SECONDS, Connection, Connections
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.static import FILES

# After a refusal, the rest of the body is read and dropped for this long. If the connection were
# closed at once, the client might not receive the response.
DRAIN_SECONDS = 2.0
NEED_NO_KEY = {"/health", *FILES}


@dataclass(frozen=True)
class Service:
    """The served model, its limits, and who may use it.

    Attributes:
        name: the model's name, as clients see it.
        options: the server's options.
        access: which requests are allowed.
        log: called with one line for each request.
        warn: called with one line for each unexpected error.
        connections: the open connections.
        named: parameters without effect that were logged.
        apis: the APIs by their paths.
    """

    name: str
    options: ServeOptions
    access: Access
    log: Callable[[str], None]
    warn: Callable[[str], None]
    connections: Connections
    named: set[str] = field(default_factory=set)
    apis: dict[str, Api] = field(default_factory=new_apis)


class _Reader(Protocol):
    def read1(self, size: int) -> bytes: ...


def read_body(headers: Message, reader: _Reader, limit: int) -> bytes:
    """Read a request body of `Content-Length` bytes, at most `limit`.

    Raises:
        Refused: 400, 408, 411 or 413; nothing is read if the headers are already wrong.
    """
    if "Transfer-Encoding" in headers:
        raise Refused(411, "chunked bodies are not supported; send a Content-Length")
    lengths = set(headers.get_all("Content-Length", []))
    if not lengths:
        raise Refused(411, "Content-Length is missing")
    text = lengths.pop().strip()
    if lengths or not (text.isascii() and text.isdigit()):
        raise Refused(400, "the Content-Length is not one number")
    # int() is slow for very long numbers.
    if len(text) > 18 or int(text) > limit:
        raise Refused(413, f"the body has {text[:18]} bytes; the limit is {limit}")
    missing = int(text)
    parts: list[bytes] = []
    while missing:
        try:
            part = reader.read1(min(missing, 1 << 16))
        except TimeoutError:
            raise Refused(408, "the body did not arrive in time") from None
        if not part:
            raise Refused(400, f"the body ended {missing} bytes before its Content-Length")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class CheckedHandler(BaseHTTPRequestHandler):
    """Checks `Service.access` for each request, and answers every error with the API's JSON.

    Attributes:
        service: the model and its limits; set before `__init__` is called.
        notes: headers that tell how a request was understood; set before `__init__` is called.
        streaming: the answer of which a stream has begun, or None.
        unread: whether the request has a body that has not been read.
        request: the connection, where http.server has a socket.
    """

    server_version = "outlier-mlx"
    sys_version = ""
    request: Connection
    wfile: Any
    service: Service
    notes: dict[str, str]
    streaming: Answer | None = None
    unread = False

    def setup(self) -> None:
        """Read and write through the connection's time limits."""
        self.connection = self.request.socket
        self.rfile = io.BufferedReader(self.request)
        self.wfile = self.request

    def parse_request(self) -> bool:
        """Read the request line and headers; refuse unknown endpoints and forbidden clients."""
        try:
            if not super().parse_request():
                return False
        except TimeoutError:
            self.refuse(Refused(408, "the head of the request did not arrive in time"))
            return False
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.path = self.path.partition("?")[0]
        preflight = self.command == "OPTIONS"
        try:
            needs_key = not preflight and self.path not in NEED_NO_KEY
            self.service.access.check(self.headers, needs_key=needs_key)
            expected = methods(self.path)
            also = ("OPTIONS", "HEAD") if "GET" in expected else ("OPTIONS",)
            if self.command not in expected + also:
                raise Refused(405, f"{self.path[:80]} expects {' or '.join(expected)}")
        except Refused as refused:
            self.refuse(refused)
            return False
        return True

    def read_body(self) -> bytes:
        """The request's body. Now the connection is answered, and not closed for others.

        Raises:
            Refused: 400, 408, 411, 413, or 503 if too many requests are answered already.
        """
        connections = self.service.connections
        connections.check_room(self.request)
        self.request.deadline = time.monotonic() + BODY_SECONDS
        self.request.room = None
        body = read_body(self.headers, self.rfile, self.service.options.max_body)
        self.unread = False
        connections.claim(self.request)
        return body

    def do_OPTIONS(self) -> None:
        """Answer a browser's CORS preflight request."""
        self.send_json(204, None)

    def answer_errors(self, answer: Callable[[], None]) -> None:
        """Call `answer`; send any exception to the client as an error response."""
        try:
            answer()
        except Refused as refused:
            self.refuse(refused)
        except (ConnectionError, TimeoutError):
            self.log_message("the client disconnected before the response was complete")
        except MemoryError:
            self.refuse(Refused(503, "there is no memory left for this request; try again later"))
        except Exception as error:
            self.service.warn(f"{type(error).__name__}: {error}")
            self.refuse(Refused(500, "the response could not be completed"))

    def refuse(self, refused: Refused) -> None:
        """Send an error as the response, or as the last event of an event stream."""
        self.close_connection = True
        if refused.status == 503:
            self.notes["Retry-After"] = "1"
        try:
            if self.streaming is not None:
                for event in self.streaming.failed(refused):
                    self.wfile.write(event.encode())
                return
            if self.request_version == "HTTP/0.9":  # HTTP/0.9 has no status line
                self.request_version = "HTTP/1.0"
            self._headers_buffer: list[bytes] = []  # drop headers that were not sent yet
            path = getattr(self, "path", "").partition("?")[0]  # None yet of a line that is wrong
            headers = getattr(self, "headers", None)
            self.send_json(*error_answer(self.service.apis, path, headers, refused))
            if self.unread:
                self._drain_body()
        except OSError:
            self.log_message("the client disconnected before it read the response")

    def send_json(self, status: int, value: object) -> None:
        """Send a value as JSON, or a response without a body if it is None."""
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if value is None:
            self.send_body(status, b"", headers)
        else:
            headers["Content-Type"] = "application/json"
            self.send_body(status, json.dumps(value).encode(), headers)

    def send_body(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a complete response; to a HEAD request, without its body."""
        self.send_response(status)
        self.send_cors_headers()
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        """Send the notes after the other headers."""
        for name, value in self.notes.items():
            self.send_header(name, value)
        super().end_headers()

    def send_cors_headers(self) -> None:
        """Send the CORS headers if the request's origin is allowed."""
        origin = self.headers.get("Origin") if getattr(self, "headers", None) else None
        for name, value in self.service.access.cors_headers(origin).items():
            self.send_header(name, value)

    def send_error(self, code: int, message: str | None = None, *_: Any) -> None:
        """Send errors of http.server as JSON, too."""
        self.unread = self.unread or code in (414, 431)  # a head that is too long goes on
        self.refuse(Refused(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Log one line, with control characters replaced by "?"."""
        text = f"{self.address_string()} {format % args}"
        self.service.log("".join(c if c.isprintable() else "?" for c in text))

    def _drain_body(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self.request.deadline = time.monotonic() + DRAIN_SECONDS
        self.request.room = None
        with suppress(TimeoutError):
            while self.rfile.read1(1 << 16):
                pass
