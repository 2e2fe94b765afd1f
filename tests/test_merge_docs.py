"""The page about merging: its recipes are sound, and its commands run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outlier_mlx.merge.recipe import GATE_MODES, read_recipe
from tests.merging import prompts, write_dense

PAGE = (Path(__file__).parents[1] / "docs" / "merge.md").read_text(encoding="utf-8")
MODELS = ("chat-7b", "code-7b", "story-7b", "math-7b")


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's recipes, and what they name: small models, and texts."""
    for seed, name in enumerate(MODELS):
        write_dense(tmp_path / name, "mistral", seed=seed, hidden=64)
    for topic, name in enumerate(("code.txt", "stories.txt", "math.txt")):
        (tmp_path / name).write_text("\n".join(prompts(topic, 5, seed=0)))
    for text in blocks("yaml"):
        found = re.match(r"# ([\w-]+\.yaml)", text)
        assert found is not None
        (tmp_path / found[1]).write_text(text)
    return tmp_path


def test_recipes(folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.yaml")
    assert [Path(expert.source).name for expert in recipe.experts] == list(MODELS)
    assert recipe.with_held_out(folder / "held-out.yaml").held_out
    assert read_recipe(folder / "trained.yaml").held_out
    assert all(f"`{mode}`" in PAGE for mode in GATE_MODES)


@pytest.mark.slow
def test_commands(folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = [line for text in blocks("sh") for line in text.splitlines()]
    assert len(commands) == 7
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
