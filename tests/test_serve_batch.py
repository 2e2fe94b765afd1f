"""Sequences in a batch: whoever comes and goes, each has the tokens that it would have alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from outlier_mlx.engine.steps import Quantized, draft_room
from outlier_mlx.serve.batch import Batch
from outlier_mlx.serve.jobs import Job, Token
from outlier_mlx.serve.request import Request, Sampling
from outlier_mlx.serve.sampling import choice_for
from outlier_mlx.serve.segments import Prompt
from outlier_mlx.serve.sequences import Sequence, read
from outlier_mlx.serve.single import Single
from tests.plain_models import SIZES, make_model

GEMMA = SIZES | {"head_dim": 16, "num_hidden_layers": 3, "sliding_window_pattern": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"},
    "windows": GEMMA | {"model_type": "gemma3_text", "sliding_window": 16},
    "states": SIZES
    | {
        "model_type": "falcon_h1",
        "mamba_d_state": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "head_dim": 16,
    },
}
SAMPLED = Sampling(temperature=1.0, top_p=0.9, xtc_probability=0.5, xtc_threshold=0.05)
SAMPLINGS = [
    Sampling(),
    SAMPLED,
    Sampling(temperature=0.7, top_k=20, min_p=0.01),
    Sampling(repetition_penalty=1.5, presence_penalty=0.5),
    replace(SAMPLED, frequency_penalty=1.0, logit_bias={7: 5.0}),
]


@dataclass
class Told:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(CONFIGS[request.param])


def sequence(model: Any, prompt: list[int], length: int, sampling: Sampling, seed: int) -> Sequence:
    request = Request(sampling=sampling, seed=seed, alternatives=2)
    ends: tuple[Any, ...] = ((max(1, len(prompt) // 2), "system"),)
    job = Job(request, Prompt(prompt, ends), length, lambda job: None)
    return Sequence(job, make_prompt_cache(model), 0, choice_for(request, [1, 2]))


def run(model: Any, waves: list[list[Sequence]], slices: int) -> list[Told]:
    """Generate; each wave comes two steps after the one before."""
    told: dict[Sequence, Told] = {one: Told() for wave in waves for one in wave}
    batch, step = Batch(model, {0}), 0
    while len(batch) or step < 2 * len(waves):
        if step % 2 == 0 and step // 2 < len(waves):
            wave = waves[step // 2]
            while reading := [one for one in wave if one.left]:
                read(model, reading, [one.slice(slices) for one in reading])
            batch.add(wave)
        step += 1
        for one, token in batch.step() if len(batch) else []:
            assert isinstance(token, Token)
            assert len(token.top_tokens) == 2
            told[one].tokens.append(token.token)
            told[one].reason = token.finish_reason
            if token.finish_reason:
                assert one.tokens == one.job.prompt.tokens + told[one].tokens
                assert_continues(model, one)
    return list(told.values())


def assert_continues(model: Any, ended: Sequence) -> None:
    """The cache that it leaves is that of its tokens: a next message can go on from it."""
    fresh = make_prompt_cache(model)
    whole = model(mx.array([[*ended.tokens, 5]]), cache=fresh)[0, -1]
    assert mx.abs(model(mx.array([[5]]), cache=ended.cache)[0, -1] - whole).max() < 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_a_batch_changes_no_tokens(model: Any, seed: int) -> None:
    """Whatever lengths and ways of sampling there are together. No two logits nearly tie."""
    rng = random.Random(seed)
    asked = [
        (
            [rng.randrange(1, 300) for _ in range(rng.choice([1, 2, 9, 30, 70]))],
            rng.randrange(1, 25),
            rng.choice(SAMPLINGS),
            rng.randrange(10),
        )
        for _ in range(6)
    ]
    alone = [run(model, [[sequence(model, *one)]], slices=1000)[0] for one in asked]
    several = [sequence(model, *one) for one in asked]
    cut = sorted(rng.sample(range(1, 6), 2))
    waves = [several[: cut[0]], several[cut[0] : cut[1]], several[cut[1] :]]
    assert run(model, waves, slices=rng.choice([5, 16, 1000])) == alone


class Guesses:
    """Drafts of what is known to come, with an error now and then."""

    def __init__(self, coming: list[int], prompt: int) -> None:
        self.coming, self.prompt = coming, prompt
        self.noted = 0

    def new(self, cache: Any) -> Any:
        return self if draft_room(cache) else None

    def begin(self, tokens: Any) -> None:
        self.noted = len(tokens) - self.prompt

    def ready(self) -> bool:
        return True

    def draft(self, token: int, most: int) -> list[int]:
        guess = self.coming[self.noted + 1 : self.noted + 1 + min(most, 4)]
        return [*guess[:2], *((guess[2] + 1) % 300 for _ in guess[2:3]), *guess[3:]]

    def note(self, tokens: Any, drafted: int) -> None:
        self.noted += len(tokens)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=map(str, range(len(SAMPLINGS))))
def test_alone_and_together_and_alone_again(model: Any, sampling: Sampling) -> None:
    """With drafts while it is alone."""
    prompt = list(range(9, 40))
    (expected,) = run(model, [[sequence(model, prompt, 40, sampling, 3)]], slices=1000)
    one, other = sequence(model, prompt, 40, sampling, 3), sequence(model, [7, 8], 6, sampling, 1)
    for each in (one, other):
        while each.left:
            read(model, [each], [each.slice(100)])
    room = draft_room(one.cache)
    drafting: Any = Guesses(expected.tokens, len(prompt))
    parts = model, one, {0}, None, drafting
    told = Told()

    def step(batch: Batch | Single) -> None:
        for each, token in batch.step():
            assert isinstance(token, Token)
            assert len(token.top_tokens) == 2
            if each is one:
                told.tokens.append(token.token)
                told.reason = token.finish_reason

    single, steps = Single(*parts), 0
    while len(told.tokens) < 9 and len(single):
        step(single)
        steps += 1
    assert steps < 9 or not room
    batch = Batch(model, {0})
    if len(single):
        batch.go_on(single.pending())
        batch.add([other])
    while len(batch) > 1:
        step(batch)
    if batch.sequences == [one]:
        _, *pending = batch.pending()
        single = Single(*parts, pending=(pending[0], pending[1]))
    while len(single):
        step(single)
    assert told == expected
    assert one.tokens == prompt + told.tokens
    assert_continues(model, one)


def test_a_quantized_cache() -> None:
    """It is quantized when mlx-lm's `generate_step` does it, which has the same tokens."""
    model = make_model(SIZES | {"model_type": "llama", "hidden_size": 256, "head_dim": 64})
    prompt = list(range(1, 60))
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 0}
    steps = generate_step(mx.array(prompt), model, max_tokens=20, **options)
    expected = [token for token, _ in steps]
    quantized = Quantized(8, 64, 0)
    one = sequence(model, prompt, 20, Sampling(), 0)
    one.job.prompt = replace(one.job.prompt, ends=())
    read(model, [one], [one.slice(1000)])
    quantized.apply(one.cache)
    batch = Batch(model, set(), quantized)
    batch.add([one])
    while len(batch):
        batch.step()
    assert one.tokens == prompt + expected
    assert {type(layer) for layer in one.cache} == {QuantizedKVCache}


def test_what_a_processor_raises_ends_only_its_sequence(model: Any) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > 12:
            raise ValueError("no token is allowed")
        return logits

    prompt = list(range(5, 15))
    several = [sequence(model, prompt, 15, Sampling(), 0) for _ in range(3)]
    alone = run(model, [[sequence(model, prompt, 15, Sampling(), 0)]], slices=1000)
    several[1].choice = replace(several[1].choice, processors=(fail,))
    for one in several:
        while one.left:
            read(model, [one], [one.slice(100)])
    batch = Batch(model, {0})
    batch.add(several)
    tokens: list[list[Any]] = [[], [], []]
    while len(batch):
        for one, token in batch.step():
            tokens[several.index(one)].append(token)
    assert [t.token for t in tokens[0]] == [t.token for t in tokens[2]] == alone[0].tokens
    assert isinstance(tokens[1][-1], ValueError)
    assert len(tokens[1]) == 3


def test_seeds_give_other_texts_and_the_model_s_distribution() -> None:
    """Each token is drawn with a number of its own."""
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    counts = [0, 0, 0]
    for seed in range(40):
        sampler = choice_for(Request(sampling=Sampling(temperature=1.0), seed=seed), []).sampler
        drawn = [int(sampler(logprobs)) for _ in range(50)]
        assert len(set(drawn)) == 3
        for token in drawn:
            counts[token] += 1
    assert counts == pytest.approx([1000, 600, 400], abs=100)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(
    ("extreme", "possible"),
    [
        ({"temperature": 5e-324}, {1}),
        ({"temperature": 1e-6}, {1}),
        ({"temperature": 1e-3}, {1}),
        ({"temperature": 1.0, "top_p": 5e-324}, {1}),
        ({"temperature": 1.0, "top_p": 1e-9}, {1}),
        ({"temperature": 2e9}, {0, 1, 2}),
        ({"temperature": 2e9, "top_k": 2}, {0, 1}),
    ],
    ids=str,
)
def test_no_sampling_chooses_an_impossible_token(
    extreme: dict[str, float], possible: set[int], dtype: mx.Dtype
) -> None:
    """The inverse of a temperature, or a top-p, may be infinite or 0 in the logits' type."""
    logprobs = mx.array([[-9.0, -8.0, -9.5, *[-mx.inf] * 5]]).astype(dtype)
    request = Request(sampling=Sampling(**extreme), seed=1)  # type: ignore[arg-type]
    sampler = choice_for(request, []).sampler
    assert {int(sampler(logprobs)) for _ in range(50)} == possible


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": -2e9}, {"frequency_penalty": -2e9}, {"presence_penalty": 2e9}]
)
def test_no_penalty_makes_logits_infinite(penalty: dict[str, float]) -> None:
    """In float16, the log probabilities would be no numbers."""
    request = Request(sampling=Sampling(**penalty))  # type: ignore[arg-type]
    logits = mx.array([[3.0, 2.0, 1.0]]).astype(mx.float16)
    for process in choice_for(request, []).processors:
        logits = process(mx.array([1, 1]), logits)
    preferred = 1 if sum(penalty.values()) < 0 else 0
    assert int(mx.argmax(logits)) == preferred
    assert mx.isfinite(logits).all()
