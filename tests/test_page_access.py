"""The page for everybody, in a browser: by keyboard, on a phone, in the dark, read out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser import PHONE, STORY, WIDE, Visit, answered, expect, piece, visiting
from tests.serving import Running

pytestmark = pytest.mark.slow


def test_by_keyboard_alone(visit: Visit) -> None:
    """Ask, look at the settings, edit, and open another conversation, without a pointer."""
    visit.answers(piece("An answer", finish_reason="stop"))
    page = visit.open()
    press, focused = page.keyboard.press, page.locator(":focus")
    expect(focused).to_have_id("message")
    page.keyboard.type("first")
    press("Shift+Enter")
    page.keyboard.type("line two")
    press("Enter")
    answered(page)
    expect(page.locator(".user .body")).to_have_text("first\nline two")
    expect(focused).to_have_id("message")

    def go(name: str, key: str = "Shift+Tab") -> None:
        for _ in range(40):
            told = focused.get_attribute("aria-label") or focused.inner_text()
            if told.startswith(name):
                return
            press(key)
            if page.evaluate("() => document.activeElement !== document.body"):
                outline = page.evaluate(
                    "() => getComputedStyle(document.activeElement).outlineStyle"
                )
                assert outline == "solid", focused.evaluate("e => e.outerHTML")
        raise AssertionError(f"{name} cannot be reached")

    go("Edit")
    press("Enter")
    expect(focused).to_have_attribute("aria-label", "Text of the message")
    press("Escape")
    expect(focused).to_have_text("Edit")
    go("Settings")
    press("Enter")
    page.keyboard.type("Be brief.")
    press("Escape")
    expect(focused).to_have_id("open-settings")
    go("New conversation")
    press("Enter")
    expect(page.locator(".message")).to_have_count(0)
    expect(focused).to_have_id("message")
    go("first")
    press("Enter")
    expect(page.locator(".message")).to_have_count(2)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_everybody_can_use_it(
    browser: Any, served_demo: Running, theme: str, size: dict[str, int]
) -> None:
    """Controls have names, text has contrast, and nothing is wider than the window."""
    options = {"viewport": size, "color_scheme": theme, "has_touch": size is PHONE}
    with visiting(browser, served_demo, **options) as visit:
        visit.answers(
            piece(delta={"reasoning": "Hm."}),
            piece(f"# Head\n`code`\n```\n{'wide ' * 60}\n```\n{'long' * 60}\n", **experts()),
            piece("- end", finish_reason="length"),
        )
        page = visit.open()
        check(visit)
        page.fill("#message", f"{'question' * 30} {STORY}")
        page.click("#send")
        found = answered(page)
        found.get_by_text("Reasoning").click()
        check(visit)
        found.get_by_role("button", name="Experts").click()
        expect(found.get_by_role("listbox")).to_be_visible()
        found.get_by_text("In words").click()
        check(visit)
        found.get_by_role("button", name="Edit").click()
        check(visit)
        for opener in ("#open-settings", "#open-side"):
            if size is WIDE and opener == "#open-side":
                continue
            page.click(opener)
            check(visit)
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Conversations").click()


def check(visit: Visit) -> None:
    assert visit.run("nameless") == []
    assert visit.run("faint", 4.5) == []
    assert not visit.run("scrollsSideways")
    assert visit.run("tiny") == []


def experts(count: int = 6) -> dict[str, Any]:
    """What a tier of three layers tells of four tokens."""
    places = ("memory", "disk", "early", "skipped")
    tokens = [
        {
            "text": text,
            "experts": [
                [
                    [(n + layer) % count, 0.7, places[(n + layer) % 4]],
                    [(n + 3) % count, 0.3, "memory"],
                ]
                for layer in range(3)
            ],
        }
        for n, text in enumerate(("Pe", "el", " thr", "\n"))
    ]
    return {"outlier": {"experts": tokens}}


def test_the_theme_is_chosen(browser: Any, served_demo: Running) -> None:
    with visiting(browser, served_demo, color_scheme="dark") as visit:
        page = visit.open()

        def ground() -> float:
            return float(sum(visit.run("background_of_page")))

        assert ground() < 150
        page.get_by_role("button", name="Theme").click()
        assert ground() > 600
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert ground() > 600
        page.get_by_role("button", name="Theme: light").click()
        assert ground() < 150
        page.get_by_role("button", name="Theme: dark").click()
        page.emulate_media(color_scheme="light")
        assert ground() > 600
