"""Every command in the documentation runs as it stands there."""

import re
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks, prepare, run_block

PAGES = ("README.md", "docs/measure.md", "docs/bench.md")


def commands(page: str) -> list[str]:
    """What a page tells its reader to type, but for setting up and for what needs a GPU."""
    lines = [line.strip() for _, text in blocks(page) for line in text.splitlines()]
    return [
        line
        for line in lines
        if line.startswith(("outlier-mlx", "mlx_lm.")) and "--save" not in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "overlay").symlink_to("my-overlay")
    listed = commands(page)
    assert listed
    for command in listed:
        run_block("sh", command, tmp_path)


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
