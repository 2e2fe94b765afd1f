"""Text on the page, in a browser: whatever a model or a user writes stays text, in its form."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Visit, answered, expect, piece, visiting
from tests.scripted import Script
from tests.serving import running

pytestmark = pytest.mark.slow

HOSTILE = (
    "<img src=x onerror=alert(1)>\n\n<script>alert(2)</script>\n\n"
    "**bold <b>x</b>** and `code <i>` [link](javascript:alert(3))\n\n"
    '```html"onload=alert(4)\n<iframe src=javascript:alert(5)></iframe>\n```\n\n'
    "- item <svg onload=alert(6)>\n# <style>*{display:none}</style>"
)


def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    """As the model writes it, as the user writes it, and as a title."""
    tokens = "<b>", "bold", "</b>", "<script>alert(1)</script>"
    with (
        running(Script(tmp_path / "model", *tokens)) as server,
        visiting(browser, server) as visit,
    ):
        visit.page.on("dialog", lambda dialog: visit.console.append("a script ran"))
        page = visit.open()
        visit.ask("<img src=x onerror=alert(0)>")
        found = answered(page)
        expect(found.locator(".body")).to_have_text("<b>bold</b><script>alert(1)</script>")
        visit.answers(piece(HOSTILE, finish_reason="stop", delta={"reasoning": HOSTILE}))
        visit.ask(HOSTILE)
        found = answered(page, 2)
        found.locator("summary").click()
        for text in found.locator(".text").all():
            told = text.inner_text()
            assert "<img src=x onerror=alert(1)>" in told and "<script>alert(2)" in told
        names = "img, script, iframe, style, b, i, a, svg"
        assert page.locator("#messages").locator(names).count() == 0
        assert page.locator("#conversations").locator(names).count() == 0


@pytest.mark.parametrize(
    "text",
    [
        "".join("`" * (n % 90) + "a" for n in range(1500)),
        "**a " * 20_000,
        "~" * 60_000 + "`",
        "```" + "x" * 60_000 + "`",
        "# " * 30_000,
        "- " * 30_000,
        " " * 60_000 + "x",
        "1. a\n" * 5_000,
    ],
    ids=["ticks", "stars", "tildes", "fence", "heads", "items", "blanks", "lines"],
)
def test_no_text_keeps_the_page_busy(visit: Visit, text: str) -> None:
    visit.answers(piece(text), piece(" end", finish_reason="stop"))
    page = visit.open()
    begun = time.monotonic()
    visit.ask("x")
    expect(answered(page).locator(".body")).to_contain_text("end")
    assert time.monotonic() - begun < 6


def test_text_is_shown_in_its_form(visit: Visit) -> None:
    text = "A **b** `c`.\n\n- one\n- two\n\n3. three\n\n```py\nprint(1)\n\nx = 2\n```\n# Head\nrest"
    halves = [piece(text[n : n + 3]) for n in range(0, len(text), 3)]
    visit.answers(*halves, piece(finish_reason="stop"))
    page = visit.open()
    visit.ask("x")
    shown = answered(page).locator(".body")
    expect(shown.locator("pre code")).to_have_text("print(1)\n\nx = 2")
    expect(shown.locator("ul li")).to_have_count(2)
    expect(shown.locator("ol")).to_have_attribute("start", "3")
    expect(shown.locator("strong")).to_have_text("b")
    expect(shown.locator("h3")).to_have_text("Head")
    shown.get_by_role("button", name="Copy code").click()
    assert page.evaluate("() => navigator.clipboard.readText()") == "print(1)\n\nx = 2"
    answered(page).locator(".actions").get_by_role("button", name="Copy").click()
    assert page.evaluate("() => navigator.clipboard.readText()") == text


def test_copying_where_the_browser_does_not_trust_the_address(visit: Visit) -> None:
    """As at http://192.168.1.5, where a page has no clipboard of its own."""
    visit.page.add_init_script(
        "Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined})"
    )
    visit.answers(piece("An answer", finish_reason="stop"))
    page = visit.open()
    visit.ask("x")
    answered(page).get_by_role("button", name="Copy").click()
    page.focus("#message")
    page.keyboard.press("Control+V")
    expect(page.locator("#message")).to_have_value("An answer")


def test_reasoning_is_apart(visit: Visit) -> None:
    visit.answers(
        piece(delta={"reasoning": "Hm, let me think."}), piece("So it is.", finish_reason="stop")
    )
    page = visit.open()
    visit.ask("x")
    found = answered(page)
    expect(found.get_by_text("Hm, let me think.")).not_to_be_visible()
    found.get_by_text("Reasoning").click()
    expect(found.get_by_text("Hm, let me think.")).to_be_visible()
