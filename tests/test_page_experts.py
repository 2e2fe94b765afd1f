"""The experts of each token, on the page in a browser."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.paging.budget import ExpertMemory
from tests.browser import PHONE, STORY, Visit, answered, expect, piece, visiting
from tests.library import Library
from tests.serving import Running, running

pytestmark = pytest.mark.slow


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
        visit.ask(STORY)
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


def test_only_the_conversation_scrolls(browser: Any, demo: Path) -> None:
    """Hidden captions of the tables below an answer do not make the page itself longer."""
    load = partial(outlier_mlx.load, demo)
    with (
        running(load, max_tokens=60) as server,
        visiting(browser, server, viewport=PHONE) as visit,
    ):
        page = visit.open()
        visit.ask(STORY)
        found = answered(page)
        found.get_by_role("button", name="Experts").click()
        expect(found.get_by_role("option").first).to_be_attached()
        assert page.evaluate("document.documentElement.scrollHeight") == PHONE["height"]
