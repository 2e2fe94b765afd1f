"""The page, in a browser: what it shows, keeps and sends, and whom it shuts out."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from tests.browser import STORY, Visit, answered, expect, piece, visiting
from tests.serving import Running, running

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef"


def slowly(tier: Path, seconds: float) -> Any:
    """The tier, each step of which takes some time."""
    model, tokenizer = outlier_mlx.load(tier)
    kind = type(model)

    def call(self: Any, *given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return kind.__call__(self, *given, **named)

    object.__setattr__(model, "__class__", type("Slow", (kind,), {"__call__": call}))
    return model, tokenizer


@pytest.fixture(scope="module")
def served_slowly(demo: Path) -> Iterator[Running]:
    with running(partial(slowly, demo, 0.05), max_tokens=100) as server:
        yield server


def test_an_answer(visit: Visit) -> None:
    """Its text is that of the API; its numbers stand below; it is read out when it is complete."""
    page = visit.open()
    expect(page.locator("#about")).to_contain_text("2 of 6 serve each token, and all are in memory")
    visit.ask(STORY)
    found = answered(page)
    expect(found.locator(".body")).to_contain_text("There was once a")
    numbers = r"[\d.]+ tokens/s · first token after \d+\.\d\d s · \d+ tokens"
    assert re.fullmatch(numbers, found.locator(".stats").inner_text())
    expect(page.locator("#spoken")).to_contain_text("answered: There was once a")
    expect(page.locator("#title")).to_have_text(STORY)
    visit.ask("And how do I find Vega?")
    answered(page, 2)
    assert page.locator(".message").count() == 4


def test_it_appears_as_it_is_generated_and_can_be_stopped(
    browser: Any, served_slowly: Running
) -> None:
    with visiting(browser, served_slowly) as visit:
        page = visit.open()
        visit.ask(STORY)
        text = page.locator(".assistant .body")
        expect(text).to_contain_text("There was")
        expect(page.locator("#send")).to_have_text("Stop")
        first = text.inner_text()
        expect(text).to_contain_text("duck")
        assert text.inner_text().startswith(first) and "sad again" not in text.inner_text()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .note")).to_have_text("Stopped.")
        expect(page.locator("#send")).to_have_text("Send")
        assert served_slowly.wait(lambda: not served_slowly.server.generator.replies)
        # What came is kept, and the conversation goes on.
        page.reload()
        expect(page.locator(".assistant .body")).to_contain_text("duck")
        visit.ask(STORY)
        expect(page.locator("#send")).to_have_text("Stop")
        page.click("#send")
        expect(page.locator(".note", has_text="Stopped.")).to_have_count(2)


def test_editing_and_asking_again(visit: Visit) -> None:
    bodies = visit.answers(piece("one"), piece(" two", finish_reason="stop"))
    page = visit.open()
    for text in ("first", "second"):
        visit.ask(text)
        answered(page)
    expect(page.locator(".message")).to_have_count(4)
    # An answer is corrected, and the rest stays.
    page.locator(".assistant").first.get_by_role("button", name="Edit").click()
    page.keyboard.type(", better")
    page.locator(".assistant").first.get_by_role("button", name="Save").click()
    expect(page.locator(".assistant .body").first).to_have_text("one two, better")
    page.locator(".assistant").last.get_by_role("button", name="Retry").click()
    answered(page, 2)
    expect(page.locator("#notice")).to_contain_text("The earlier answer was removed.")
    said = [message["content"] for message in bodies[-1]["messages"]]
    assert said == ["first", "one two, better", "second"]
    # A question is changed: what came after it goes, and comes back.
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Text of the message").fill("another")
    page.get_by_role("button", name="Save and ask").click()
    expect(page.locator(".message")).to_have_count(2)
    answered(page)
    assert bodies[-1]["messages"] == [{"role": "user", "content": "another"}]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message")).to_have_count(4)


def test_conversations_stay(visit: Visit, tmp_path: Path) -> None:
    visit.answers(piece("An answer", finish_reason="stop"))
    page = visit.open()
    for text in ("first", "second"):
        page.click("#new")
        visit.ask(text)
        answered(page)
    page.reload()
    expect(page.locator("#messages")).to_contain_text("second")
    expect(page.locator("#conversations li")).to_have_count(2)
    page.locator("#conversations .open", has_text="first").click()
    expect(page.locator("#messages")).to_contain_text("first")
    page.get_by_role("button", name="Rename first").click()
    page.keyboard.type("Soups")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Soups")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert {one["title"] for one in kept["conversations"]} == {"Soups", "second"}
    page.get_by_role("button", name="Delete Soups").click()
    page.locator("#question").get_by_role("button", name="Cancel").click()
    expect(page.locator("#conversations li")).to_have_count(2)
    page.get_by_role("button", name="Delete Soups").click()
    page.locator("#question").get_by_role("button", name="Delete").click()
    expect(page.locator("#conversations li")).to_have_count(1)
    page.set_input_files("#file", tmp_path / "kept.json")
    expect(page.locator("#conversations li")).to_have_count(3)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(3)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"conversations": [{"messages": [{"role": "system"}]}]}', '{"conversations": 3}'],
)
def test_files_that_are_no_conversations(visit: Visit, tmp_path: Path, text: str) -> None:
    page = visit.open()
    (tmp_path / "x.json").write_text(text)
    page.set_input_files("#file", tmp_path / "x.json")
    expect(page.locator("#notice")).to_contain_text("x.json cannot be imported")
    expect(page.locator("#conversations li")).to_have_count(0)


def test_settings(visit: Visit) -> None:
    bodies = visit.answers(piece("An answer", finish_reason="length"))
    page = visit.open()
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("Answer in verse.")
    for label, value in (
        ("Temperature", "0.7"),
        ("Top p", "0.9"),
        ("Most tokens", "50"),
        ("Seed", "3"),
    ):
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Done").click()
    visit.ask("first")
    found = answered(page)
    expect(found.locator(".note")).to_contain_text("as many tokens as allowed")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Answer in verse."}
    asked = {name: bodies[0][name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert asked == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "seed": 3}
    page.click("#new")
    page.click("#open-settings")
    expect(page.get_by_label("Seed")).to_have_value("3")
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Done").click()
    visit.ask("second")
    answered(page)
    assert "seed" not in bodies[1]


def test_the_key(browser: Any, demo: Path) -> None:
    with (
        running(demo, api_key=KEY, max_tokens=20) as server,
        visiting(browser, server) as visit,
    ):
        addresses: list[str] = []
        visit.page.on("request", lambda request: addresses.append(request.url))
        page = visit.open_with_question()
        expect(page.locator("#question")).to_contain_text("API key")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#question")).to_contain_text("not the key")
        expect(page.locator("#question input")).to_have_attribute("type", "password")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        visit.ask(STORY)
        answered(page)
        page.reload()
        page.wait_for_selector("body[data-ready]")
        expect(page.locator("#question")).not_to_be_visible()
        assert not any(KEY in address for address in [*addresses, page.url])
        assert not any(KEY in line for line in server.log)
        assert KEY not in visit.run("kept"), "it is kept beyond the session"
        # Another tab is another session.
        other = visit.context.new_page()
        other.goto(visit.url)
        expect(other.locator("#question")).to_contain_text("API key")


def test_a_key_that_is_wanted_later(visit: Visit) -> None:
    """As after the server was started again with another key: the message is not lost."""
    bodies: list[Any] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.headers.get("authorization"))
        if bodies[-1] is None:
            route.fulfill(
                status=401, json={"error": {"message": "the API key is missing or wrong"}}
            )
        else:
            events = json.dumps(piece("An answer", finish_reason="stop"))
            route.fulfill(
                content_type="text/event-stream", body=f"data: {events}\n\ndata: [DONE]\n\n"
            )

    visit.page.route("**/v1/chat/completions", answer)
    page = visit.open()
    visit.ask("first")
    expect(page.locator("#question")).to_contain_text("API key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(answered(page).locator(".body")).to_have_text("An answer")
    assert bodies == [None, f"Bearer {KEY}"]
    expect(page.locator(".message")).to_have_count(2)


def test_a_server_that_is_gone(visit: Visit) -> None:
    visit.page.route("**/v1/models", lambda route: route.abort())
    page = visit.open()
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached")


def test_errors_are_told(visit: Visit) -> None:
    page = visit.open()
    visit.answers(piece("half an"), {"error": {"message": "generation failed; try again"}})
    visit.ask("x")
    expect(page.locator(".assistant .note")).to_contain_text("generation failed; try again")
    expect(page.locator(".assistant .body")).to_have_text("half an")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .note")).to_contain_text("There is no complete answer")
