"""Code blocks of the documentation, and a place where they run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from outlier_mlx.cli.showcase import FOLDER
from tests.program import ROOT, Result, run_command

# A repository of the hub stands for the folder that it would be fetched to.
STAND_INS = {"Qwen/Qwen2.5-7B-Instruct": "./base"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found


def blocks_in(language: str, page: str) -> list[str]:
    """Text of the code blocks of a page in a language."""
    return [text for name, text in blocks(page) if name == language]


def commands(page: str) -> list[str]:
    """What a page tells its reader to type, but for setting up and for what needs a GPU."""
    lines = [line.strip() for _, text in blocks(page) for line in text.splitlines()]
    return [
        line
        for line in lines
        if line.startswith(("outlier-mlx", "mlx_lm.")) and "--save" not in line
    ]


def prepare(folder: Path) -> None:
    """What pages take as given: the demo pair as `my-overlay` and `base`, a text, and data."""
    shutil.copytree(FOLDER / "overlay", folder / "my-overlay")
    shutil.copytree(FOLDER / "base", folder / "base")
    text = (FOLDER / "heldout" / "sea.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": document}) + "\n" for document in text.splitlines()]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(lines[2:]), encoding="utf-8")
    (folder / "data" / "valid.jsonl").write_text("".join(lines[:2]), encoding="utf-8")


def variables(**more: str) -> dict[str, str]:
    """An environment in which this checkout's programs come first; `more` variables are set."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | more


def run_block(language: str, text: str, folder: Path, **more: str) -> Result:
    """Run a block to its end, without a terminal; `more` variables are set."""
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    return run_command(*shell, text, cwd=folder, env=variables(**more), timeout=300)
