"""A local stand-in for the Hugging Face hub: it lists and serves folders of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

#: Endings of the files that are in LFS.
LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    """A repository: folders by commit, and commits by branch or tag."""

    commits: dict[str, Path]
    refs: dict[str, str]
    refusal: tuple[int, str] | None = None  # status and error code for everything but the listing


@dataclass
class Request:
    """What was asked for, and how many bytes of content went out."""

    method: str
    path: str
    sent: int
    token: str | None
    part: str | None


@dataclass
class Hub:
    """A stand-in for the hub; `url` is its address."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    private: set[str] = field(default_factory=set)
    down: bool = False
    #: Files of tensors are elsewhere, as LFS has them: a redirect to another host is the answer.
    redirects: bool = False
    #: By a file's name: the connection breaks, once, after so many bytes of content.
    drops: dict[str, int] = field(default_factory=dict)
    #: Called with method, file and range before a file is answered for; may change the above.
    on_file: Callable[[str, str, str | None], None] | None = None

    def add(self, name: str, *folders: Path) -> list[str]:
        """A repository whose commits are these folders: the last is `main`, all are v1, v2 ..."""
        commits = {
            hashlib.sha1(f"{name} {n}".encode()).hexdigest(): f for n, f in enumerate(folders)
        }
        refs = {f"v{n + 1}": commit for n, commit in enumerate(commits)}
        self.repos[name] = Repo(commits, refs | {"main": list(commits)[-1]})
        return list(commits)

    def asked(self, name: str) -> list[Request]:
        """Requests for files of a repository."""
        return [r for r in self.requests if r.path.startswith(f"/{name}/resolve/")]

    def files_asked(self, name: str) -> set[str]:
        return {request.path.split("/", 5)[5] for request in self.asked(name)}


class Handler(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub uses to list and to fetch."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/(?:[^/]+/[^/]+/resolve|lfs/[^/]+/[^/]+)/[^/]+/(.+)", path)
        if match and self.hub.on_file is not None:
            self.hub.on_file(self.command, match[1], self.headers.get("Range"))
        if self.hub.down:
            self.reply(503, b"down for maintenance")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.describe(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.serve(*match.groups())
        elif match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self.send(self.hub.repos[match[1]].commits[match[2]] / match[3], {})
        else:
            self.refuse(404, "")

    def commit(self, name: str, revision: str) -> str | None:
        """The commit, or None once a refusal was sent."""
        repo = self.hub.repos.get(name)
        if name in self.hub.private and not self.headers.get("Authorization"):
            self.refuse(401, "RepoNotFound")
        elif repo is None:
            self.refuse(404, "RepoNotFound")
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self.refuse(404, "RevisionNotFound")
        else:
            return commit
        return None

    def describe(self, name: str, what: str | None, revision: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        folder = self.hub.repos[name].commits[commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path: path.relative_to(folder).as_posix() for path in files}
        body: Any = [
            {"type": "file", "path": names[p], "size": p.stat().st_size, "oid": etag(p)}
            | ({"lfs": large(p)} if self.hub.redirects and p.suffix in LARGE else {})
            for p in files
        ]
        if what != "tree":
            siblings = [{"rfilename": file} for file in names.values()]
            body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def serve(self, name: str, revision: str, file: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        repo = self.hub.repos[name]
        if repo.refusal is not None:
            self.refuse(*repo.refusal)
            return
        path = repo.commits[commit] / file
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit}
        if self.hub.redirects and path.suffix in LARGE:
            headers |= {"X-Linked-Etag": f'"{etag(path)}"'}
            headers |= {"X-Linked-Size": str(path.stat().st_size)}
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            headers |= {"Location": f"{elsewhere}/lfs/{name}/{commit}/{file}"}
            self.reply(302, b"", headers)
            return
        self.send(path, headers)

    def send(self, path: Path, headers: dict[str, str]) -> None:
        """A file's content, or the range of it that was asked for."""
        headers |= {"ETag": f'"{etag(path)}"', "Accept-Ranges": "bytes"}
        content = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        drop = self.hub.drops.pop(path.name, None) if self.command == "GET" else None
        if part is None:
            self.reply(200, content, headers, drop)
            return
        start = int(part[1])
        stop = min(len(content), int(part[2]) + 1 if part[2] else len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.reply(206, content[start:stop], headers, drop)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"", {"X-Error-Code": code} if code else {})

    def reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        drop: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0 if self.command == "HEAD" else len(body[:drop])
        token, part = self.headers.get("Authorization"), self.headers.get("Range")
        self.hub.requests.append(Request(self.command, unquote(self.path), sent, token, part))
        if sent:
            self.wfile.write(body[:drop])
        if drop is not None:
            self.close_connection = True


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def large(path: Path) -> dict[str, Any]:
    """What a listing says of a file in LFS."""
    data = path.read_bytes()
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}


@contextmanager
def serving(hub: Hub, handles: type[Handler] = Handler) -> Iterator[None]:
    """Answer for a hub. Each test has its own: downloads may go on for a while after an error."""
    handler = type("BoundHandler", (handles,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.daemon_threads = True
        hub.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            http.shutdown()
            thread.join()


@contextmanager
def opened(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handles: type[Handler] = Handler
) -> Iterator[None]:
    """Have a hub answer as this process's own, with an empty cache and nobody logged in."""
    with serving(hub, handles):
        point_to(hub, tmp_path, monkeypatch)
        huggingface_hub.close_session()
        try:
            yield
        finally:
            huggingface_hub.close_session()


def point_to(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what huggingface_hub read from the environment when it was imported."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)


def variables(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a program that asks a hub, with an empty cache; `more` is set as well."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return kept | own | {"NO_PROXY": "127.0.0.1,localhost"} | more
