"""Many and slow connections: nobody is locked out by clients that are silent."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.serve import connections
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.connections import SPARE, Connections, owner_of
from tests.serving import MESSAGES, Running, read_answer, running

ENDLESS = {"messages": MESSAGES, "max_tokens": 100_000, "logit_bias": {"0": -100, "2": -100}}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
BODY = json.dumps({"messages": MESSAGES, "max_tokens": 3}).encode()


def long_running(server: Running) -> socket.socket:
    """A connection that is answered for minutes."""
    connection = server.connect()
    raw = json.dumps(ENDLESS | {"stream": True}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
    assert connection.recv(12) == b"HTTP/1.0 200"
    return connection


@contextmanager
def trickling(clients: list[socket.socket], drops: bytes) -> Iterator[None]:
    """Each client sends a byte every tenth of a second, as long as it can."""
    ended = threading.Event()

    def run() -> None:
        for drop in drops:
            for client in clients:
                with suppress(OSError):
                    client.send(bytes([drop]))
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_more_than_can_be_answered_are_told_to_come_back(small_tier: Path):
    with running(small_tier, max_clients=2, max_tokens=100_000, max_context=200_000) as server:
        answered = [long_running(server) for _ in range(2)]
        status, headers, answer = server.post(BODY)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "too many" in answer["error"]["message"]
        # Whether it is alive is answered nevertheless.
        assert server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        for connection in answered:
            connection.close()
        assert server.wait(lambda: not len(server.server.connections))
        assert server.post(BODY)[0] == 200


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /v1/chat", HEAD + b"Content-Length: 1000\r\n\r\n{"],
    ids=["silent", "in the head", "in the body"],
)
def test_slow_clients_lock_nobody_out(small_tier: Path, start: bytes):
    """However many; the one that was silent for the longest makes room, and is told so."""
    with running(small_tier) as server, ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(64 + SPARE)]
        for client in slow:
            client.sendall(start)
        assert server.wait(lambda: len(server.server.connections) == len(slow))
        with trickling(slow, b"x" * 1000):
            started = time.monotonic()
            for _ in range(3):
                assert server.chat(max_tokens=3).usage.completion_tokens == 3
            assert time.monotonic() - started < 10
        assert len(server.server.connections) <= len(slow)


def test_the_silent_are_closed_first(small_tier: Path):
    with running(small_tier, max_clients=1) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(1 + SPARE)]
        assert server.wait(lambda: len(server.server.connections) == len(clients))
        # All but the third say something after it was last heard.
        for client in clients[:2] + clients[3:]:
            client.sendall(HEAD)
        heard = clients[2].getsockname()
        open_ = server.server.connections._arriving
        assert server.wait(
            lambda: min(open_, key=lambda one: one.heard).socket.getpeername() == heard
        )
        assert server.post(BODY)[0] == 200
        status, headers, _ = read_answer(clients[2])
        assert (status, headers["Retry-After"]) == (503, "1")
        rest = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        for client in (clients[0], clients[-1]):
            client.sendall(rest)
            assert read_answer(client)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "drops", "status"),
    [
        (b"", b"", None),
        (b"", HEAD, None),
        (HEAD, b"X: " + b"x" * 100, 408),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"{" + b" " * 100, 408),
    ],
    ids=["silent", "request line", "head", "body"],
)
def test_a_request_must_arrive_in_time(
    small_tier: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: bytes,
    drops: bytes,
    status: int | None,
):
    """In time altogether, however often something arrives."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.6)
    monkeypatch.setattr("outlier_mlx.serve.http.BODY_SECONDS", 0.6)
    with running(small_tier) as server, server.connect() as client:
        client.sendall(start)
        with trickling([client], drops):
            started = time.monotonic()
            if status is None:
                assert client.recv(100) == b""
            else:
                found, _, answer = read_answer(client)
                assert found == status and "in time" in answer["error"]["message"]
            assert 0.3 < time.monotonic() - started < 5
        assert server.wait(lambda: not len(server.server.connections))


def test_a_client_that_takes_nothing(small_tier: Path, monkeypatch: pytest.MonkeyPatch):
    """Its place is free again after a time, which is counted over all that is sent to it."""
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.5)
    chunks = 0
    with running(small_tier) as server, server.connect() as client:
        assert server.wait(lambda: len(server.server.connections) == 1)
        (connection,) = server.server.connections._arriving
        with pytest.raises(TimeoutError):
            while True:
                connection.write(b"x" * 100_000)
                chunks += 1
                if chunks % 5 == 0:
                    client.recv(100_000)
        with pytest.raises(TimeoutError):
            connection.write(b"x")
    assert chunks > 0


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no 127.0.0.2 unless it is set up")
def test_no_other_machine_has_more_than_half(small_tier: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 4 answers, and of 20 requests that are arriving. The addresses of this machine play."""
    monkeypatch.setattr(connections, "owner_of", lambda address: address)
    port = 0

    def connect(address: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), 30, (address, 0))

    options: dict[str, Any] = {"max_tokens": 100_000, "max_context": 200_000}
    with running(small_tier, max_clients=4, **options) as server, ExitStack() as stack:
        port = server.server.server_port
        monkeypatch.setattr(server, "connect", lambda: connect("127.0.0.2"))
        for _ in range(2):
            stack.enter_context(long_running(server))
        assert server.post(BODY)[0] == 503
        greedy = [stack.enter_context(connect("127.0.0.2")) for _ in range(12)]
        assert read_answer(greedy[0])[0] == read_answer(greedy[1])[0] == 503
        assert server.wait(lambda: len(server.server.connections) == 2 + (4 + SPARE) // 2)
        monkeypatch.setattr(server, "connect", lambda: connect("127.0.0.3"))
        assert server.post(BODY)[0] == 200


def test_whose_an_address_is():
    assert [owner_of(a) for a in ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1")] == [
        None
    ] * 4
    assert owner_of("192.168.1.7") != owner_of("192.168.1.8")
    assert owner_of("::ffff:192.168.1.7") == owner_of("192.168.1.7")
    assert owner_of("2001:db8:0:7::1") == owner_of("2001:db8:0:7:ffff::2")
    assert owner_of("2001:db8:0:7::1") != owner_of("2001:db8:0:8::1")
    assert owner_of("fe80::1%eth0") == owner_of("fe80::2%eth1")


def test_this_machine_may_have_all_places():
    """Its programs have one address, as has a proxy."""
    places, pairs = Connections(32), [socket.socketpair() for _ in range(33)]
    try:
        *first, last = [places.admit(server, "127.0.0.1") for server, _ in pairs]
        for connection in first:
            places.claim(connection)
        with pytest.raises(Refused, match="too many"):
            places.claim(last)
        places.leave(first[0])
        places.claim(last)
        assert len(places) == 32
    finally:
        for ends in pairs:
            for end in ends:
                end.close()


def test_without_threads_a_client_is_told_so(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert served.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 503
    assert served.wait(lambda: not len(served.server.connections))
    assert served.post(BODY)[0] == 200


def test_silent_clients_do_not_delay_the_end(small_tier: Path):
    with running(small_tier) as server, server.connect():
        assert server.wait(lambda: len(server.server.connections) == 1)
        started = time.monotonic()
        server.server.connections.close(30)
        assert time.monotonic() - started < 15


HARD = {f"p{n}": {"type": "string", "pattern": "^[a-z]{1,40}(x|y)*$"} for n in range(60)}
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("chat/completions", {"messages": [{"role": "user", "content": "!" * 5000}]}),
    "answer": ("chat/completions", ENDLESS),
    "stream": ("chat/completions", ENDLESS | {"stream": True, "outlier": {"experts": True}}),
    "several": ("completions", {"prompt": ["a", "b", "c", "d"]}),
    "schema": ("completions", {"prompt": "a", "json_schema": {"properties": HARD}}),
    "events": ("responses", {"input": "hello", "stream": True}),
    "message": ("messages", {"messages": MESSAGES, "max_tokens": 50_000, "stream": True}),
}


def test_clients_that_vanish_in_any_phase_leave_nothing(small_tier: Path) -> None:
    """They reset the connection, in the head, in the body, and at several times after it."""
    options: dict[str, Any] = {
        "max_tokens": 50_000,
        "max_context": 100_000,
        "decode_concurrency": 2,
    }
    with running(small_tier, **options) as server:
        for number, (path, body) in enumerate(PHASES.values()):
            raw = json.dumps(body).encode()
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\n".encode()
            whole = head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw
            for wait, count in ((0, 20), (0, len(whole) - 3), (0, len(whole)), (0.05, len(whole))):
                with server.connect() as client:
                    client.sendall(whole[:count])
                    time.sleep(wait * (1 + number % 3))
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        generator = server.server.generator
        assert server.wait(lambda: not generator.replies)
        assert server.wait(lambda: not (generator.loop._batches or generator.loop._waiting))
        assert not generator.provider.memory._taken and not generator.provider.memory._line
        assert server.chat(max_tokens=3).usage.completion_tokens == 3
        assert not [line for line in server.log if "Error" in line]
