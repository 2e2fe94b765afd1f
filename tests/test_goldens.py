"""The reference cases through the converter and the loader: what the engine computes is what the
published runtime computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.runtime.model import Model
from tests.engine import assert_same_run, engine, forward, greedy_cached, trace
from tests.folders import copy_writable
from tests.goldens import Golden, assert_logits_close, golden
from tests.reference import Routing, Trace

CASES = ["v1_real_sharded", "v2_real_perchannel", "v32_alpha_tensors", "v32_alpha_json_partial"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Each case's model, converted and loaded once."""

    @cache
    def model(name: str) -> Model:
        case = golden(name)
        return engine(case.overlay, case.base, tmp_path_factory.mktemp("golden") / name)

    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def model(case: Golden, models) -> Model:
    return models(case.name)


def expected_trace(case: Golden) -> Trace:
    routing = {
        n: Routing(*(case.expected[f"router.{n}.{key}"] for key in ("probs", "indices", "weights")))
        for n in case.moe_layers
    }
    return Trace(case.expected["logits"], case.expected["hidden_states"], routing)


def test_forward(case: Golden, model: Model):
    assert_same_run(trace(model, case.tokens), expected_trace(case))


def test_effective_alphas(case: Golden, model: Model):
    stated = case.readme["effective_alpha"]
    assert sorted(map(int, stated)) == model.args.moe_layers
    for layer, alphas in stated.items():
        found = model.layers[int(layer)].mlp.alpha
        assert found.dtype == mx.float32
        np.testing.assert_array_equal(np.array(found), np.array(alphas, np.float32))


@pytest.mark.parametrize("chunks", [(), (5, 4), (1, 1, 7)], ids=str)
def test_greedy_with_a_cache(case: Golden, model: Model, chunks: tuple[int, ...]):
    tokens, logits = greedy_cached(model, case.tokens, 16, chunks)
    assert tokens == case.greedy
    assert_logits_close(logits, case.expected["greedy_logits"])


def test_decoding_one_by_one_is_the_whole_forward(case: Golden, model: Model):
    sequence = case.tokens + case.greedy
    kv = make_prompt_cache(model)
    steps = np.concatenate([forward(model, [token], kv) for token in sequence])
    np.testing.assert_allclose(steps, forward(model, sequence), atol=5e-5)
    assert_logits_close(steps[: len(case.tokens)], case.expected["logits"])


def test_mlx_lm_generates_the_greedy_tokens(case: Golden, model: Model):
    steps = generate_step(mx.array(case.tokens), model, max_tokens=16, prefill_step_size=5)
    assert [int(token) for token, _ in steps] == case.greedy


def test_a_batch_is_its_sequences(case: Golden, model: Model):
    turned = case.tokens[3:] + case.tokens[:3]
    batch = np.array(model(mx.array([case.tokens, turned])))
    assert_logits_close(batch[0], case.expected["logits"])
    np.testing.assert_allclose(batch[1], forward(model, turned), atol=5e-5)


def test_many_tokens_are_routed_as_few_are(case: Golden, model: Model):
    """From 64 (token, expert) pairs on, pairs are sorted by expert: the same logits come out."""
    copies = 64 // len(case.tokens) + 1
    batch = np.array(model(mx.array([case.tokens] * copies)))
    for logits in batch:
        assert_logits_close(logits, case.expected["logits"])


def test_a_tier_stands_alone(tmp_path: Path):
    """What was converted is gone from the overlay's folder: the tier holds all it needs."""
    case = golden("v32_alpha_json_partial")
    copy = copy_writable(case.overlay, tmp_path / "overlay")
    model = engine(copy, None, tmp_path / "tier")
    for path in copy.iterdir():
        path.unlink()
    assert_logits_close(forward(model, case.tokens), case.expected["logits"])
