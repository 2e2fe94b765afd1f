"""The HTTP side of the server: checks headers and bodies before any work is done."""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from outlier_mlx.serve.access import Access, Refused
from outlier_mlx.serve.options import ServeOptions

# Time limit for receiving a body.
BODY_SECONDS = 60.0
# After a refusal, the rest of the body is read and dropped for this long. If the connection were
# closed at once, the client might not receive the response.
DRAIN_SECONDS = 2.0
ENDPOINTS = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/chat/completions": "POST",
}


@dataclass(frozen=True)
class Service:
    """The served model, its limits, and who may use it.

    Attributes:
        name: the model's name, as clients see it.
        options: the server's options.
        access: which requests are allowed.
        log: called with one line for each request.
        warn: called with one line for each unexpected error.
    """

    name: str
    options: ServeOptions
    access: Access
    log: Callable[[str], None]
    warn: Callable[[str], None]


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
    deadline = time.monotonic() + BODY_SECONDS
    while missing:
        part = reader.read1(min(missing, 1 << 16))
        if not part:
            raise Refused(400, f"the body ended {missing} bytes before its Content-Length")
        if time.monotonic() > deadline:
            raise Refused(408, "the body did not arrive in time")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class CheckedHandler(BaseHTTPRequestHandler):
    """Checks `Service.access` for each request, and answers every error with JSON.

    Attributes:
        service: the model and its limits; set before `__init__` is called.
        notes: headers that tell how a request was understood; set before `__init__` is called.
        streaming: whether the headers of an event stream have been sent.
        unread: whether the request has a body that has not been read.
    """

    server_version = "outlier-mlx"
    sys_version = ""
    timeout = 60
    service: Service
    notes: dict[str, str]
    streaming = False
    unread = False

    def parse_request(self) -> bool:
        """Read the request line and headers; refuse unknown endpoints and forbidden clients."""
        if not super().parse_request():
            return False
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.path = self.path.partition("?")[0]
        preflight = self.command == "OPTIONS"
        try:
            needs_key = not preflight and self.path != "/health"
            self.service.access.check(self.headers, needs_key=needs_key)
            named = self.path.startswith("/v1/models/")
            method = "GET" if named else ENDPOINTS.get(self.path)
            if method is None:
                raise Refused(404, f"unknown endpoint {self.path[:80]}")
            if self.command not in (method, "OPTIONS", "HEAD" if method == "GET" else method):
                raise Refused(405, f"{self.path[:80]} expects {method}")
        except Refused as refused:
            self.refuse(refused)
            return False
        return True

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
        except Exception as error:
            self.service.warn(f"{type(error).__name__}: {error}")
            self.refuse(Refused(500, "the response could not be completed"))

    def refuse(self, refused: Refused) -> None:
        """Send an error as the response, or as the last event of an event stream."""
        self.close_connection = True
        try:
            if self.streaming:
                self.wfile.write(f"data: {json.dumps(refused.as_json())}\n\n".encode())
                return
            if self.request_version == "HTTP/0.9":  # HTTP/0.9 has no status line
                self.request_version = "HTTP/1.0"
            self._headers_buffer: list[bytes] = []  # drop headers that were not sent yet
            self.send_json(refused.status, refused.as_json())
            if self.unread:
                self._drain_body()
        except OSError:
            self.log_message("the client disconnected before it read the response")

    def send_json(self, status: int, value: object) -> None:
        """Send a complete response, without a body if `value` is None.

        The response to a HEAD request has the headers of GET's, and no body.
        """
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_cors_headers()
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if body:
            self.send_header("Content-Type", "application/json")
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
        self.refuse(Refused(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Log one line, with control characters replaced by "?"."""
        text = f"{self.address_string()} {format % args}"
        self.service.log("".join(c if c.isprintable() else "?" for c in text))

    def _drain_body(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DRAIN_SECONDS)
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and self.connection.recv(1 << 16):
            pass
