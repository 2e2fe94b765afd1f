"""Perplexity, comparison, routing and tuned alphas, against plain NumPy."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.measure.alphas import apply_alphas
from outlier_mlx.measure.perplexity import compare, same_tokens, warn_of_context, windows
from outlier_mlx.measure.routing import draw, moe_blocks, observe_routing
from outlier_mlx.measure.tuning import tune
from tests.builders import Built
from tests.engine import alphas_of
from tests.library import Library
from tests.reference import forward, trace
from tests.reference_reader import read_overlay

TEXT = "the cat sat on the mat and the dog sat on the log while the sun went down " * 12


@pytest.fixture(scope="module")
def overlay(library: Library) -> Built:
    return library.overlay(expert_intermediate=64)


@pytest.fixture(scope="module")
def tier(library: Library, overlay: Built) -> Path:
    return library.tier(overlay)


def log_probs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_perplexity_is_the_references(tier: Path, overlay: Built) -> None:
    model, tokenizer = load(tier)
    texts = windows(tokenizer, TEXT, 24, most=3)
    assert [len(tokens) for tokens in texts] == [24, 24, 24]
    reference = read_overlay(overlay.path)
    expected = []
    for tokens in texts:
        predicted = log_probs(forward(reference, tokens[:-1]))
        expected += [-predicted[at, token] for at, token in enumerate(tokens[1:])]
    seen: list[tuple[int, int | None]] = []
    found = compare(model, texts, progress=lambda done, total: seen.append((done, total)))
    assert found.tokens == len(expected) == seen[-1][0] == seen[-1][1]
    assert found.loss == pytest.approx(np.mean(expected), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    error = np.std(expected, ddof=1) / math.sqrt(len(expected))
    assert found.standard_error == pytest.approx(error, rel=1e-3)
    assert found.kl is None


def test_windows_longer_than_the_context(tier: Path, recwarn: Any) -> None:
    model, _ = load(tier)
    warn_of_context(model, [[1] * 512, [1] * 100])
    assert not list(recwarn)
    warn_of_context(model, [[1] * 100, [1] * 513])
    (warning,) = recwarn
    assert str(warning.message) == (
        "windows have 513 tokens, but the model's context length is 512"
    )


def test_divergence_and_agreement_with_another_model(
    library: Library, overlay: Built, tier: Path
) -> None:
    other_tier = library.tier(overlay, tier="q4")
    model, tokenizer = load(tier)
    other, other_tokenizer = load(other_tier)
    same_tokens(tokenizer, other_tokenizer, TEXT)
    texts = windows(tokenizer, TEXT, 20, most=2)
    found = compare(model, texts, other)
    ours = np.concatenate([log_probs(np.array(model(mx.array([t[:-1]])))[0]) for t in texts])
    theirs = np.concatenate([log_probs(np.array(other(mx.array([t[:-1]])))[0]) for t in texts])
    expected = (np.exp(theirs) * (theirs - ours)).sum(-1).mean()
    assert found.kl == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3
    assert found.agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    itself = compare(model, texts, model)
    assert (itself.kl, itself.agreement) == (pytest.approx(0, abs=1e-6), 1.0)


def test_a_text_too_short_is_refused(tier: Path) -> None:
    _, tokenizer = load(tier)
    with pytest.raises(OutlierError, match="too short"):
        windows(tokenizer, "", 16)


def test_routing_is_counted_and_changes_nothing(tier: Path, overlay: Built) -> None:
    model, tokenizer = load(tier)
    texts = windows(tokenizer, TEXT, 32, most=2)
    before = np.array(model(mx.array([texts[0]])))
    layers = observe_routing(model, texts)
    np.testing.assert_array_equal(np.array(model(mx.array([texts[0]]))), before)
    reference = read_overlay(overlay.path)
    traces = [trace(reference, tokens).routing for tokens in texts]
    assert [layer.layer for layer in layers] == list(overlay.dims.routed_layers)
    for layer in layers:
        chosen = np.concatenate([routing[layer.layer].indices for routing in traces])
        expected = np.array([(chosen == e).any(1).mean() for e in range(overlay.dims.experts)])
        np.testing.assert_allclose(layer.share, expected)
        both = ((chosen == 0).any(1) & (chosen == 1).any(1)).mean()
        assert layer.together[0][1] == pytest.approx(both)
        assert sum(layer.share) == pytest.approx(overlay.dims.top_k)
        assert 0 <= layer.entropy <= math.log2(overlay.dims.experts) + 1e-9
        mean = sum(s * w for s, w in zip(layer.share, layer.weight, strict=True))
        assert mean == pytest.approx(1.0, abs=1e-5)  # a token's weights add up to 1


def test_the_heat_map_is_a_picture(tier: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tier)
    draw(observe_routing(model, windows(tokenizer, TEXT, 16, most=1)), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_experts_is_refused(tier: Path) -> None:
    model, _ = load(tier)
    for layer in model.layers:
        layer.mlp = layer.self_attn
    with pytest.raises(OutlierError, match="no layer with routed experts"):
        moe_blocks(model)


def test_tuning_finds_better_alphas_and_trains_nothing_else(
    tier: Path, overlay: Built, tmp_path: Path
) -> None:
    model, tokenizer = load(tier)
    texts = windows(tokenizer, TEXT, 24)
    others = {
        name: np.array(value.astype(mx.float32))
        for name, value in _flat(model).items()
        if not name.endswith("alpha")
    }
    tuned = tune(model, texts, ["alphas"], epochs=2, learning_rate=0.05)
    assert tuned.after.loss < tuned.before.loss
    for name, value in _flat(model).items():
        if not name.endswith("alpha"):
            np.testing.assert_array_equal(np.array(value.astype(mx.float32)), others[name])
    assert tuned.alphas() == alphas_of(model)
    (tmp_path / "alpha.json").write_text(json.dumps(tuned.alphas()))
    again, _ = load(tier)
    apply_alphas(again, tmp_path / "alpha.json")
    tokens = mx.array([texts[0]])
    np.testing.assert_array_equal(np.array(again(tokens)), np.array(model(tokens)))
    converted = outlier_mlx.convert(
        overlay.path, out=tmp_path / "t", tier="f32", alpha=tmp_path / "alpha.json"
    )
    np.testing.assert_array_equal(np.array(load(converted)[0](tokens)), np.array(model(tokens)))


def test_tuning_towards_a_teacher_brings_the_models_closer(tier: Path) -> None:
    teacher, tokenizer = load(tier)
    model, _ = load(tier)
    for block in moe_blocks(model).values():
        block.alpha = block.alpha * 0.5
    texts = windows(tokenizer, TEXT, 24, most=10)
    how = {"epochs": 2, "batch": 1, "learning_rate": 0.05}
    tuned = tune(model, texts, ["alphas"], teacher=teacher, **how)  # type: ignore[arg-type]
    assert tuned.before.kl is not None and tuned.after.kl is not None
    assert tuned.after.kl < 0.5 * tuned.before.kl


def test_a_worse_set_is_refused(tier: Path) -> None:
    model, tokenizer = load(tier)
    before = alphas_of(model)
    teacher, _ = load(tier)  # the same model: nothing can be nearer to it than it is
    texts = windows(tokenizer, TEXT, 24)
    tuned = tune(model, texts, ["alphas"], teacher=teacher, epochs=1, learning_rate=0.5)
    assert alphas_of(model) == before
    with pytest.raises(OutlierError, match="did not get better"):
        tuned.check_better()


def test_alphas_of_another_model_are_refused(tier: Path, tmp_path: Path) -> None:
    model, _ = load(tier)
    (tmp_path / "alpha.json").write_text('{"1": {"99": 0.5}}')
    with pytest.raises(CheckpointError, match="layer 1, expert 99"):
        apply_alphas(model, tmp_path / "alpha.json")


def _flat(model: object) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))  # type: ignore[attr-defined]
