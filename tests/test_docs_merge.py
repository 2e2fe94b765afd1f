"""The page about merging: its YAML is sound, and its commands run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outlier_mlx.merge.merge_config import GATE_MODES, read_merge_config
from tests.merging import prompts, write_dense
from tests.pages import ROOT, blocks_in, run_block

PAGE = "docs/merge.md"
MODELS = ("chat-7b", "code-7b", "story-7b", "math-7b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's merge configurations, and what they name: small models, and texts."""
    for seed, name in enumerate(MODELS):
        write_dense(tmp_path / name, "mistral", seed=seed, hidden=64)
    for topic, name in enumerate(("code.txt", "stories.txt", "math.txt")):
        (tmp_path / name).write_text("\n".join(prompts(topic, 5, seed=0)))
    for text in blocks_in("yaml", PAGE):
        found = re.match(r"# ([\w-]+\.yaml)", text)
        assert found is not None
        (tmp_path / found[1]).write_text(text)
    return tmp_path


def test_configurations(folder: Path) -> None:
    merge_config = read_merge_config(folder / "merge.yaml")
    assert [Path(expert.source).name for expert in merge_config.experts] == list(MODELS)
    assert merge_config.with_held_out(folder / "held-out.yaml").held_out
    assert read_merge_config(folder / "trained.yaml").held_out
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(f"`{mode}`" in page for mode in GATE_MODES)


@pytest.mark.slow
def test_commands(folder: Path) -> None:
    commands = [line for text in blocks_in("sh", PAGE) for line in text.splitlines()]
    assert len(commands) == 7
    for command in commands:
        run_block("sh", command, folder)
