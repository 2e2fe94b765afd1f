"""The files of the page that a browser gets, and which pages may ask the server."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlier_mlx.serve import static
from outlier_mlx.serve.static import FILES
from tests.library import Library
from tests.serving import MESSAGES, NAME, Running, running

KEY = "0123456789abcdef"
GOOD = {"messages": MESSAGES, "max_tokens": 3}
FOLDER = Path(static.__file__).parent / "page"


@pytest.fixture(scope="module")
def keyed(small_tier: Path) -> Iterator[Running]:
    with running(small_tier, api_key=KEY, max_tokens=50) as server:
        yield server


def get(
    server: Running, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize("path", FILES)
def test_files(keyed: Running, path: str) -> None:
    """They are sent as they are, without a key, with headers that keep everything else out."""
    status, headers, body = get(keyed, path)
    assert (status, body) == (200, (FOLDER / FILES[path].name).read_bytes())
    assert headers["Content-Type"] == FILES[path].content_type
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "img-src", "connect-src"), "'self'"),
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert "Access-Control-Allow-Origin" not in headers
    again, same, nothing = get(keyed, path, "HEAD")
    assert (again, same["Content-Length"], nothing) == (200, str(len(body)), b"")
    assert get(keyed, path, "POST")[0] == 405
    assert get(keyed, path, Host="evil.example")[0] == 403
    assert get(keyed, path, Origin="https://evil.example")[0] == 403


def test_every_file_is_sent_and_none_comes_from_elsewhere() -> None:
    assert {file.name for file in FILES.values()} == {file.name for file in FOLDER.iterdir()}
    text = "".join(file.read_text(encoding="utf-8") for file in FOLDER.iterdir())
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        " style=",
        "javascript:",
        " onclick=",
    ):
        assert forbidden not in text, forbidden
    assert len(text.encode()) < 60 << 10


def test_nothing_beside_the_files(keyed: Running) -> None:
    for path in ("/page", "/static.py", "/page/page.js", "/../static.py", "/%2e%2e/static.py"):
        assert get(keyed, path, Authorization=f"Bearer {KEY}")[0] == 404


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8080", "http://localhost:8080", 200),
        ("LOCALHOST:8080", "http://localhost:8080", 200),
        ("192.168.1.5:8080", "http://192.168.1.5:8080", 200),
        ("[::1]:8080", "http://[::1]:8080", 200),
        ("localhost", "https://localhost", 200),  # behind a proxy with TLS
        ("localhost:8080", "http://localhost:3000", 403),
        ("localhost:8080", "http://localhost", 403),
        ("localhost:8080", "http://127.0.0.1:8080", 403),
        ("localhost:8080", "http://evil.example", 403),
        ("evil.example:8080", "http://evil.example:8080", 403),
        ("localhost:8080", "null", 403),
        ("localhost:8080", "ftp://localhost:8080", 403),
    ],
)
def test_only_the_own_page_may_ask(served: Running, host: str, origin: str, status: int) -> None:
    found, headers, answer = served.post(GOOD, Host=host, Origin=origin)
    assert found == status, answer
    assert "Access-Control-Allow-Origin" not in headers


def test_the_key_is_needed_for_all_but_the_files(keyed: Running) -> None:
    assert get(keyed, "/v1/models")[0] == 401
    assert get(keyed, "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_what_the_page_is_told_of_the_model(served: Running) -> None:
    model = served.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")[2]["data"][0]
    assert model["id"] == NAME
    assert set(model["outlier"].pop("drafts")) == {"steps", "drafted", "accepted"}
    assert model["outlier"] == {
        "context": 512,
        "defaults": {"max_tokens": 50, "temperature": 0.0, "top_p": 1.0},
        "experts": {"layers": [1], "experts": 4, "top_k": 2, "paged": False},
    }


def test_a_model_without_experts(library: Library) -> None:
    with running(library.base().path) as server:
        model = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")[2]["data"][0]
        assert model["outlier"]["experts"] is None
