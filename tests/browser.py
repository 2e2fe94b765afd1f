"""Chromium without a window, for tests of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Running

NAMES = ("chromium", "chromium-browser", "google-chrome")
STORY = "Tell me a story about a duck."
WIDE, PHONE = {"width": 1200, "height": 800}, {"width": 360, "height": 640}
# What a browser logs by itself when a request is refused, or is not answered.
EXPECTED = "Failed to load resource"

SCRIPTS = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped if there is none, but not where tests have to be complete."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing: `scripts/test --full` installs it as root")
        pytest.skip("no Chromium here: install the package chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A page that is open in a browser of its own, with nothing kept from others.

    Attributes:
        page: Playwright's.
        console: what was logged that is worse than a refused request; `tests` look that it is
            empty: a violation of the content security policy is logged, for example.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.console: list[str] = []
        self.url = url
        self.context = browser.new_context(
            **{"viewport": WIDE, "reduced_motion": "reduce"} | options
        )
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda told: self._note(told.type, told.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith(EXPECTED):
            self.console.append(text)

    def open(self) -> Any:
        self.page.goto(self.url)
        self.page.wait_for_selector("body[data-ready]")
        return self.page

    def open_with_question(self) -> Any:
        """Open it where it asks for a key before it is ready."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#question[open]")
        return self.page

    def answers(self, *chunks: dict[str, Any]) -> list[dict[str, Any]]:
        """Let the page get these chunks for each message; returns the bodies that it sends."""
        bodies: list[dict[str, Any]] = []
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]

        def answer(route: Any) -> None:
            bodies.append(route.request.post_data_json)
            route.fulfill(
                status=200,
                content_type="text/event-stream",
                body="".join([*events, "data: [DONE]\n\n"]),
            )

        self.page.route("**/v1/chat/completions", answer)
        return bodies

    def ask(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def run(self, name: str, *given: Any) -> Any:
        """Call a function of `browser.js` in the page."""
        return self.page.evaluate(f"(given) => {{ {SCRIPTS}; return {name}(...given); }}", given)


def piece(text: str = "", **more: Any) -> dict[str, Any]:
    """A chunk of an answer."""
    delta = {"role": "assistant", "content": text} | more.pop("delta", {})
    finish = more.pop("finish_reason", None)
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more


@contextmanager
def visiting(browser: Any, server: Running, **options: Any) -> Iterator[Visit]:
    """A visit, in which nothing is logged that should not be."""
    made = Visit(browser, server.server.page_url, **options)
    yield made
    made.context.close()
    assert made.console == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as expecting

    return expecting(locator)


def answered(page: Any, number: int = 1) -> Any:
    """The element of the answer of this number, once it is complete."""
    found = page.locator(".assistant").nth(number - 1)
    expect(found.locator(".stats")).to_contain_text("token")
    expect(page.locator("#send")).to_have_text("Send")
    return found
