"""The HTTP side of the server: heads and bodies are checked before anything is done for them."""

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

# A body that has not arrived by then is given up.
BODY_SECONDS = 60.0
# A refused body is read and dropped so long: closing at once would destroy the answer, too.
LINGER_SECONDS = 2.0
ROUTES = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/chat/completions": "POST",
}


@dataclass(frozen=True)
class Service:
    """What a server serves, and to whom.

    Attributes:
        name: the model's, as clients see it.
        access: who may ask.
        max_body: bytes that a request's body may have.
        max_tokens: tokens that an answer may have.
        context: tokens that prompt and answer may have together; None: as the model has it.
        log: takes a line for each request.
        warn: takes a line for what should not happen.
    """

    name: str
    access: Access
    max_body: int
    max_tokens: int
    context: int | None
    log: Callable[[str], None]
    warn: Callable[[str], None]


class _Stream(Protocol):
    def read1(self, size: int) -> bytes: ...


def read_body(headers: Message, stream: _Stream, limit: int) -> bytes:
    """Read a request's body, of at most `limit` bytes, as long as its header says.

    Raises:
        Refused: 400, 408, 411 or 413; nothing was read if the header alone tells.
    """
    if "Transfer-Encoding" in headers:
        raise Refused(411, "chunked bodies are not read; send a Content-Length")
    lengths = set(headers.get_all("Content-Length", []))
    if not lengths:
        raise Refused(411, "a Content-Length is needed")
    text = lengths.pop().strip()
    if lengths or not (text.isascii() and text.isdigit()):
        raise Refused(400, "the Content-Length is not one number")
    # So many digits are refused unconverted.
    if len(text) > 18 or int(text) > limit:
        raise Refused(413, f"the body has {text[:18]} bytes; {limit} are read at most")
    missing = int(text)
    parts: list[bytes] = []
    deadline = time.monotonic() + BODY_SECONDS
    while missing:
        part = stream.read1(min(missing, 1 << 16))
        if not part:
            raise Refused(400, f"the body ended {missing} bytes before its Content-Length")
        if time.monotonic() > deadline:
            raise Refused(408, "the body did not arrive in time")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class CheckedHandler(BaseHTTPRequestHandler):
    """Refuses whom `Service.access` refuses, and answers every failure in JSON.

    Attributes:
        service: what is served, and to whom; set before `__init__` is called.
        streaming: whether the answer's head is out, and events follow.
        unread: whether a body was announced that has not been read.
    """

    server_version = "outlier-mlx"
    sys_version = ""
    timeout = 60
    service: Service
    streaming = False
    unread = False

    def parse_request(self) -> bool:
        """Read the request's head; refuse what may not ask, or asks for what there is not."""
        if not super().parse_request():
            return False
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.path = self.path.partition("?")[0]
        preflight = self.command == "OPTIONS"
        try:
            self.service.access.check(self.headers, free=preflight or self.path == "/health")
            named = self.path.startswith("/v1/models/")
            method = "GET" if named else ROUTES.get(self.path)
            if method is None:
                raise Refused(404, f"there is no {self.path[:80]}")
            if self.command not in (method, "OPTIONS"):
                raise Refused(405, f"{self.path[:80]} takes {method}")
        except Refused as refused:
            self.refuse(refused)
            return False
        return True

    def do_OPTIONS(self) -> None:
        """Answer a page that asks beforehand whether it may ask."""
        self.send_json(204, None)

    def guarded(self, answer: Callable[[], None]) -> None:
        """Call `answer`; whatever it raises becomes the answer."""
        try:
            answer()
        except Refused as refused:
            self.refuse(refused)
        except (ConnectionError, TimeoutError):
            self.log_message("left before the answer was finished")
        except Exception as error:
            self.service.warn(f"{type(error).__name__}: {error}")
            self.refuse(Refused(500, "the answer could not be finished"))

    def refuse(self, refused: Refused) -> None:
        """Send an error for an answer, or as the last event of a stream."""
        self.close_connection = True
        try:
            if self.streaming:
                self.wfile.write(f"data: {json.dumps(refused.as_json())}\n\n".encode())
                return
            if self.request_version == "HTTP/0.9":  # which has no status
                self.request_version = "HTTP/1.0"
            self._headers_buffer: list[bytes] = []  # of an answer that was begun
            self.send_json(refused.status, refused.as_json())
            if self.unread:
                self._linger()
        except OSError:
            self.log_message("left before the answer was read")

    def send_json(self, status: int, value: object) -> None:
        """Send a whole answer; without a body if `value` is None."""
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_cors_headers()
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if body:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_cors_headers(self) -> None:
        """Send headers that let a page read the answer, if its origin may."""
        origin = self.headers.get("Origin") if getattr(self, "headers", None) else None
        for name, value in self.service.access.cors_headers(origin).items():
            self.send_header(name, value)

    def send_error(self, code: int, message: str | None = None, *_: Any) -> None:
        """What http.server itself refuses, in JSON as well."""
        self.refuse(Refused(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """One line, without control characters, to whoever started the server."""
        text = f"{self.address_string()} {format % args}"
        self.service.log("".join(c if c.isprintable() else "?" for c in text))

    def _linger(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and self.connection.recv(1 << 16):
            pass
