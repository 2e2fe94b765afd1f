"""A draft model of the server: for what is generated alone, loaded and counted with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import mlx.nn as nn
import pytest

import outlier_mlx
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.drafting.draft_model import ModelDrafts
from outlier_mlx.engine.drafting.gate import Costs
from outlier_mlx.engine.limits import keep_to
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.memory import DRAFT_STEP, draft_nbytes
from outlier_mlx.engine.needs import Use, needs_of
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.capacity import find_capacity
from tests.folders import copy_writable
from tests.library import Library
from tests.memory import at_rest
from tests.plain_models import SIZES, make_model
from tests.program import assert_refused, run
from tests.serving import MESSAGES, NAME, Running, running

BASE = FOLDER / "base"
STATES = SIZES | {
    "model_type": "falcon_h1",
    "mamba_d_state": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "head_dim": 16,
}
ENDLESS = {"0": -100, "2": -100}
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}


@pytest.fixture(scope="module")
def demo(library: Library) -> Path:
    return library.demo_tier("q4")


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts as if they cost nothing, so that they are always tried."""
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)


@pytest.fixture(scope="module")
def wide(library: Library) -> Path:
    """A tier with heads of 32 values, which can share a scale."""
    return library.tier(library.overlay(layers=2, moe_layers=(1,), heads=2, kv_heads=1))


def load_base() -> Any:
    return outlier_mlx.load(BASE)[0]


def similar(tier: Path) -> Callable[[], Any]:
    """A function that loads a model which mostly writes what a tier writes."""

    def load() -> Any:
        model = outlier_mlx.load(tier)[0]
        norm = model.model.norm
        key = mx.random.key(0)
        norm.weight = norm.weight * (1 + 0.2 * mx.random.normal(norm.weight.shape, key=key))
        return model

    return load


def accepted(answer: Any) -> int:
    details = answer.usage.completion_tokens_details
    return details.accepted_prediction_tokens if details else 0


def ask(served: Running, **how: Any) -> Any:
    create: Any = served.client.completions.create
    return create(model=NAME, prompt="How do I find Vega?", **{"max_tokens": 24} | how)


@pytest.mark.parametrize("options", [{}, QUANTIZED], ids=["plain", "quantized"])
def test_the_text_is_the_same(wide: Path, options: dict[str, Any], free_drafts: None) -> None:
    asked: list[dict[str, Any]] = [
        {"logit_bias": ENDLESS},
        {"temperature": 1.0, "seed": 4},
        {"logprobs": 2},
    ]
    with running(wide, prompt_lookup=False, **options) as served:
        plain = [ask(served, **how) for how in asked]
    with running(wide, load_draft=similar(wide), num_draft_tokens=4, **options) as served:
        ours = [ask(served, **how) for how in asked]
    assert [each.choices[0].text for each in ours] == [each.choices[0].text for each in plain]
    assert accepted(ours[0]) > 0
    assert ours[0].usage.completion_tokens_details.rejected_prediction_tokens > 0
    assert [accepted(each) for each in plain] == [0, 0, 0]


def test_each_api_tells_of_drafts(small_tier: Path, free_drafts: None) -> None:
    """Their clients read what is theirs, and keep the rest."""
    wanted = {"messages": MESSAGES, "max_tokens": 24}
    with running(small_tier, load_draft=similar(small_tier)) as served:
        url = served.server.url.removesuffix("/v1")
        claude = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
        chat = served.chat(max_tokens=24).usage
        chunks = served.chat(max_tokens=24, stream=True, stream_options={"include_usage": True})
        *_, last = chunks
        create: Any = served.client.responses.create
        response = create(model=NAME, input=MESSAGES, max_output_tokens=24).usage
        ask_claude: Any = claude.messages.create
        message = ask_claude(model=NAME, **wanted).usage
        stream: Any = claude.messages.stream
        with stream(model=NAME, **wanted) as events:
            streamed = events.get_final_message().usage
        (model,) = served.client.models.list().data
    found = [
        *(usage.completion_tokens_details for usage in (chat, last.usage)),
        *(usage.output_tokens_details for usage in (response, message, streamed)),
    ]
    told = [(d.accepted_prediction_tokens, d.rejected_prediction_tokens) for d in found]
    assert told == told[:1] * 5
    right, wrong = told[0]
    assert right > 0 and wrong > 0
    # A step gives one token besides those of its draft.
    steps = chat.completion_tokens - right
    drafts = {"steps": 5 * steps, "drafted": 5 * (right + wrong), "accepted": 5 * right}
    assert model.outlier["drafts"] == drafts


@pytest.mark.slow
def test_experts_are_paged_beside_it(demo: Path, free_drafts: None) -> None:
    load = partial(outlier_mlx.load, demo, expert_memory="50%")
    with running(demo, prompt_lookup=False) as served:
        plain = ask(served).choices[0].text
    with running(load, load_draft=load_base) as served:
        ours = ask(served)
    assert ours.choices[0].text == plain
    assert accepted(ours) > 0


@pytest.mark.slow
def test_drafts_go_on_where_they_were_after_a_batch(
    small_tier: Path, free_drafts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request comes and goes; the draft model does not read the first one's text again."""
    made: list[ModelDrafts] = []
    read: list[int] = []
    new, begin, some = Drafting.new, ModelDrafts.begin, ModelDrafts._read

    def note_new(self: Drafting, cache: Any) -> Any:
        made.append(new(self, cache))  # type: ignore[arg-type]
        return made[-1]

    def note_begin(self: ModelDrafts, tokens: Any) -> None:
        begin(self, tokens)
        begun.append((self, len(tokens), self._cached))

    def note_read(self: ModelDrafts, tokens: list[int]) -> None:
        read.append(len(tokens))
        some(self, tokens)

    begun: list[tuple[ModelDrafts, int, int]] = []
    monkeypatch.setattr(Drafting, "new", note_new)
    monkeypatch.setattr(ModelDrafts, "begin", note_begin)
    monkeypatch.setattr(ModelDrafts, "_read", note_read)
    long: dict[str, Any] = {"max_tokens": 300, "logit_bias": ENDLESS}
    with running(small_tier, prompt_lookup=False) as served:
        plain = ask(served, **long).choices[0].text
    assert not begun
    made.clear()
    with running(small_tier, load_draft=similar(small_tier)) as served:
        chunks = ask(served, stream=True, stream_options={"include_usage": True}, **long)
        text = next(chunks).choices[0].text
        ask(served, max_tokens=3)
        rest = list(chunks)
    assert text + "".join(chunk.choices[0].text for chunk in rest if chunk.choices) == plain
    assert accepted(rest[-1]) > 0
    mine = [(tokens, cached) for drafts, tokens, cached in begun if drafts is made[0]]
    assert len(mine) == 2
    (prompt, none), (later, cached) = mine
    assert none == 0 < prompt < cached <= later
    assert sum(read) < later


def test_a_long_text_is_read_in_slices() -> None:
    """No step waits for all of it; then drafts begin."""
    model = make_model(SIZES | {"model_type": "llama"})
    costs = Costs()
    for _ in range(3):
        costs.note(1, 1.0)
    drafts = ModelDrafts(model, costs, 3, 300)
    drafts.begin([n % 200 for n in range(2 * DRAFT_STEP + 100)])
    for step, count in enumerate((DRAFT_STEP, 2 * DRAFT_STEP, 2 * DRAFT_STEP + 102)):
        assert drafts.draft(7, 100) == []
        assert drafts._cached == count
        drafts.note([7], 0)
        assert drafts.ready(), step
    assert len(drafts.draft(7, 100)) == 3
    drafts.note([7, 8], 3)
    assert drafts._cached == 2 * DRAFT_STEP + 105


def test_a_window_that_is_full_ends_drafts() -> None:
    """What it drafts there could not be taken back."""
    sizes = SIZES | {"head_dim": 16, "sliding_window_pattern": 2, "sliding_window": 16}
    model = make_model(sizes | {"model_type": "gemma3_text", "num_hidden_layers": 3})
    costs = Costs()
    for _ in range(3):
        costs.note(1, 1.0)
    for length, drafted in ((3, 3), (9, 3), (13, 1), (15, 0), (40, 0)):
        drafts = ModelDrafts(model, costs, 3, 300)
        drafts.begin(list(range(1, length)))
        found = []
        for token in (5, 6, 7):
            found = drafts.draft(token, 100)
            drafts.note([token], len(found))
            if found:
                break
        assert len(found) == drafted, length


@pytest.mark.slow
def test_it_is_unloaded_and_loaded_again_with_the_model(
    small_tier: Path, free_drafts: None
) -> None:
    before = at_rest()
    both = 2 * needs_of(small_tier, on_cpu=True).weights
    with running(small_tier, load_draft=similar(small_tier), idle_unload=1 / 60) as served:
        first = ask(served)
        assert mx.get_active_memory() >= before + both
        assert served.wait(lambda: served.server.generator.provider.state == "unloaded")
        assert mx.get_active_memory() <= before + both / 20
        again = ask(served)
    assert again.choices[0].text == first.choices[0].text
    assert accepted(again) == accepted(first) > 0


@pytest.mark.parametrize("whose", ["the model's", "its own"])
def test_a_cache_that_cannot_go_back_is_refused_at_once(demo: Path, whose: str) -> None:
    def load_draft() -> nn.Module:
        return make_model(STATES)

    def load() -> Any:
        return make_model(STATES), outlier_mlx.load(demo)[1]

    served: Callable[[], Any] = partial(running, demo, load_draft=load_draft)
    if whose == "the model's":
        served = partial(running, load, load_draft=load_base)
    with pytest.raises(OutlierError, match=f"--draft-model: {whose} cache cannot"), served():
        pass


def test_the_command(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "outlier_mlx.serve.serve",
        lambda name, load, options, say, **more: given.append((options, more)),
    )
    run("serve", demo, "--draft-model", BASE, "--num-draft-tokens", "5")
    options, more = given[0]
    assert options.num_draft_tokens == 5
    assert more["note"].endswith("for the draft model base")
    assert isinstance(more["load_draft"](), nn.Module)
    base = copy_writable(BASE, tmp_path / "base")
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<|im_end|>"', '"<|end|>"'))
    refused = run("serve", demo, "--draft-model", base, code=1)
    assert_refused(refused, "--draft-model base: its tokenizer is not that of")
    assert len(given) == 1


def test_memory_is_planned_for_both(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 2000
    use = Use(tokens, step=64)
    one, two = (needs_of(folder, on_cpu=False) for folder in (demo, BASE))
    there_is = Budget(one.weights + two.weights + 300_000_000, "this Mac's GPU")
    alone, *_ = find_capacity(demo, use, available=there_is)
    capacity, _, planned = find_capacity(demo, use, available=there_is, draft=BASE)
    assert alone.cache_memory is not None and capacity.cache_memory is not None
    beside, _ = draft_nbytes(BASE, use, there_is)
    assert planned.beside.nbytes == beside > two.weights
    assert "for another model" in str(planned)
    assert planned.needed <= there_is.nbytes
    assert alone.cache_memory - capacity.cache_memory >= two.weights
    # Each conversation has a cache of both models.
    how: dict[str, Any] = {"draft": BASE}
    capacity, _, single = find_capacity(demo, use, 1, 1, available=there_is, **how)
    assert capacity.cache_memory is not None
    least = single.needed - capacity.cache_memory + one.cache(tokens) + two.cache(tokens)
    find_capacity(demo, use, 1, 1, available=replace(there_is, nbytes=least), **how)
    for nbytes in (least - 1, least // 2):
        with pytest.raises(OutlierError, match=f"{demo.name} and base need"):
            find_capacity(demo, use, 1, 1, available=replace(there_is, nbytes=nbytes), **how)
    # What is loaded before the model is not counted twice.
    wired: list[int] = []
    monkeypatch.setattr("outlier_mlx.engine.limits.gpu_limit", lambda: there_is.nbytes)
    monkeypatch.setattr("outlier_mlx.engine.limits._bound_wiring", wired.append)
    monkeypatch.setattr(mx, "set_cache_limit", lambda nbytes: nbytes)
    monkeypatch.setattr(mx, "get_active_memory", lambda: beside // 2)
    keep_to(planned)
    assert wired == [planned.needed]


def test_requests_take_memory_for_both_caches(small_tier: Path, wide: Path) -> None:
    with running(small_tier, cache_memory=10**9) as served:
        alone = served.server.generator.provider.memory.tokens
    load_draft = similar(wide)
    with running(small_tier, cache_memory=10**9, load_draft=load_draft) as served:
        both = served.server.generator.provider.memory.tokens
    one, two = (needs_of(folder, on_cpu=True).cache(10_000) for folder in (small_tier, wide))
    assert alone is not None and both is not None
    assert both == pytest.approx(alone * one / (one + two), rel=0.01)
