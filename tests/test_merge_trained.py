"""Routers that are trained on texts, and how routing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine.loading import load
from outlier_mlx.errors import OutlierError
from outlier_mlx.merge import Merged, merge
from outlier_mlx.merge.trained import fit_router
from tests import reference
from tests.merging import prompts, topical_experts, write_merge_config, write_models, write_texts
from tests.tensor_file import read_arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Merged:
    file = write_merge_config(folder, gate_mode="trained", experts=topical_experts(folder))
    return merge(file, folder / "out")


def test_trained_routers_find_the_right_expert(trained: Merged) -> None:
    found = {routing.mode: routing for routing in trained.routers.routing}
    assert list(found) == ["trained", "hidden", "hidden_avg", "cheap_embed", "random"]
    assert found["random"].right < 0.5
    assert found["trained"].right > 0.75
    for mode, routing in found.items():
        assert routing.prompts == 24
        assert mode == "trained" or routing.right < found["trained"].right
    assert found["trained"].prompts_right == 24
    assert trained.routers.measured_on == "held_out"
    assert len(trained.routers.fitted) == 2
    assert all(fitted.loss < np.log(3) / 2 for fitted in trained.routers.fitted)


def test_it_is_the_written_model_that_was_measured(trained: Merged) -> None:
    """Routing of the held-out prompts, measured again on the model that was written."""
    model, tokenizer = load(trained.path)
    right, tokens, prompts_right = [], 0, 0
    for owner, expert in enumerate(trained.merge_config.experts):
        for text in expert.held_out:
            ids = tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)
            logits = router_logits(model, ids)[:, 1:]  # BOS does not count
            first = logits.argmax(axis=-1)
            right.append((first == owner).sum(axis=1))
            tokens += logits.shape[1]
            weights = np.zeros_like(logits)
            for layer, rows in enumerate(logits):
                routing = reference.route(rows, 2)
                np.put_along_axis(weights[layer], routing.indices, routing.weights, axis=1)
            prompts_right += int(weights.mean(axis=(0, 1)).argmax() == owner)
    measured = trained.routers.routing[0]
    assert measured.tokens == tokens
    by_layer = np.sum(right, axis=0) / tokens
    np.testing.assert_allclose([layer.right for layer in measured.layers], by_layer, atol=1e-6)
    assert measured.right == pytest.approx(by_layer.mean())
    assert measured.prompts_right == prompts_right
    for shares in measured.layers:
        assert sum(shares.first) == pytest.approx(1)
        assert sum(shares.served) == pytest.approx(2)
        assert max(shares.weight) <= shares.largest <= 1
        assert sum(shares.weight) == pytest.approx(1)


def router_logits(model: Any, ids: list[int]) -> np.ndarray:
    """(layers, tokens, experts) of a Mixtral."""
    seen = []
    x = model.model.embed_tokens(mx.array([ids]))
    for layer in model.layers:
        h = x + layer.self_attn(layer.input_layernorm(x), "causal", None)
        seen.append(np.array(layer.block_sparse_moe.gate(layer.post_attention_layernorm(h)))[0])
        x = layer(x, "causal", None)
    return np.stack(seen)


def test_training_is_the_same_every_time(trained: Merged, folder: Path, tmp_path: Path) -> None:
    again = merge(folder / "merge.yaml", tmp_path / "out", measure=False)
    np.testing.assert_allclose(
        again.routers.gates.routed, trained.routers.gates.routed, rtol=1e-3, atol=1e-4
    )
    assert again.routers.routing == []
    plain = read_arrays(next(trained.path.glob("*.safetensors")))
    for name, tensor in read_arrays(next(again.path.glob("*.safetensors"))).items():
        if ".gate." not in name:
            np.testing.assert_array_equal(tensor, plain[name])


def test_the_report_is_written(trained: Merged) -> None:
    report = json.loads((trained.path / "merge.json").read_text())
    assert report["gate_mode"] == "trained"
    assert report["measured_on"] == "held_out"
    assert [routing["mode"] for routing in report["routing"]][:2] == ["trained", "hidden"]
    assert report["routing"][0]["right"] == trained.routers.routing[0].right
    assert len(report["trained"]) == 2
    # A router that was fitted has rows that add up to zero: no condition number says anything.
    assert report["condition_numbers"] == [None, None]
    np.testing.assert_allclose(trained.routers.gates.routed.sum(axis=1), 0, atol=1e-2)
    assert report["parameters"]["total"] > report["parameters"]["active"]
    assert [expert["name"] for expert in report["experts"]] == [f"expert_{n}" for n in range(3)]
    assert str(trained.path.parent) not in json.dumps(report)


def test_prompts_alone_are_enough_to_train(folder: Path, tmp_path: Path) -> None:
    file = write_merge_config(folder, gate_mode="trained")
    held_out = tmp_path / "held_out.yaml"
    held_out.write_text(json.dumps([prompts(n, 4, seed=5) for n in range(3)]))
    routing = merge(file, tmp_path / "out", held_out=held_out).routers.routing
    assert routing[0].mode == "trained"
    assert routing[0].right > max(other.right for other in routing[1:])


def test_a_shared_expert_keeps_the_gate_of_its_prompts(tmp_path: Path) -> None:
    write_models(tmp_path, "qwen2")
    shared: dict[str, Any] = {"source_model": "./expert_0", "positive_prompts": ["all of it"]}
    gates = {}
    for mode in ("trained", "hidden"):
        file = write_merge_config(tmp_path, gate_mode=mode, shared_experts=[shared])
        merged = merge(file, tmp_path / mode)
        gates[mode] = merged.routers.gates
        model, _ = load(merged.path)
        assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
    assert gates["hidden"].shared is not None
    assert gates["trained"].shared is not None
    np.testing.assert_allclose(gates["trained"].shared, gates["hidden"].shared, atol=1e-6)
    del shared["positive_prompts"]
    file = write_merge_config(tmp_path, gate_mode="trained", shared_experts=[shared])
    with pytest.raises(OutlierError, match="the shared expert has no positive prompts"):
        merge(file, tmp_path / "out")


def test_what_training_lacks(folder: Path, tmp_path: Path) -> None:
    experts = topical_experts(folder)
    del experts[1]["positive_prompts"], experts[1]["texts"]
    file = write_merge_config(folder, gate_mode="trained", experts=experts)
    with pytest.raises(OutlierError, match="expert 1 has neither texts nor positive prompts"):
        merge(file, tmp_path / "out")
    (folder / write_texts(folder)[0]).write_bytes(b"\xff\xfe")
    with pytest.raises(OutlierError, match=r"topic_0\.txt: not UTF-8"):
        merge(
            write_merge_config(folder, gate_mode="trained", experts=topical(folder)),
            tmp_path / "out",
        )
    (folder / "topic_0.txt").write_text("")
    with pytest.raises(OutlierError, match=r"topic_0\.txt: no text"):
        merge(folder / "merge.yaml", tmp_path / "out")
    write_texts(folder)


def topical(folder: Path) -> list[dict]:
    """`topical_experts` without writing the texts again."""
    return [{"source_model": f"./expert_{n}", "texts": [f"topic_{n}.txt"]} for n in range(3)]


def test_a_fit_separates_what_can_be_separated() -> None:
    rng = np.random.default_rng(0)
    owners = np.repeat([0, 1, 2], [300, 30, 90])
    x = rng.standard_normal((420, 24)).astype(np.float32)
    x[:, 0] += 400  # a massive dimension that tells nothing
    x[np.arange(420), 1 + owners] += 4
    fitted = fit_router(mx.array(x), owners, 3)
    logits = x @ fitted.rows.T
    assert fitted.accuracy == pytest.approx((logits.argmax(axis=1) == owners).mean())
    assert fitted.accuracy > 0.95
    losses = -np.log(reference.softmax(logits.astype(np.float64))[np.arange(420), owners])
    balanced = np.mean([losses[owners == owner].mean() for owner in range(3)])
    assert fitted.loss == pytest.approx(balanced, abs=1e-3)
