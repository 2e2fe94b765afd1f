"""The commands perplexity, routing and tune, and `generate --alpha`."""

import json
import math
from pathlib import Path

import pytest

from outlier_mlx.engine.machine import Budget
from tests.library import Library
from tests.program import assert_refused, run


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.place(expert_intermediate=64) / "tier"


def test_perplexity(tier: Path, text: Path) -> None:
    command = ["perplexity", tier, "--text", text, "--window", 32, "--windows", 2]
    shown = run(*command, "--against", tier)
    assert "KL divergence: 0.00000" in shown.out
    assert "same likeliest token: 100.00 %" in shown.out
    found = run(*command, "--json").json
    assert found["tokens"] == 62
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_routing(tier: Path, text: Path, tmp_path: Path) -> None:
    command = ["routing", tier, "--text", text, "--windows", 1, "--window", 16]
    shown = run(*command, "--out", tmp_path / "routing")
    assert "entropy" in shown.out
    written = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert [layer["layer"] for layer in written] == [1, 3]
    assert (tmp_path / "routing" / "routing.png").stat().st_size > 1000
    assert run(*command, "--json").json == written


def test_tuned_alphas_are_what_generate_takes(tier: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "alpha.json"
    command = ["tune", tier, "--text", text, "--window", 24, "--parts", "alphas"]
    shown = run(*command, "--out", out, "--learning-rate", 0.1, "--epochs", 1, "--windows", 10)
    before, after = (float(line.split(": ")[1]) for line in shown.out.splitlines()[:2])
    assert after < before
    (tmp_path / "zero.json").write_text('{"1": [0, 0, 0, 0], "3": [0, 0, 0, 0]}')
    generate = ["generate", "--model", tier, "-p", "the cat", "-m", 12, "--quiet"]
    texts = {
        name: run(*generate, *options).out
        for name, options in {
            "own": [],
            "tuned": ["--alpha", out],
            "zero": ["--alpha", tmp_path / "zero.json"],
        }.items()
    }
    assert texts["own"] != texts["zero"]
    assert all(texts.values())
    again = run(*command, "--out", out, code=1)
    assert "--force replaces it" in again.err or "did not get better" in again.err


def test_a_missing_text_is_a_usage_error(tier: Path) -> None:
    missing = run("perplexity", tier, "--text", tier / "nowhere.txt", code=2)
    assert "nowhere.txt" in missing.err


@pytest.mark.parametrize("command", ["perplexity", "routing", "tune"])
def test_a_text_in_another_encoding(tier: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("caf\xe9".encode("latin-1"))
    done = run(command, tier, "--text", text, code=1)
    assert done.out == ""
    assert done.err.splitlines()[-1].endswith("latin.txt: not UTF-8 text: byte 3 is no part of it")


@pytest.mark.parametrize("command", ["perplexity", "routing", "tune"])
def test_revision_and_memory_are_checked_before_a_model_is_loaded(
    command: str, tier: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: tuple = (command, tier, "--text", text, "--window", 16, "--windows", 5)
    if command == "tune":
        given += ("--epochs", 1, "--out", tmp_path / "out")
    assert_refused(run(*given, "--revision", "main", code=1), "a folder has no revision")
    monkeypatch.setattr("outlier_mlx.engine.memory.budget", lambda: Budget(1000, "a small machine"))
    assert_refused(run(*given, code=1), "a small machine gives 1.0 kB")
    # Tuning that improves nothing ends with exit code 1, after it has shown perplexities.
    shown = run(*given, "--ignore-memory", "--dtype", "float32", code=None)
    assert "perplexity" in shown.out or "entropy" in shown.out
