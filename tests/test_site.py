"""The documentation as a site: all pages, without warnings, and with nothing from elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.program import ROOT, load_script, run_command

docs_site = load_script("docs_site")

DOCS = {file.name for file in (ROOT / "docs").glob("*.md")}


def in_navigation() -> list[str]:
    """The pages in the order of the navigation."""
    found: list[str] = []
    for entry in docs_site.navigation():
        for pages in entry.values():
            found += [pages] if isinstance(pages, str) else pages
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    pages = in_navigation()
    assert pages[0] == "index.md" and len(pages) == len(set(pages))
    missing = DOCS - set(pages)
    assert not missing, f"no page links {missing}: link it in README.md, or on a page of docs/"
    assert set(pages) - DOCS == set(docs_site.OUTSIDE)


def test_the_navigation_is_by_task_as_in_the_readme() -> None:
    headings = [next(iter(entry)) for entry in docs_site.navigation()]
    assert headings == ["Start", "By task", "To look up", "Changes"]
    pages = in_navigation()
    assert pages.index("convert.md") < pages.index("run.md") < pages.index("tier-format.md")


def test_links_on_the_site() -> None:
    docs = ROOT / "docs"
    for page, text, expected in (
        (ROOT / "README.md", "[a](docs/run.md#x) [b](LICENSE)", "[a](run.md#x) b"),
        (docs / "run.md", "[a](../README.md#more) [b](#x)", "[a](index.md#more) [b](#x)"),
        (ROOT / "README.md", "[a](CHANGELOG.md)", "[a](changes.md)"),
        (docs / "run.md", "[a](memory.md) [b](https://x.org)", "[a](memory.md) [b](https://x.org)"),
        (docs / "run.md", "[a](../kernels/several.py) ![b](page.png)", "a ![b](page.png)"),
        (docs / "run.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ):
        assert docs_site.relinked(text, page) == expected


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """A warning ends `mkdocs build --strict`, as of a page or heading that a link does not find."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    run_command(*command, cwd=ROOT)
    for name in {*DOCS, "changes.md"}:
        assert (site / name.removesuffix(".md") / "index.html").is_file()
    for file in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"?(https?:|//)", file.read_text()
        )
        assert not loaded, file
    for file in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", file.read_text()), file
    assert "Outlier models on Apple silicon" in (site / "index.html").read_text()
