"""Servers under test, in this process, and clients for them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai

import outlier_mlx
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.provider import Load, LoadDraft
from outlier_mlx.serve.server import Server

NAME = "tiny"
#: Starts a server of a model that writes these tokens; named arguments are those of `Script`, and
#: `api_key`.
ServeScript = Callable[..., "Running"]
MESSAGES: Any = [{"role": "user", "content": "The heron stands in the water"}]


class Running:
    """A server that listens."""

    def __init__(self, server: Server, log: list[str]) -> None:
        self.server = server
        self.log = log
        self.client = self.new_client()

    def new_client(self, **options: Any) -> openai.OpenAI:
        defaults: dict[str, Any] = {"api_key": "any", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=self.server.url, **defaults | options)

    def chat(self, **options: Any) -> Any:
        """A completion of `MESSAGES` by the openai client."""
        defaults = {"model": NAME, "messages": MESSAGES, "max_tokens": 12}
        return self.client.chat.completions.create(**defaults | options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.server_port), timeout=30)

    def raw(self, request: bytes, *, half_close: bool = False) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the answer to these very bytes."""
        with self.connect() as connection:
            connection.sendall(request)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_answer(connection)

    def status(self, body: object, path: str) -> int:
        """The status alone, of a stream as well."""
        raw = json.dumps(body).encode()
        with self.connect() as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
        return int(answer.split()[1])

    def post(
        self, body: object, path: str = "/v1/chat/completions", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """The answer to a POST of JSON, or of bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": "localhost", "Content-Length": str(len(raw))} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
        return self.raw(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)

    def stream(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
        """The events of a stream as they are sent, without the last, which is [DONE]."""
        raw = json.dumps(body | {"stream": True}).encode()
        with self.connect() as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            answer = connection.makefile(encoding="utf-8").read()
        *events, done = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
        assert done == "[DONE]"
        return [json.loads(event) for event in events]

    def wait(self, condition: Callable[[], bool], seconds: float = 10) -> bool:
        """Whether something becomes true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer, to its end."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body) if body else None


@contextmanager
def running(
    model: Path | Load, *, load_draft: LoadDraft | None = None, **options: Any
) -> Iterator[Running]:
    """A server of a tier, or of what a function loads, on a free port."""
    log: list[str] = []
    load = partial(outlier_mlx.load, model) if isinstance(model, Path) else model
    given = ServeOptions(**{"port": 0} | options)
    server = Server(NAME, load, given, log.append, log.append, load_draft)
    try:
        server.start()
    except BaseException:
        server.stop()
        raise
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield Running(server, log)
    finally:
        server.shutdown()
        thread.join()
        generating = server.generator.loop.thread.native_id
        assert server.stop()
        _wait_until_gone(generating)


def _wait_until_gone(thread: int | None) -> None:
    """MLX aborts a process that ends while it frees what a thread compiled; see `serve.server`."""
    if not Path("/proc/self/task").exists():
        time.sleep(0.2)
    while Path(f"/proc/self/task/{thread}").exists():
        time.sleep(0.01)
