"""Several tokens in a step: the text is that of plain generation, whatever a draft says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

import outlier_mlx
from outlier_mlx.engine.conversation import Conversation
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.drafting.gate import Costs
from outlier_mlx.engine.generate import Options, generate_from_tokens, generate_text
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.sampling import GlobalSampler
from outlier_mlx.engine.steps import Chosen, Quantized, Steps, draft_room
from outlier_mlx.errors import OutlierError
from tests.drafters import Guesses

Loaded = tuple[Any, Any]
PROMPTS = [
    "How do I find Vega?",
    "Tell me a story about a duck.",
    "the cat sat on the mat, the cat sat on the",
    "1 2 3 4",
]
CACHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantized": {"quantized": Quantized(8, 32, 0)},
    "quantized on the way": {"quantized": Quantized(4, 32, 30)},
    "window": {"window": 100},
    "full window": {"window": 32},
}


@pytest.fixture(scope="module", params=["whole", pytest.param("paged", marks=pytest.mark.slow)])
def loaded(request: pytest.FixtureRequest, demo: Path) -> Loaded:
    memory = ExpertMemory(slots=7) if request.param == "paged" else None
    return outlier_mlx.load(demo, expert_memory=memory)


def begin(model: Any, prompt: Sequence[int], window: int | None = None, **how: Any) -> Steps:
    return Steps(model, prompt, cache=make_prompt_cache(model, window), **how)


def all_of(steps: Steps) -> list[Chosen]:
    found: list[Chosen] = []
    while steps.finish_reason is None:
        found += steps.step()
    return found


def ids(found: Sequence[Chosen]) -> list[int]:
    return [chosen.token for chosen in found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
def test_the_text_is_that_of_plain_generation(loaded: Loaded, kind: str) -> None:
    model, tokenizer = loaded
    accepted = drafted = 0
    for seed, words in enumerate(PROMPTS):
        prompt = tokenizer.encode(words)
        plain = all_of(begin(model, prompt, max_tokens=36, **CACHES[kind]))
        drafts = Guesses(ids(plain), seed)
        steps = begin(model, prompt, max_tokens=36, drafts=drafts, **CACHES[kind])
        found = all_of(steps)
        assert ids(found) == ids(plain)
        for ours, theirs in zip(found, plain, strict=True):
            assert mx.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert {entry.offset for entry in steps.cache} == {len(steps.tokens)}
        assert steps.tokens == prompt + ids(plain)
        assert drafts.given == ids(plain)
        assert sum(chosen.drafted for chosen in found) == steps.counts.accepted
        assert steps.counts.steps + steps.counts.accepted == 36
        accepted, drafted = accepted + steps.counts.accepted, drafted + steps.counts.drafted
    assert drafted > accepted > 20


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kv_bits": 8, "kv_group_size": 32}], ids=str)
def test_lookup_in_real_texts(
    loaded: Loaded, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts wherever a text repeats itself, as if they cost nothing."""
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)
    monkeypatch.setattr("outlier_mlx.engine.drafting.lookup.RATES", [0.9] * 6)
    model, tokenizer = loaded
    given = Options(max_tokens=40, quantized_kv_start=20, **options)
    drafted = 0
    for words in PROMPTS:
        tokens = tokenizer.encode(words)
        plain, ours = (
            list(generate_from_tokens(model, tokenizer, tokens, given, drafting=drafting))
            for drafting in (Drafting(model, lookup=False), None)
        )
        assert [r.token for r in ours] == [r.token for r in plain]
        assert "".join(r.text for r in ours) == "".join(r.text for r in plain)
        assert ours[-1].finish_reason == plain[-1].finish_reason
        drafted += ours[-1].counts.accepted
        assert plain[-1].counts.drafted == 0
    assert drafted > 0


def test_a_seeded_text_is_the_same(loaded: Loaded) -> None:
    """Accepted or not, a token uses the random numbers that it would have used alone."""
    model, tokenizer = loaded
    options = Options(max_tokens=40, temp=1.0, top_p=0.95, seed=6, ignore_chat_template=True)

    class Drafter(Drafting):
        def new(self, cache: list[Any]) -> Any:
            return Guesses(plain, 3)

    plain = [
        r.token for r in generate_text(model, tokenizer, "a", options, drafting=Drafting(model))
    ]
    for _ in range(2):
        found = list(generate_text(model, tokenizer, "a", options, drafting=Drafter(model)))
        assert [r.token for r in found] == plain
    assert found[-1].counts.accepted > 5


@pytest.mark.parametrize("end", range(1, 8))
def test_a_text_ends_within_a_draft(loaded: Loaded, end: int) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode("Tell me a story about a duck.")
    text = ids(all_of(begin(model, prompt, max_tokens=30)))
    drafts = Guesses(text, 0, wrong=0)
    drafts.ready = lambda: True  # type: ignore[method-assign]
    drafts.shortest = drafts.longest
    short = begin(model, prompt, max_tokens=end, drafts=drafts)
    assert ids(all_of(short)) == text[:end]
    assert short.finish_reason == "length"
    assert short.counts.steps == 1
    stop = next(place for place in range(end, 30) if text[place] not in text[:place])
    drafts.given = []
    steps = begin(model, prompt, max_tokens=30, drafts=drafts, ends={text[stop]})
    assert ids(all_of(steps)) == text[: stop + 1]
    assert steps.finish_reason == "stop"
    assert {entry.offset for entry in short.cache} == {len(prompt) + end}
    assert {entry.offset for entry in steps.cache} == {len(prompt) + stop + 1}


def test_tokens_that_nobody_wants_leave_the_cache(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode("Tell me a story about a duck.")
    text = ids(all_of(begin(model, prompt, max_tokens=30)))
    drafts = Guesses(text, 1, wrong=0)
    steps = begin(model, prompt, max_tokens=30, drafts=drafts)
    while len(found := steps.step()) < 4:
        pass
    count = len(steps.tokens)
    with pytest.raises(ValueError, match="cannot be taken back"):
        steps.take_back(len(found))
    steps.take_back(2)
    steps.take_back(1)
    assert {entry.offset for entry in steps.cache} == {count - 3} == {len(steps.tokens)}


def test_a_reply_that_is_stopped_within_a_draft(demo: Path) -> None:
    model, tokenizer = outlier_mlx.load(demo)
    free = Conversation(model, tokenizer, Options(max_tokens=40))
    list(free.reply("Tell me a story about a duck."))
    text = free.cached[free.read :]

    class Drafter(Drafting):
        def new(self, cache: list[Any]) -> Any:
            return Guesses(text, 1, wrong=0)

    for end in range(1, 9):
        conversation = Conversation(model, tokenizer, Options(max_tokens=40), Drafter(model))
        found: list[int] = []

        def enough(end: int = end, found: list[int] = found) -> bool:
            return len(found) >= end

        reply = conversation.reply("Tell me a story about a duck.", stopped=enough)
        for response in reply:
            found.append(response.token)
        assert found == text[:end]
        assert {entry.offset for entry in conversation.cache or []} == {len(conversation.cached)}
        assert conversation.cached[-end:] == text[:end]


def test_processors_see_only_what_is_kept(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode("1 2 3 4")

    def watched(seen: list[list[int]]) -> Callable[[mx.array, mx.array], mx.array]:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            seen.append(list(np.array(tokens)))
            assert logits.shape[0] == 1
            # Not what came last, so that the text depends on the tokens.
            return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], -mx.inf, logits)

        return process

    seen: tuple[list[list[int]], list[list[int]]] = [], []
    plain = all_of(begin(model, prompt, max_tokens=30, processors=[watched(seen[0])]))
    drafts = Guesses(ids(plain), 2, wrong=0.3)
    steps = begin(model, prompt, max_tokens=30, processors=[watched(seen[1])], drafts=drafts)
    assert ids(all_of(steps)) == ids(plain)
    assert seen[0] == seen[1] == [(prompt + ids(plain))[: len(prompt) + n] for n in range(31)]
    assert 0 < steps.counts.accepted < steps.counts.drafted


class Markov(nn.Module):
    """The next token depends on the last alone."""

    def __init__(self, probabilities: np.ndarray) -> None:
        super().__init__()
        self.logits = mx.log(mx.array(probabilities))
        self.layers = [None]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        zeros = mx.zeros((1, 1, tokens.shape[1], 8))
        cache[0].update_and_fetch(zeros, zeros)
        return self.logits[tokens]


class Fixed(Guesses):
    """Always the same draft, of four tokens."""

    def __init__(self) -> None:
        super().__init__([], 0)

    def ready(self) -> bool:
        return True

    def draft(self, token: int, most: int) -> list[int]:
        return [0, 1, 0, 2][:most]


@pytest.mark.slow
def test_sampled_texts_have_the_models_distribution() -> None:
    """All texts of four tokens, by a chi-square test that one good sampler in 10,000 fails."""
    vocab, length, runs = 3, 4, 800
    chances = np.random.default_rng(1).dirichlet(np.ones(vocab), vocab).astype(np.float32)
    model = Markov(chances)
    mx.random.seed(0)
    found: dict[tuple[int, ...], int] = {}
    accepted = 0
    for _ in range(runs):
        steps = Steps(
            model,
            [0],
            sampler=GlobalSampler(lambda logprobs: mx.random.categorical(logprobs)),
            max_tokens=length,
            drafts=Fixed(),
        )
        text = tuple(ids(all_of(steps)))
        found[text] = found.get(text, 0) + 1
        accepted += steps.counts.accepted
    expected = {
        text: runs * math.prod(chances[a, b] for a, b in zip((0, *text), text, strict=False))
        for text in product(range(vocab), repeat=length)
    }
    # Rare texts together, as the test needs at least five of each.
    rare = {text for text, count in expected.items() if count < 5}
    pairs = [(found.get(text, 0), count) for text, count in expected.items() if text not in rare]
    pairs.append((sum(found.get(t, 0) for t in rare), sum(expected[t] for t in rare)))
    pairs = [(seen, count) for seen, count in pairs if count > 0]
    statistic = sum((seen - count) ** 2 / count for seen, count in pairs)
    freedom, z = len(pairs) - 1, 3.719  # the normal quantile of 1 - 1e-4
    bound = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
    assert accepted > runs / 2
    assert statistic < bound  # by Wilson and Hilferty's approximation


def test_what_cannot_go_back_has_no_drafts() -> None:
    assert draft_room([KVCache(), ArraysCache(2)]) == 0
    assert Drafting(Markov(np.eye(3))).new([ArraysCache(2)]) is None

    class Hybrid(Markov):
        def make_cache(self) -> list[Any]:
            return [ArraysCache(2)]

    with pytest.raises(OutlierError, match="--draft-model: the model's cache cannot go back"):
        Drafting(Hybrid(np.eye(3)), draft_model=Markov(np.eye(3)))
