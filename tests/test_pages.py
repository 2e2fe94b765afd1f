"""The pages that tell a user what to type: every command runs as it stands there.

The pages of tasks are read in the README's order, in one folder, which is empty at first. The
programs are those that a wheel installs. A local stand-in answers for the hub.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.merge.merge_config import GATE_MODES
from outlier_mlx.storage.safetensors import read_header
from tests import hub as hubs
from tests.hub_uploads import WritableHandler, WritableHub
from tests.pages import blocks, blocks_in, run_block, user_pages
from tests.preloaded import preloaded
from tests.program import ROOT, run_command

# These change the user's own programs, or need a clone or a GPU.
LEFT_OUT = ("uv tool install", "pip install", "scripts/", "--save")
SERVES = "outlier-mlx serve"


@dataclass
class Reader:
    """Someone who types what a page says, in a folder of their own."""

    folder: Path
    hub: WritableHub
    environment: dict[str, str]

    def read(self, page: str) -> str:
        """Run a page's commands and its Python; all that they print on stdout."""
        printed = ""
        for language, text in blocks(page):
            if name := re.match(r"# ([\w-]+\.yaml)", text):
                (self.folder / name[1]).write_text(text, encoding="utf-8")
            if language in ("sh", "python") and not any(word in text for word in LEFT_OUT):
                printed += self.run(language, text)
        return printed

    def run(self, language: str, text: str) -> str:
        """Run a block in the folder; what it prints on stdout."""
        return run_block(language, text, self.folder, self.environment).out

    def json(self, name: str) -> object:
        """The value in a file of the folder."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Whose programs start as an installed wheel's do."""
    made = tmp_path_factory.mktemp("wheel")
    run_command(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", made, cwd=ROOT)
    (wheel,) = made.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run_command(*pip, "--target", made / "site", wheel)
    hub = WritableHub(store=tmp_path_factory.mktemp("store"), user="my-name")
    with hubs.serving(hub, WritableHandler):
        programs = [made / "site" / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        environment = hubs.variables(
            hub,
            tmp_path_factory.mktemp("home"),
            HF_TOKEN=hub.token,
            PATH=os.pathsep.join(map(str, programs)),
            PYTHONPATH=str(made / "site"),
        )
        reader = Reader(tmp_path_factory.mktemp("reader"), hub, environment)
        where = reader.run("python", "import outlier_mlx; print(outlier_mlx.__file__)")
        assert Path(where.strip()).is_relative_to(made)
        yield reader


@pytest.fixture(scope="module")
def reader(newcomer: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Whose commands have imported what they need; each of a hundred would take a second for it."""
    program = Path(newcomer.run("sh", "command -v outlier-mlx").strip())
    folder = tmp_path_factory.mktemp("preloaded")
    with preloaded(program, folder, newcomer.environment) as environment:
        yield Reader(newcomer.folder, newcomer.hub, environment)


@pytest.mark.slow
def test_readme(newcomer: Reader, tmp_path: Path) -> None:
    Reader(tmp_path, newcomer.hub, newcomer.environment).read("README.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", user_pages())
def test_page(reader: Reader, page: str) -> None:
    name = Path(page).stem
    if name == "hub":
        for repository in ("my-overlay", "base"):
            reader.hub.add(f"my-name/{repository}", reader.folder / repository)
    serves = any(text.startswith(SERVES) for _, text in blocks(page))
    printed = serve(reader, page) if serves else reader.read(page)
    if check := CHECKS.get(name):
        check(reader, printed)


def convert(reader: Reader, printed: str) -> None:
    assert "my-tier: whole: " in printed
    assert inspect(reader.folder / "best-tier").form == "tq1_0_strided"
    assert inspect(reader.folder / "my-portable").form == "ernie4_5_moe"
    packed = outlier_mlx.open_overlay(reader.folder / "my-packed").experts
    for layer, experts in outlier_mlx.open_overlay(reader.folder / "my-export").experts.items():
        assert len(packed[layer]) == len(experts)
    assert (reader.folder / "my-experts" / "experts.gguf").exists()
    assert inspect(reader.folder / "my-gguf").architecture == "step35"
    assert "Q4_0" in inspect(reader.folder / "my-q4-gguf").form
    assert inspect(reader.folder / "my-hf").architecture == "qwen2_moe"
    one, other = (weights(reader.folder / tier) for tier in ("my-tier-again", "my-tier"))
    assert one.read_bytes() == other.read_bytes()


def streamed(reader: Reader, printed: str) -> None:
    one, other = (weights(reader.folder / tier) for tier in ("streamed", "my-tier"))
    assert one.read_bytes() == other.read_bytes()


def weights(folder: Path) -> Path:
    """The file of a model that has one file of weights."""
    (file,) = folder.glob("*.safetensors")
    return file


def merged(reader: Reader, printed: str) -> None:
    page = (ROOT / "docs/merge.md").read_text(encoding="utf-8")
    assert all(f"`{mode}`" in page for mode in GATE_MODES)
    assert "salt" in printed or "oven" in printed or "minutes" in printed


def ran(reader: Reader, printed: str) -> None:
    assert len(printed) > 200 and (reader.folder / "reply.txt").stat().st_size > 20


def chatted(reader: Reader, printed: str) -> None:
    assert (reader.folder / "replies.txt").read_text(encoding="utf-8").count("\n") >= 2


def evaluated(reader: Reader, printed: str) -> None:
    assert (reader.folder / "scores.png").stat().st_size > 1000
    files = re.findall(r"--out (\S+\.json)", "".join(blocks_in("sh", "docs/evaluate.md")))
    assert len(files) == 2
    tier, base = (
        {(row["task"], row["metric"]): row["value"] for row in found["results"]}
        for found in map(reader.json, files)
        if isinstance(found, dict)
    )
    assert tier["ending_new", "acc"] > base["ending_new", "acc"]
    assert tier["text_new", "bits_per_byte"] < base["text_new", "bits_per_byte"]
    assert "ending_new, acc (higher is better)" in printed and '"capitals"' in printed


def outliers(reader: Reader, printed: str) -> None:
    """What the page says of the demo's models, and every field and file that it lists."""
    found, more = reader.json("found/outliers.json"), reader.json("more/outliers.json")
    assert isinstance(found, list) and isinstance(more, list)
    assert all(model["blog"]["unique_dims"] for model in found)
    text = (ROOT / "docs/outliers.md").read_text(encoding="utf-8")
    fields = re.search(r"## The fields.*?\n\n(.*?)\n\n", text, re.DOTALL)
    assert fields is not None
    for row in fields[1].splitlines()[2:]:
        for field in re.findall(r"`([\w.]+)`", row.split("|")[1]):
            entry = more[0]
            for name in field.split("."):
                entry = entry[name]
    for file in re.findall(r"`([\w-]+\.(?:json|png))`", text):
        assert (reader.folder / "found" / file.replace("MODEL", "my-tier")).exists(), file


def tuned(reader: Reader, printed: str) -> None:
    new, own = weights(reader.folder / "tuned"), weights(reader.folder / "my-tier")
    names = [name for name in read_header(own) if name.endswith("mlp.alpha")]
    assert names
    for name in names:
        assert (read_header(new)[name].read() != read_header(own)[name].read()).any()


def upcycled(reader: Reader, printed: str) -> None:
    rows = [line.split() for line in printed.splitlines() if line.endswith("%")]
    assert [row[0] for row in rows] == ["kitchen", "sea", "keep"]
    assert all(float(after) < float(before) for _, before, after, _ in rows[:2])
    assert inspect(reader.folder / "my-own").kind == "overlay"
    assert (reader.folder / "my-own.svg").stat().st_size > 1000
    assert not (reader.folder / "planned").exists()
    page = (ROOT / "docs/upcycle.md").read_text(encoding="utf-8")
    log = (reader.folder / ".my-own.training" / "log.jsonl").read_text(encoding="utf-8")
    told = {key for line in log.splitlines() for key in json.loads(line)}
    # Two are of no use to a program that follows a run.
    assert {key for key in told if f"`{key}`" not in page} <= {"losses", "alpha_factor"}


def ternary(reader: Reader, printed: str) -> None:
    assert "ternary: 15 of 15 quantized matrices" in printed
    assert "back: the same" in printed and "back-rotated: the same" in printed
    assert "KL divergence: 0.00000 nats" in printed


def shared(reader: Reader, printed: str) -> None:
    head = reader.hub.head("my-name/my-tier")
    assert list(head.glob("*.safetensors"))
    card = (head / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "## Scores" in card
    assert "## Perplexity" in card and "`sea.txt`" in card
    measured = (reader.folder / "my-tier" / "measured.json").read_bytes()
    assert (head / "measured.json").read_bytes() == measured


def replayed(reader: Reader, printed: str) -> None:
    assert (reader.folder / "mixed.png").stat().st_size > 1000
    assert "Tokens/s at most on Apple M4 Pro, 273 GB/s, disk 5 GB/s" in printed


CHECKS = {
    "convert": convert,
    "memory": replayed,
    "hub": streamed,
    "merge": merged,
    "run": ran,
    "chat": chatted,
    "evaluate": evaluated,
    "outliers": outliers,
    "tune": tuned,
    "upcycle": upcycled,
    "share": shared,
    "ternary": ternary,
}


def serve(reader: Reader, page: str) -> str:
    """Run a page with one server at a time, each until the next or the end; what clients print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server: subprocess.Popen[bytes] | None = None
    printed = ""
    try:
        for language, text in blocks(page):
            if SERVES in text:
                stop(server)
                server = start(reader, f"{text.rstrip()} --port {port}", port)
            elif language in ("sh", "python"):
                answer = reader.run(language, text.replace("8080", port))
                assert answer and "error" not in answer
                printed += answer
    finally:
        stop(server)
    return printed


def start(reader: Reader, text: str, port: str) -> subprocess.Popen[bytes]:
    """Start a block that serves; it listens when this returns."""
    server = subprocess.Popen(
        ["bash", "-euc", text], cwd=reader.folder, env=reader.environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", int(port))).close()
            return server
        except ConnectionRefusedError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)


def stop(server: subprocess.Popen[bytes] | None) -> None:
    if server is not None:
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(20) == 0
