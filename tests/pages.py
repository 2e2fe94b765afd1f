"""Code blocks of the documentation, and a place where they run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from outlier_mlx.cli.showcase import FOLDER

ROOT = Path(__file__).parents[1]
# A repository of the hub stands for the folder that it would be fetched to.
STAND_INS = {"Qwen/Qwen2.5-7B-Instruct": "./base"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found


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


def variables() -> dict[str, str]:
    """An environment in which this checkout's programs come first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run_block(language: str, text: str, folder: Path) -> str:
    """Run a block to its end, without a terminal; what it prints."""
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*shell, text],
        cwd=folder,
        env=variables(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout
