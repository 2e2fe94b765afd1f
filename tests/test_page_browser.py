"""The page, in a browser: what it shows, keeps and sends, and whom it shuts out."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.paging.budget import ExpertMemory
from tests.browser import PHONE, WIDE, Visit, chromium, piece
from tests.library import Library
from tests.scripted import Script
from tests.serving import Running, running

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef"
SOUP = "How do I make a leek soup?"
HOSTILE = (
    "<img src=x onerror=alert(1)>\n\n<script>alert(2)</script>\n\n"
    "**bold <b>x</b>** and `code <i>` [link](javascript:alert(3))\n\n"
    '```html"onload=alert(4)\n<iframe src=javascript:alert(5)></iframe>\n```\n\n'
    "- item <svg onload=alert(6)>\n# <style>*{display:none}</style>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def demo(library: Library) -> Path:
    """A tier with six experts in each of three layers; a token uses two."""
    return library.demo_tier("q4")


@pytest.fixture(scope="module")
def served_demo(demo: Path) -> Iterator[Running]:
    with running(demo, max_tokens=100) as server:
        yield server


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


@pytest.fixture
def visit(browser: Any, served_demo: Running) -> Iterator[Visit]:
    with visiting(browser, served_demo) as made:
        yield made


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


def test_an_answer(visit: Visit) -> None:
    """Its text is that of the API; its numbers stand below; it is read out when it is complete."""
    page = visit.open()
    expect(page.locator("#about")).to_contain_text("2 of 6 serve each token, and all are in memory")
    visit.ask(SOUP)
    found = answered(page)
    expect(found.locator(".body")).to_contain_text("Peel three leeks")
    numbers = r"[\d.]+ tokens/s · first token after \d+\.\d\d s · \d+ tokens"
    assert re.fullmatch(numbers, found.locator(".stats").inner_text())
    expect(page.locator("#spoken")).to_contain_text("answered: Peel three leeks")
    expect(page.locator("#title")).to_have_text(SOUP)
    visit.ask("And how do I find Vega?")
    answered(page, 2)
    assert page.locator(".message").count() == 4


def test_it_appears_as_it_is_generated_and_can_be_stopped(
    browser: Any, served_slowly: Running
) -> None:
    with visiting(browser, served_slowly) as visit:
        page = visit.open()
        visit.ask(SOUP)
        text = page.locator(".assistant .body")
        expect(text).to_contain_text("Peel")
        expect(page.locator("#send")).to_have_text("Stop")
        first = text.inner_text()
        expect(text).to_contain_text("leeks")
        assert text.inner_text().startswith(first) and "thyme" not in text.inner_text()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .note")).to_have_text("Stopped.")
        expect(page.locator("#send")).to_have_text("Send")
        assert served_slowly.wait(lambda: not served_slowly.server.generator.replies)
        # What came is kept, and the conversation goes on.
        page.reload()
        expect(page.locator(".assistant .body")).to_contain_text("leeks")
        visit.ask(SOUP)
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
        visit.ask(SOUP)
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


def test_a_server_that_is_gone(visit: Visit) -> None:
    visit.page.route("**/v1/models", lambda route: route.abort())
    page = visit.open()
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached")


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


def shown_uses(found: Any) -> list[list[tuple[int, float, str]]]:
    """What the table says of the chosen token: for each layer, number, weight and place."""
    return [
        [
            (int(number), float(weight), place)
            for number, weight, place in zip(
                row.locator("b").all_inner_texts(),
                row.locator(".number").all_inner_texts(),
                row.locator(".from").all_inner_texts(),
                strict=True,
            )
        ]
        for row in found.locator(".uses tbody tr").all()
    ]


def test_the_experts_are_those_that_the_server_tells(browser: Any, demo: Path) -> None:
    """Token by token, with their weights and places, and counted in the map of all."""
    load = partial(outlier_mlx.load, demo, expert_memory=ExpertMemory(slots=7))
    with running(load, max_tokens=60) as server, visiting(browser, server) as visit:
        page = visit.open()
        expect(page.locator("#about")).to_contain_text("read from disk when they are needed")
        answers: list[str] = []

        def told(route: Any) -> None:
            response = route.fetch()
            answers.append(response.text())
            route.fulfill(response=response)

        page.route("**/v1/chat/completions", told)
        visit.ask(SOUP)
        found = answered(page)
        lines = answers[0].splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        tokens = [
            token for chunk in chunks for token in chunk.get("outlier", {"experts": []})["experts"]
        ]
        assert "".join(token["text"] for token in tokens) == found.locator(".body").inner_text()
        found.get_by_role("button", name="Experts").click()
        options = found.get_by_role("option")
        assert options.all_text_contents() == [token["text"] for token in tokens]
        places = {"memory": "memory", "early": "read ahead", "disk": "read from disk"}
        options.first.click()
        for number, token in enumerate(tokens):
            expected = [
                [(n, round(weight, 3), places[place]) for n, weight, place in layer]
                for layer in token["experts"]
            ]
            shown = shown_uses(found)
            assert [[use[::2] for use in layer] for layer in shown] == [
                [use[::2] for use in layer] for layer in expected
            ]
            weights = [[[use[1] for use in layer] for layer in uses] for uses in (shown, expected)]
            assert np.allclose(weights[0], weights[1], atol=0.0011)
            framed = found.locator(".framed")
            assert framed.count() == 6, number
            waited = any(place == "disk" for layer in token["experts"] for _, _, place in layer)
            assert ("waited" in (options.nth(number).get_attribute("class") or "")) is waited
            page.keyboard.press("ArrowRight")
        all_places = [use[2] for token in tokens for layer in token["experts"] for use in layer]
        share = round(100 * all_places.count("memory") / len(all_places))
        expect(found.locator(".sum")).to_contain_text(f"{share} % were in memory")
        counted = [[0] * 6 for _ in range(3)]
        for token in tokens:
            for layer, uses in enumerate(token["experts"]):
                for expert, _, _ in uses:
                    counted[layer][expert] += 1
        titles = [cell.get_attribute("title") for cell in found.locator(".heat td[title]").all()]
        assert titles == [
            f"expert {expert}: {count} of {len(tokens)} tokens"
            for row in counted
            for expert, count in enumerate(row)
        ]
        # They outlive a reload.
        page.reload()
        answered(page).get_by_role("button", name="Experts").click()
        expect(page.get_by_role("option")).to_have_count(len(tokens))


def test_experts_are_asked_for_only_where_there_are_some(
    browser: Any, served_demo: Running, library: Library, visit: Visit
) -> None:
    bodies = visit.answers(piece("An answer", finish_reason="stop"))
    page = visit.open()
    visit.ask("first")
    answered(page)
    page.click("#open-settings")
    page.get_by_label("Record which experts serve each token").uncheck()
    page.get_by_role("button", name="Done").click()
    visit.ask("second")
    answered(page, 2)
    assert [body.get("outlier") for body in bodies] == [{"experts": True}, None]
    with running(library.base().path) as server, visiting(browser, server) as other:
        bodies = other.answers(piece("An answer", finish_reason="stop"))
        other.open()
        other.ask("first")
        answered(other.page)
        assert "outlier" not in bodies[0]


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
        page.fill("#message", f"{'question' * 30} {SOUP}")
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
