"""Code blocks of the documentation, and what runs them as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.program import ROOT, Result, run_command


def user_pages() -> list[str]:
    """The pages of tasks, in the README's order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tasks = text.partition("By task:")[2].partition("To look up:")[0]
    return re.findall(r"\]\((docs/\w+\.md)\)", tasks)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found


def blocks_in(language: str, page: str) -> list[str]:
    """Text of the code blocks of a page in a language."""
    return [text for name, text in blocks(page) if name == language]


def run_block(language: str, text: str, folder: Path, environment: dict[str, str]) -> Result:
    """Run a block to its end, without a terminal."""
    shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    return run_command(*shell, text, cwd=folder, env=environment, timeout=300)


def table(page: str, heading: str) -> dict[str, str]:
    """The first two columns of the table below a heading of a page's text."""
    below = page.partition(f"\n{heading}\n")[2].partition("\n\n|")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in below.splitlines()[2:]]
    return {name.strip("`"): values for name, values, *_ in cells}
