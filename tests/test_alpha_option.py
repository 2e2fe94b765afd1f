"""`--alpha` of chat and serve, as generate has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import alphas_of
from tests.library import Library
from tests.program import Result, assert_refused, run

ZERO = {"1": {"0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0}}


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.tier(library.overlay(layers=2, moe_layers=(1,), seed=8))


@pytest.fixture
def zero(tmp_path: Path) -> Path:
    """A file of alphas that are 0."""
    (tmp_path / "zero.json").write_text(json.dumps(ZERO))
    return tmp_path / "zero.json"


def chat(tier: Path, *options: object, code: int = 0) -> Result:
    command = ["chat", "--model", tier, "-m", 8, "--temp", 0, *options]
    return run(*command, code=code, input="Hello there\n")


def test_chat_and_its_caches_know_their_alphas(tier: Path, zero: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    base = chat(tier, "--alpha", zero, "--prompt-cache", kept)
    assert base.out != chat(tier).out
    other = chat(tier, "--prompt-cache", kept, code=1)
    assert "the cache belongs to another model" in other.err
    chat(tier, "--alpha", zero, "--prompt-cache", kept)


def test_serve_loads_with_them(tier: Path, zero: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr("outlier_mlx.serve.serve", lambda name, load, *_, **__: loads.append(load))
    command = ["serve", "--model", str(tier), "--alpha", zero]
    run(*command)
    model, _ = loads.pop()()
    assert alphas_of(model) == ZERO


def test_alphas_that_do_not_suit(tier: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"9": {"0": 1.0}}')
    for path in (tmp_path / "bad.json", tmp_path / "none.json"):
        assert_refused(chat(tier, "--alpha", path, code=1), path.name)
