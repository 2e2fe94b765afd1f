"""What `mkdocs` needs to make a site of docs/: the pages outside of it, and the navigation.

mkdocs.yml names this file as a hook. The navigation is that of README.md's lists. A page that
README.md does not link comes after the page that links it first, so nothing is to be edited for a
new page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Pages of the site that are not in docs/.
OUTSIDE = {"index.md": ROOT / "README.md", "changes.md": ROOT / "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
# The headings of lists of pages in README.md, as "By task:" on a line of its own.
_HEADING = re.compile(r"^(\w[\w ]*):\n\n(?=- )", re.MULTILINE)


def readme() -> str:
    """The text of README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def navigation() -> list[dict[str, Any]]:
    """The navigation, as in mkdocs.yml: the lists of README.md, with the pages that they link."""
    parts = _HEADING.split(readme())
    lists = [text.partition("\n## ")[0] for text in parts[2::2]]
    seen = {page for text in lists for page in _pages(text, "docs/")}
    nav: list[dict[str, Any]] = [{"Start": "index.md"}]
    for heading, text in zip(parts[1::2], lists, strict=True):
        pages: list[str] = []
        for page in _pages(text, "docs/"):
            pages += [page, *_only_linked_by(page, seen)]
        nav.append({heading: pages})
    return [*nav, {"Changes": "changes.md"}]


def _pages(text: str, folder: str) -> list[str]:
    """The pages of docs/ that a text links, each once; `folder` is what their links begin with."""
    names = re.findall(rf"\]\({folder}([\w-]+\.md)", text)
    return [name for name in dict.fromkeys(names) if (DOCS / name).is_file()]


def _only_linked_by(page: str, seen: set[str]) -> Iterator[str]:
    """The pages that this one links and that are not in `seen`, which grows; and theirs."""
    for name in _pages((DOCS / page).read_text(encoding="utf-8"), ""):
        if name not in seen:
            seen.add(name)
            yield name
            yield from _only_linked_by(name, seen)


def relinked(text: str, page: Path) -> str:
    """A page's text with links as they are on the site.

    What is neither in docs/ nor in `OUTSIDE` is not on the site, so its link becomes text.

    Args:
        text: the page's Markdown.
        page: its file.
    """

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        name, mark, heading = target.partition("#")
        if "://" in target or not name:
            return found[0]
        there = (page.parent / name).resolve()
        for own, file in OUTSIDE.items():
            if there == file:
                return f"[{label}]({own}{mark}{heading})"
        if there.is_relative_to(DOCS):
            return f"[{label}]({there.relative_to(DOCS).as_posix()}{mark}{heading})"
        return label

    blocks = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(_LINK.sub(link, part) if i % 2 == 0 else part for i, part in enumerate(blocks))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs first: sets the navigation."""
    config.nav = navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of docs/: adds the pages outside."""
    from mkdocs.structure.files import File

    for name, file in OUTSIDE.items():
        files.append(File.generated(config, name, content=file.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs with each page's text: sets its links."""
    name = page.file.src_uri
    return relinked(markdown, OUTSIDE.get(name, DOCS / name))
