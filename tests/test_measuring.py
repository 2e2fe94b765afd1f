"""The commands perplexity, routing and tune-alpha, and `generate --alpha`."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import outlier_mlx
from outlier_mlx.cli import app
from tests.builders import write_overlay


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring")
    overlay = write_overlay(folder / "overlay", tokenizer=True, expert_intermediate=64)
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log " * 16)
    return outlier_mlx.convert(overlay.path, out=folder / "tier")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_perplexity(tier: Path) -> None:
    text = tier.parent / "text.txt"
    command = ["perplexity", tier, "--text", text, "--window", 32, "--windows", 2]
    shown = run(*command, "--against", tier)
    assert shown.exit_code == 0, shown.output
    assert "KL divergence: 0.00000" in shown.stdout
    assert "same likeliest token: 100.00 %" in shown.stdout
    found = json.loads(run(*command, "--json").stdout)
    assert found["tokens"] == 62
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_routing(tier: Path, tmp_path: Path) -> None:
    command = ["routing", tier, "--text", tier.parent / "text.txt", "--windows", 1, "--window", 16]
    shown = run(*command, "--out", tmp_path / "routing")
    assert shown.exit_code == 0, shown.output
    assert "entropy" in shown.stdout
    written = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert [layer["layer"] for layer in written] == [1, 3]
    assert (tmp_path / "routing" / "routing.png").stat().st_size > 1000
    assert json.loads(run(*command, "--json").stdout) == written


def test_tuned_alphas_are_what_generate_takes(tier: Path, tmp_path: Path) -> None:
    out = tmp_path / "alpha.json"
    command = ["tune-alpha", tier, "--text", tier.parent / "text.txt", "--window", 24]
    shown = run(*command, "--out", out, "--learning-rate", 0.1, "--epochs", 1, "--windows", 10)
    assert shown.exit_code == 0, shown.output
    before, after = (float(line.split(": ")[1]) for line in shown.stdout.splitlines()[:2])
    assert after < before
    (tmp_path / "zero.json").write_text('{"1": [0, 0, 0, 0], "3": [0, 0, 0, 0]}')
    generate = ["generate", "--model", tier, "-p", "the cat", "-m", 12, "--quiet"]
    texts = {
        name: run(*generate, *options).stdout
        for name, options in {
            "own": [],
            "tuned": ["--alpha", out],
            "zero": ["--alpha", tmp_path / "zero.json"],
        }.items()
    }
    assert texts["own"] != texts["zero"]
    assert all(texts.values())
    again = run(*command, "--out", out)
    assert again.exit_code == 1
    assert "--force replaces it" in again.stderr or "did not get better" in again.stderr


def test_a_missing_text_is_a_usage_error(tier: Path) -> None:
    missing = run("perplexity", tier, "--text", tier / "nowhere.txt")
    assert missing.exit_code == 2
    assert "nowhere.txt" in missing.stderr


@pytest.mark.parametrize("command", ["perplexity", "routing", "tune-alpha"])
def test_a_text_in_another_encoding(tier: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("caf\xe9".encode("latin-1"))
    done = run(command, tier, "--text", text)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].endswith(
        "latin.txt: not UTF-8 text: byte 3 is no part of it"
    )
