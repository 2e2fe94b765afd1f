"""Clients that are not trusted: lengths, hosts, origins, keys, many connections; and signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.access import Access, Refused, host_name
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.server import Server
from tests.program import run, start_program
from tests.serving import MESSAGES, NAME, Running, running

PAGE = "https://page.example"
KEY = "sesame"
IPV6 = socket.has_dualstack_ipv6()


@pytest.fixture(scope="module")
def guarded(small_tier: Path) -> Iterator[Running]:
    """With a key, a name and an origin that is allowed."""
    options: dict[str, Any] = {"allow_hosts": ("mac.local",), "allow_origins": (PAGE,)}
    with running(small_tier, api_key=KEY, **options) as server:
        yield server


def assert_serves(server: Running) -> None:
    assert server.chat(max_tokens=3).usage.completion_tokens == 3


GOOD = json.dumps({"messages": MESSAGES, "max_tokens": 3}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
BAD_LENGTHS = {
    "none": (b"", GOOD, 411),
    "chunked": (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n", 411),
    "chunked with a length": (
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"5\r\nhello\r\n0\r\n\r\n",
        411,
    ),
    "two": (b"Content-Length: 5\r\nContent-Length: 6\r\n", GOOD, 400),
    "negative": (b"Content-Length: -1\r\n", GOOD, 400),
    "signed": (b"Content-Length: +5\r\n", GOOD, 400),
    "a word": (b"Content-Length: many\r\n", GOOD, 400),
    "too short": (b"Content-Length: 5\r\n", GOOD, 400),
    "too long": (b"Content-Length: %d\r\n" % (len(GOOD) + 9), GOOD, 400),
    "beyond the limit": (b"Content-Length: 20001\r\n", b"", 413),
    "astronomic": (b"Content-Length: %s\r\n" % (b"9" * 5000), b"", 413),
}


@pytest.mark.parametrize("case", BAD_LENGTHS.values(), ids=list(BAD_LENGTHS))
def test_lengths_that_lie(served: Running, case: tuple[bytes, bytes, int]):
    header, body, expected = case
    started = time.monotonic()
    status, _, answer = served.raw(HEAD + header + b"\r\n" + body, half_close=True)
    assert status == expected
    assert answer["error"]["message"]
    assert time.monotonic() - started < 5


def test_a_head_has_a_limit_as_a_whole(served: Running):
    """Of memory that anybody can fill: the key is checked after the head."""
    lines = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 60_000) for n in range(90))
    status, _, answer = served.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")
    assert status == 431
    assert answer["error"]["message"]


def test_a_request_without_memory(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("outlier_mlx.serve.handler.parse_body", fail)
        status, _, answer = served.post(GOOD)
    assert status == 503
    assert "no memory" in answer["error"]["message"]
    assert_serves(served)


def test_a_large_body_is_refused_unread(served: Running):
    """The client still gets to read why, though it is sending."""
    with pytest.raises(openai.APIStatusError) as caught:
        served.chat(messages=[{"role": "user", "content": "x" * 8_000_000}])
    assert caught.value.status_code == 413
    assert "the limit is 20000" in caught.value.message
    assert_serves(served)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /v1/chat/completions HTTP/1.1", 405),
        (b"POST /v1/models HTTP/1.1", 405),
        (b"DELETE /v1/models HTTP/1.1", 405),
        (b"BREW /health HTTP/1.1", 405),
        (b"GET /index.html HTTP/1.1", 404),
        (b"GET /v1/models/../../etc/passwd HTTP/1.1", 404),
        (b"GET /health HTTP/3.0", 505),
        (b"nonsense", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", 414),
    ],
)
def test_other_requests(served: Running, line: bytes, status: int):
    found, headers, answer = served.raw(line + b"\r\nHost: localhost\r\n\r\n", half_close=True)
    assert found == status
    assert answer["error"]["message"]
    assert headers["Server"].strip() == "outlier-mlx"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1:8080", 200),
        ("192.168.7.7", 200),
        ("[::1]:8080", 200),
        ("LocalHost.", 200),
        ("[::1]", 200),
        ("localhost:", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("[::1]evil", 403),
        ("[::1]evil:8080", 403),
        ("[::1", 403),
        ("[localhost]", 403),
        ("[evil.example]", 403),
        ("localhost:80:evil", 403),
        ("localhost:evil", 403),
        ("127.0.0.1:80@evil.example", 403),
    ],
)
def test_hosts(served: Running, host: str, status: int):
    """A page that rebinds its name to this address still sends its name."""
    found, _, answer = served.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert found == status
    if status == 403:
        assert answer["error"]["code"] == "host"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/v1/models", 200), ("/v1/chat/completions", 405), ("/nowhere", 404)],
)
def test_head_is_answered_without_a_body(served: Running, path: str, status: int):
    """With the headers that GET has, as far as they are known."""
    found, headers, body = served.raw(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (found, body) == (status, None)
    same = served.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())[1]
    if status == 200:
        assert headers["Content-Length"] == same["Content-Length"]
        assert headers["Content-Type"] == "application/json"


def test_a_host_header_is_needed_once(served: Running):
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        assert served.raw(b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n")[0] == 400


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:3000", "http://127.0.0.1"])
def test_no_page_may_ask_unless_told(served: Running, origin: str):
    status, headers, answer = served.post(GOOD, Origin=origin)
    assert (status, answer["error"]["code"]) == (403, "origin")
    assert not [name for name in headers if name.startswith("Access-Control")]
    status, headers, _ = served.post(GOOD)
    assert status == 200
    assert not [name for name in headers if name.startswith("Access-Control")]


def test_the_page_that_may_ask(guarded: Running):
    ask = {"Access_Control_Request_Method": "POST", "Origin": PAGE}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in ask.items())
    head = f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: mac.local\r\n{lines}\r\n"
    status, headers, _ = guarded.raw(head.encode())
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == PAGE
    assert "Authorization" in headers["Access-Control-Allow-Headers"]
    status, headers, _ = guarded.post(GOOD, Origin=PAGE, Authorization=f"Bearer {KEY}")
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    status, headers, _ = guarded.post(GOOD, Origin=f"{PAGE}.evil.example")
    assert status == 403
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("key", "status"),
    [
        (None, 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        ("Bearer", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer \u00e9", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
    ],
)
def test_keys(guarded: Running, key: str | None, status: int):
    line = "" if key is None else f"Authorization: {key}\r\n"
    head = f"GET /v1/models HTTP/1.1\r\nHost: mac.local\r\n{line}\r\n".encode("latin-1")
    found, headers, _ = guarded.raw(head)
    assert found == status
    assert ("WWW-Authenticate" in headers) == (status == 401)


def test_the_openai_client_s_key(guarded: Running):
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        guarded.chat()
    assert guarded.new_client(api_key=KEY).models.list().data[0].id == NAME
    # Whether it is alive is no secret.
    assert guarded.raw(b"GET /health HTTP/1.1\r\nHost: mac.local\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "", pytest.param("::", marks=pytest.mark.skipif(not IPV6, reason="no IPv6 here"))],
)
def test_others_can_only_reach_it_with_a_key(host: str):
    with pytest.raises(OutlierError, match="set an API key"):
        Server(NAME, never_loaded, ServeOptions(host=host, port=0), print, print)
    server = Server(NAME, never_loaded, ServeOptions(host=host, port=0, api_key=KEY), print, print)
    assert server.url == f"http://127.0.0.1:{server.server_port}/v1"
    server.server_close()


def never_loaded() -> Any:
    raise AssertionError


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        pytest.param("::1", marks=pytest.mark.skipif(not IPV6, reason="no IPv6 here")),
    ],
)
def test_loopback_needs_none(host: str):
    Server(NAME, never_loaded, ServeOptions(host=host, port=0), print, print).server_close()


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": ""},
        {"api_key": " x"},
        {"api_key": "sch\u00f6n"},
        {"allow_hosts": ("http://mac.local",)},
        {"allow_hosts": ("mac.local/v1",)},
        {"allow_origins": ("page.example",)},
        {"allow_origins": ("https://page.example/",)},
        {"kv_bits": 7},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(options: dict[str, Any]):
    with pytest.raises(OutlierError):
        ServeOptions(**options)


def test_host_names():
    assert host_name("[FE80::1]:80") == "fe80::1"
    assert Access(frozenset({"a.b"})).cors_headers(PAGE) == {}
    assert Refused(500, "x").as_json()["error"]["type"] == "server_error"


def test_logs_hold_no_control_characters(served: Running):
    served.raw(b"GET /\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert served.log[-1].isprintable()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_signals_end_it_cleanly(small_tier: Path, number: signal.Signals):
    """Within seconds, with status 0, though an answer without end is under way."""
    command = ["serve", "--model", small_tier, "--port", 0]
    process = start_program(*command, "--max-tokens", 100_000, "--max-context", 200_000)
    try:
        assert process.stderr
        line = process.stderr.readline()
        found = re.fullmatch(
            r"serving tier at (http://127.0.0.1:\d+/v1) \(press Ctrl-C to stop\)\n", line
        )
        assert found, line
        client: Any = openai.OpenAI(base_url=found[1], api_key="any", max_retries=0)
        chunks = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=100_000,
            logit_bias={"0": -100, "2": -100},
            stream=True,
        )
        next(chunks)
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 6
        rest = process.stderr.read()
        assert "shutting down\n" in rest and "Traceback" not in rest
    finally:
        process.kill()
        process.wait()


def test_the_command_refuses_in_one_line(small_tier: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OUTLIER_MLX_API_KEY", raising=False)
    command = ["serve", "--model", small_tier, "--quiet"]
    done = run(*command, "--host", "0.0.0.0", "--port", "0", code=1)
    assert not done.out
    assert done.err.startswith("error: --host 0.0.0.0 can be reached from other machines")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(*command, "--port", port, code=1)
    place = f"127.0.0.1:{port}"
    assert done.err == f"error: {place}: Address already in use; choose another --port\n"
