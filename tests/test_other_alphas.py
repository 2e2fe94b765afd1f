"""`--alpha` of chat and serve, as generate has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.measure.alphas import alphas_of
from tests.builders import write_overlay
from tests.engine import tier_of
from tests.program import Result, run

ZERO = {"1": {"0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0}}


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier beside a `zero.json`."""
    folder = tmp_path_factory.mktemp("alphas")
    built = write_overlay(folder / "overlay", layers=2, moe_layers=(1,), seed=8)
    (folder / "zero.json").write_text(json.dumps(ZERO))
    return tier_of(built.path, None, folder / "tier")


def chat(tier: Path, *options: object, code: int = 0) -> Result:
    command = ["chat", "--model", tier, "-m", 8, "--temp", 0, *options]
    return run(*command, code=code, input="Hello there\n")


def test_chat_and_its_caches_know_their_alphas(tier: Path, tmp_path: Path) -> None:
    zero, kept = tier.parent / "zero.json", tmp_path / "kept.safetensors"
    base = chat(tier, "--alpha", zero, "--prompt-cache", kept)
    assert base.out != chat(tier).out
    other = chat(tier, "--prompt-cache", kept, code=1)
    assert "the cache belongs to another model" in other.err
    chat(tier, "--alpha", zero, "--prompt-cache", kept)


def test_serve_loads_with_them(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr("outlier_mlx.serve.serve", lambda name, load, *_, **__: loads.append(load))
    command = ["serve", "--model", str(tier), "--alpha", str(tier.parent / "zero.json")]
    run(*command)
    model, _ = loads.pop()()
    assert alphas_of(model) == ZERO


def test_alphas_that_do_not_suit(tier: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"9": {"0": 1.0}}')
    for path in (tmp_path / "bad.json", tmp_path / "none.json"):
        done = chat(tier, "--alpha", path, code=1)
        assert path.name in done.err
        assert len(done.err.splitlines()) == 1
