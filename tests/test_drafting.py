"""What drafts: the text itself, or another model; and whether it pays."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.drafting.gate import ASSUMED, Costs, Gate
from outlier_mlx.engine.drafting.lookup import LONGEST_MATCH, Index, PromptLookup
from outlier_mlx.engine.generate import Options, generate_text
from tests.folders import copy_writable
from tests.program import ROOT, assert_refused, run, run_command
from tests.serving import NAME, running


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_the_longest_match(seed: int) -> None:
    draw = np.random.default_rng(seed)
    index, text = Index(), []
    for token in draw.integers(0, 4, 60).tolist():
        index.add(token)
        text.append(token)
        place, length = index.find()
        lengths = {
            end: next((n for n in range(end) if text[end - 1 - n] != text[len(text) - 1 - n]), end)
            for end in range(1, len(text))
        }
        ends = [end for end, n in lengths.items() if n >= 2][-8:]
        best = max((min(lengths[end], LONGEST_MATCH) for end in ends), default=0)
        assert length == best
        if best:
            assert place == max(end for end in ends if min(lengths[end], LONGEST_MATCH) == best)
            period = len(text) - place
            assert index.after(place, 9) == [text[place + n % period] for n in range(9)]


class Time:
    """A clock for steps that take as long as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: dict[int, float]) -> None:
        self.now, self.of = 0.0, of
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def write(self, text: Sequence[int], drafts: PromptLookup) -> tuple[int, float]:
        """Let `text` be what the model writes; returns drafted tokens and the time it took."""
        begun, place, drafted = self.now, 0, 0
        while place < len(text):
            draft: list[int] = []
            if drafts.ready():
                draft = drafts.draft(text[place], len(text) - place - 1)
            right = 0
            while right < len(draft) and draft[right] == text[place + 1 + right]:
                right += 1
            self.now += self.of[len(draft) + 1]
            drafts.note(text[place : place + right + 1], len(draft))
            place, drafted = place + right + 1, drafted + len(draft)
        return drafted, self.now - begun


def costs(each: float) -> dict[int, float]:
    return {width: 1 + each * (width - 1) for width in range(1, 9)}


def test_the_gate_turns_drafts_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    ordinary = draw.integers(0, 50, 400).tolist()
    piece = draw.integers(0, 50_000, 100).tolist()
    cheap, dear = costs(0.1), costs(1.0)
    clock, shared = Time(monkeypatch, dict(cheap)), Costs()
    drafts = PromptLookup(shared)
    drafts.begin(ordinary)
    # An ordinary text repeats pairs by chance, and no draft is tried.
    assert clock.write(draw.integers(0, 50, 400).tolist(), drafts) == (0, pytest.approx(400))
    clock.write(piece, drafts)
    # A text that repeats itself: far fewer steps.
    drafted, took = clock.write(piece * 4, drafts)
    assert drafted > 300
    assert took < 200
    # Where drafts cost as much as they save, a few are tried, and then hardly any.
    clock, shared = Time(monkeypatch, dict(dear)), Costs()
    drafts = PromptLookup(shared)
    drafts.begin(piece)
    clock.write(piece * 4, drafts)
    drafted, took = clock.write(piece * 10, drafts)
    assert drafted < 100
    assert took < 1060
    # And when they become cheap, they are turned on again.
    clock.of |= cheap
    clock.write(piece * 20, drafts)
    assert clock.write(piece * 4, drafts)[1] < 200


def test_costs_are_medians_of_what_was_measured() -> None:
    known = Costs()
    assert known.of(4) == math.inf
    for seconds in (9.0, 2.0, 2.0, 7.0):  # the first prepares
        known.note(1, seconds)
    assert known.of(4) == ASSUMED[4]
    for seconds in (50.0, 3.0, 5.0, 4.0):
        known.note(2, seconds)
    assert known.of(2) == 2
    assert known.of(3) == 2  # not less than that of fewer tokens
    assert known.of(1) == 1
    gate = Gate(known, [0.9])
    assert gate.expected(0, 2) == pytest.approx(0.9 + 0.81)
    for _ in range(50):
        gate.judge(0, 0, 3)
    assert gate.expected(0, 7) < 0.1
    assert not gate.pays(0)


@pytest.mark.parametrize("lookup", [True, False])
def test_generate_tells_of_drafts(
    demo: Path, lookup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)
    monkeypatch.setattr("outlier_mlx.engine.drafting.lookup.RATES", [0.9] * 6)
    options = ["--ignore-chat-template", "-m", 60] + ([] if lookup else ["--no-prompt-lookup"])
    told = run("generate", "--model", demo, "-p", "The old frog", *options).err
    found = re.search(r"tokens/s; (\d+) steps, (\d+) of (\d+) drafted tokens accepted\n", told)
    assert (found is not None) == lookup
    if found is not None:
        steps, accepted, drafted = map(int, found.groups())
        assert steps + accepted == 60
        assert 0 < accepted < drafted


@pytest.mark.slow
def test_the_server_tells_of_drafts(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that repeats itself, with drafts as if they cost nothing."""
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)
    monkeypatch.setattr("outlier_mlx.engine.drafting.lookup.RATES", [0.9] * 6)
    asked: dict[str, Any] = {"prompt": "The old frog", "max_tokens": 60}
    told = []
    for lookup in (True, False):
        with running(demo, prompt_lookup=lookup) as server:
            create: Any = server.client.completions.create
            answers = [
                create(model=NAME, **asked, **how) for how in ({}, {"temperature": 1.0, "seed": 4})
            ]
        details = [answer.usage.completion_tokens_details for answer in answers]
        told.append([answer.choices[0].text for answer in answers])
        if not lookup:
            assert details == [None, None]
            continue
        assert details[0] is not None
        assert details[0].accepted_prediction_tokens > 0
        assert details[0].rejected_prediction_tokens > 0
    assert told[0] == told[1]


@pytest.mark.slow
def test_a_draft_model(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = outlier_mlx.load(demo)
    draft_model, _ = outlier_mlx.load(FOLDER / "base")
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)
    for words in ("How do I find Vega?", "Tell me a story about a duck."):
        plain, ours = (
            list(generate_text(model, tokenizer, words, Options(max_tokens=30), drafting=drafting))
            for drafting in (
                Drafting(model, lookup=False),
                Drafting(model, draft_model=draft_model, num_draft_tokens=4),
            )
        )
        assert [r.token for r in ours] == [r.token for r in plain]
        assert ours[-1].counts.drafted > 0


def test_a_draft_model_has_the_same_tokens(demo: Path, tmp_path: Path) -> None:
    base = copy_writable(FOLDER / "base", tmp_path / "base")
    tokenizer = base / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"<|im_end|>"', '"<|end|>"'))
    command = ["generate", "--model", str(demo), "-p", "How?", "-m", "9"]
    refused = run(*command, "--draft-model", str(base), code=1)
    assert_refused(refused, "--draft-model base: its tokenizer is not that of")


@pytest.mark.slow
def test_the_benchmark_of_drafts() -> None:
    """Given texts are written whole, in fewer steps where they repeat themselves."""
    command = [sys.executable, ROOT / "scripts" / "bench_drafts.py", "--turns", 1, "--length", 60]
    lines = run_command(*command).out
    found = {
        line.split()[0]: [int(n) for n in re.findall(r"\d+", line)]
        for line in lines.split("\n")
        if line
    }
    assert list(found) == ["edit", "quotes", "ordinary", "random"]
    for tokens, steps, accepted, drafted, *_ in found.values():
        assert steps + accepted == tokens
        assert accepted <= drafted
