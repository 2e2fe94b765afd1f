"""The local stand-in for the hub, for those who write to it: repositories, LFS and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub import Handler, Hub, Repo

# What the hub keeps outside of git: by its usual .gitattributes, and whatever is large.
LARGE = re.compile(r".*\.(safetensors|bin)|tokenizer\.json")


@dataclass
class WritableHub(Hub):
    """A hub with one user, whose commits are folders under `store`.

    Attributes:
        store: where commits are kept.
        user: whose repositories can be written.
        token: the user's.
        objects: contents of large files by SHA-256.
        part: large files of more bytes are taken in parts of so many.
        refuse: status and message by a word in an endpoint's path.
        written: method and path of each request that could change something.
        sent: bytes that came in as contents, by path in the repository or SHA-256.
        messages: of all commits.
        parts: parts of large files by SHA-256 and number.
    """

    store: Path = Path()
    user: str = "owner"
    token: str = "hf_" + "w" * 34
    objects: dict[str, bytes] = field(default_factory=dict)
    part: int = 1 << 40
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def create(self, name: str, *, private: bool) -> None:
        """A repository as it is when just made."""
        commit = hashlib.sha1(name.encode()).hexdigest()
        folder = self.store / commit
        folder.mkdir()
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.repos[name] = Repo({commit: folder}, {"main": commit})
        if private:
            self.private.add(name)

    def head(self, name: str, branch: str = "main") -> Path:
        """The folder of a branch's last commit."""
        repo = self.repos[name]
        return repo.commits[repo.refs[branch]]

    def put(self, name: str, file: str, content: bytes) -> None:
        """Let somebody else add a file to the main branch."""
        self.commit(name, "main", {file: content}, set(), file)

    def commit(
        self, name: str, branch: str, added: dict[str, bytes], removed: set[str], message: str
    ) -> str:
        """Add a commit; its name."""
        repo = self.repos[name]
        commit = hashlib.sha1(f"{name} {len(repo.commits)} {message}".encode()).hexdigest()
        folder = shutil.copytree(self.head(name, branch), self.store / commit)
        for file in removed:
            (folder / file).unlink()
        for file, content in added.items():
            (folder / file).write_bytes(content)
        repo.commits[commit] = folder
        repo.refs[branch] = commit
        self.messages.append(message)
        return commit


class WritableHandler(Handler):
    """The endpoints that huggingface_hub uses to make repositories and to commit."""

    hub: WritableHub

    def describe(self, name: str, what: str | None, revision: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        files = sorted(path for path in self.hub.repos[name].commits[commit].iterdir())
        if what == "tree":
            self.answer_json([listed(path) for path in files])
            return
        siblings = [{"rfilename": path.name} for path in files]
        private = name in self.hub.private
        self.answer_json({"id": name, "sha": commit, "private": private, "siblings": siblings})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.written.append(f"POST {path}")
        token = self.headers.get("Authorization")
        refusal = next((r for word, r in self.hub.refuse.items() if word in path), None)
        if self.hub.down:
            self.reply(503, b"down for maintenance")
        elif refusal is not None:
            errors = {"errors": [{"message": refusal[1]}], "warnings": []}
            self.reply(refusal[0], json.dumps(errors).encode(), {"X-Error-Message": refusal[1]})
        elif path.startswith("/complete/"):
            self.complete(path, json.loads(body))
        elif path.startswith("/verify/"):
            asked = json.loads(body)
            assert len(self.hub.objects[asked["oid"]]) == asked["size"]
            self.answer_json({})
        elif token != f"Bearer {self.hub.token}":
            self.reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/validate-yaml":
            self.answer_json({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/]+)", path):
            name, action, branch = match.groups()
            if not name.startswith(f"{self.hub.user}/"):
                self.reply(403, b"", {"X-Error-Message": "not yours"})
            else:
                {
                    "preupload": self.preupload,
                    "commit": self.take_commit,
                    "branch": self.branch,
                }[action](name, branch, body)
        else:
            self.refuse(404, "")

    def do_PUT(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.written.append(f"PUT {path}")
        # Storage is asked by signed address alone: a token must not get there.
        assert self.headers.get("Authorization") is None
        _, _, oid, number = path.split("/")
        self.hub.sent[oid] = self.hub.sent.get(oid, 0) + len(body)
        if int(number):
            self.hub.parts[oid, int(number)] = body
        else:
            self.hub.objects[oid] = body
        self.reply(200, b"", {"ETag": f'"{oid}-{number}"'})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.hub.user:
            self.reply(403, b"", {"X-Error-Message": f"no rights in {asked['organization']}"})
        elif name in self.hub.repos:
            self.reply(409, b"")
        else:
            self.hub.create(name, private=asked.get("visibility") == "private")
            self.answer_json({"url": f"{self.hub.url}/{name}"})

    def preupload(self, name: str, branch: str, body: bytes) -> None:
        folder = self.hub.head(name, branch)
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if LARGE.fullmatch(file["path"]) else "regular"
            path = folder / file["path"]
            oid = None
            if path.exists():
                entry = listed(path)
                oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer_json({"files": answers})

    def batch(self, asked: dict[str, Any]) -> None:
        answers = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                answer["actions"] = {
                    "upload": self.where_to(oid, size),
                    "verify": {"href": f"{self.hub.url}/verify/{oid}"},
                }
            answers.append(answer)
        self.answer_json({"transfer": "basic", "objects": answers})

    def where_to(self, oid: str, size: int) -> dict[str, Any]:
        """Where a large file goes: to one address, or to one a part."""
        signed = f"{self.hub.url}/storage/{oid}/{{}}?signature=secret"
        if size <= self.hub.part:
            return {"href": signed.format(0)}
        parts = {f"{n + 1:05}": signed.format(n + 1) for n in range(-(-size // self.hub.part))}
        return {
            "href": f"{self.hub.url}/complete/{oid}?signature=secret",
            "header": {"chunk_size": str(self.hub.part), **parts},
        }

    def complete(self, path: str, asked: dict[str, Any]) -> None:
        oid = path.split("/")[2]
        numbers = [part["partNumber"] for part in asked["parts"]]
        self.hub.objects[oid] = b"".join(self.hub.parts[oid, n] for n in numbers)
        self.answer_json({})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        repo.refs[branch] = json.loads(body).get("startingPoint") or repo.refs["main"]
        self.answer_json({})

    def take_commit(self, name: str, branch: str, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        assert header["key"] == "header"
        if header["value"].get("parentCommit") != self.hub.repos[name].refs[branch]:
            self.reply(412, b"", {"X-Error-Message": "the branch has moved"})
            return
        added: dict[str, bytes] = {}
        removed = set()
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "deletedFile":
                removed.add(value["path"])
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
                self.hub.sent[value["path"]] = len(added[value["path"]])
            else:
                assert key == "lfsFile"
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                added[value["path"]] = content
        commit = self.hub.commit(name, branch, added, removed, header["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.answer_json({"commitUrl": url, "commitOid": commit})

    def answer_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def listed(path: Path) -> dict[str, Any]:
    """A file as the hub lists it: by git's name of it, and by SHA-256 if it is a large one."""
    content = path.read_bytes()
    if not LARGE.fullmatch(path.name):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path.name, "size": len(content), "oid": oid}
    digest = hashlib.sha256(content).hexdigest()
    return {
        "type": "file",
        "path": path.name,
        "size": len(content),
        "oid": hashlib.sha1(digest.encode()).hexdigest(),  # of the pointer: any other than git's
        "lfs": {"oid": digest, "size": len(content), "pointerSize": 134},
    }
