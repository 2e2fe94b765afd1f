"""Merges of small models against plain NumPy, written from the description of mergekit-moe."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load as stock_load
from mlx_lm.utils import load_model as stock_load_model
from transformers import PreTrainedTokenizerFast

import outlier_mlx
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import OutlierError
from outlier_mlx.merge import merge, sources
from outlier_mlx.merge.merge_config import read_merge_config
from outlier_mlx.merge.model import open_mixture
from outlier_mlx.merge.routes import routing_weights
from outlier_mlx.runtime.qwen2_moe import RenormalisedMoE
from tests import reference
from tests.goldens import assert_logits_close
from tests.hub import Hub, opened
from tests.memory import at_rest
from tests.merging import SIZES, write_dense, write_merge_config, write_models
from tests.tensor_file import read_arrays, rounded

Array = np.ndarray
TOKENS = [1, 5, 40, 77, 120, 9, 201, 33, 250, 8, 64, 64]
POSITIVE = (["the cat sat", "a mat"], ["3 + 4 = 7"], ["down by the sea, in the rain"])
NEGATIVE: tuple[list[str], ...] = ([], ["poetry"], ["numbers", "the number 12"])


def config_with(folder: Path, kind: str, **changes: Any) -> Path:
    """Three experts with these prompts; a qwen2 has a shared one as well."""
    experts = [
        {"source_model": f"./expert_{n}", "positive_prompts": p, "negative_prompts": q}
        for n, (p, q) in enumerate(zip(POSITIVE, NEGATIVE, strict=True))
    ]
    shared = [{"source_model": "./other", "positive_prompts": ["all"], "residual_scale": 0.25}]
    return write_merge_config(
        folder,
        **{"experts": experts, "shared_experts": shared if kind == "qwen2" else None} | changes,
    )


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp(request.param), request.param)
    # The shared expert's model is not among the experts.
    write_dense(folder / "other", request.param, seed=9, tokenizer=False)
    (folder / "kind").write_text(request.param)
    return folder


def dense(folder: Path) -> reference.ReferenceModel:
    """A dense model in NumPy."""
    weights = read_arrays(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layers = []
    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        layers.append(reference.Layer(own))
    return reference.ReferenceModel(
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        top_k=0,
        eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        scaling=None,
        embedding=weights["model.embed_tokens.weight"],
        norm=weights["model.norm.weight"],
        lm_head=weights.get("lm_head.weight"),
        layers=layers,
    )


def states(base: Path, text: str) -> Array:
    """The residual stream that enters each layer, (layers, tokens, hidden)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)
    return reference.trace(dense(base), ids).hidden[:-1]


def normalised(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def gate(base: Path, mode: str, positive: Sequence[str], negative: Sequence[str]) -> Array:
    """An expert's row in each layer, (layers, hidden)."""

    def of(text: str) -> Array:
        found = states(base, text)
        if mode == "cheap_embed":
            return np.repeat(found[:1].sum(axis=1), len(found), axis=0)
        return found[:, -1] if mode == "hidden" else found.mean(axis=1)

    def together(texts: Sequence[str]) -> Array:
        if not texts:
            return np.zeros((1, SIZES["hidden"]))
        if mode == "cheap_embed":
            return normalised(np.sum([of(text) for text in texts], axis=0))
        return np.mean([of(text) for text in texts], axis=0)

    return normalised(together(positive) - together(negative))


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_routers_from_prompts(models: Path, tmp_path: Path, mode: str) -> None:
    kind = (models / "kind").read_text()
    file = config_with(models, kind, gate_mode=mode)
    gates = merge(file, tmp_path / "out", measure=False).routers.gates
    expected = [gate(models / "base", mode, p, n) for p, n in zip(POSITIVE, NEGATIVE, strict=True)]
    np.testing.assert_allclose(gates.routed, np.stack(expected, axis=1), atol=2e-5)
    if kind == "qwen2":
        shared = gate(models / "base", mode, ["all"], [])
        assert gates.shared is not None
        np.testing.assert_allclose(gates.shared, shared, atol=2e-5)


@pytest.mark.parametrize(("no_positive", "positive"), [("bos", [""]), ("zero", [])])
def test_no_positive_prompts(
    models: Path, tmp_path: Path, no_positive: str, positive: list[str]
) -> None:
    experts = [
        {"source_model": f"./expert_{n}", "negative_prompts": [t]} for n, t in enumerate("ab")
    ]
    file = config_with(models, (models / "kind").read_text(), experts=experts)
    gates = merge(file, tmp_path / "out", no_positive=no_positive, measure=False).routers.gates
    expected = [gate(models / "base", "hidden", positive, [text]) for text in "ab"]
    np.testing.assert_allclose(gates.routed, np.stack(expected, axis=1), atol=2e-5)


def mixture_logits(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> Array:
    """A Mixtral or Qwen2-MoE by Hugging Face's names, in NumPy."""
    base = dense(folder / "base")
    experts = len({name for name in tensors if "layers.0" in name and ".experts." in name}) // 3
    mixtral = config["model_type"] == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    x = base.embedding[TOKENS]
    for n, layer in enumerate(base.layers):
        w, moe = layer.weights, f"model.layers.{n}.{'block_sparse_moe' if mixtral else 'mlp'}."
        x = x + reference.attention(
            base, w, reference.rms_norm(x, w["input_layernorm.weight"], base.eps)
        )
        h = reference.rms_norm(x, w["post_attention_layernorm.weight"], base.eps)
        logits = h @ tensors[f"{moe}gate.weight"].T
        routing = reference.route(logits, config["num_experts_per_tok"])
        for e in range(experts):
            rows, slots = np.nonzero(routing.indices == e)
            matrices = (tensors[f"{moe}experts.{e}.{name}.weight"] for name in names)
            y = reference.swiglu(h[rows], *matrices)
            x[rows] += routing.weights[rows, slots, None] * y
        if not mixtral:
            shared = (tensors[f"{moe}shared_expert.{name}.weight"] for name in names)
            logit = h @ tensors[f"{moe}shared_expert_gate.weight"].T
            x = x + reference.swiglu(h, *shared) / (1 + np.exp(-logit))
    assert base.lm_head is not None
    return reference.rms_norm(x, base.norm, base.eps) @ base.lm_head.T


def test_the_merged_model_computes_what_its_tensors_say(models: Path, tmp_path: Path) -> None:
    file = config_with(models, (models / "kind").read_text())
    out = merge(file, tmp_path / "out", measure=False).path
    config = json.loads((out / "config.json").read_text())
    tensors = read_arrays(next(out.glob("*.safetensors")))
    expected = mixture_logits(models, config, tensors)
    model, _ = load_model(out)
    assert_logits_close(np.array(model(mx.array([TOKENS])))[0], expected)
    stock, tokenizer = stock_load(str(out))[:2]
    found = np.array(stock(mx.array([TOKENS])))[0]
    if config["model_type"] == "mixtral":
        assert_logits_close(found, expected)
    else:  # it does not read norm_topk_prob
        assert np.abs(found - expected).max() > 0.05
    assert tokenizer.decode(tokenizer.encode("the sea")) == "the sea"


def test_ties_between_experts_go_to_the_lower_number() -> None:
    logits = np.array([[1.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    expected = [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]
    np.testing.assert_allclose(routing_weights(logits, 2), expected)
    block = RenormalisedMoE.__new__(RenormalisedMoE)
    object.__setattr__(block, "top_k", 2)
    object.__setattr__(block, "_training", False)
    object.__setattr__(block, "gate", lambda x: x)
    indices, weights = RenormalisedMoE.route(block, mx.array(logits))
    assert indices.tolist() == [[1, 2], [0, 1]]
    np.testing.assert_allclose(np.array(weights), 0.5)


def test_a_llama_with_a_shared_expert_becomes_a_qwen2_moe(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", tied=True, dtype="BF16")
    write_dense(tmp_path / "other", "llama", seed=9, tied=True, dtype="BF16", tokenizer=False)
    out = merge(config_with(tmp_path, "qwen2"), tmp_path / "out", measure=False).path
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("qwen2_moe", "bfloat16")
    assert not config["tie_word_embeddings"]
    tensors = read_arrays(next(out.glob("*.safetensors")))
    assert not tensors["model.layers.1.self_attn.k_proj.bias"].any()
    embedding = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensors["lm_head.weight"], embedding)
    down = "model.layers.1.mlp.{}down_proj.weight"
    source = read_arrays(tmp_path / "other" / "model.safetensors")[down.format("")]
    expected = rounded(source * np.float32(0.25), "BF16")
    np.testing.assert_array_equal(tensors[down.format("shared_expert.")], expected)
    model, _ = outlier_mlx.load(out)
    assert np.isfinite(np.array(model(mx.array([TOKENS])))).all()


def test_a_tied_mixtral_stays_tied(tmp_path: Path) -> None:
    write_models(tmp_path, "mistral", tied=True)
    out = merge(config_with(tmp_path, "mistral"), tmp_path / "out", measure=False).path
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in read_arrays(next(out.glob("*.safetensors")))
    logits = np.array(load_model(out)[0](mx.array([TOKENS])))
    stock = np.array(stock_load_model(out)[0](mx.array([TOKENS])))
    np.testing.assert_array_equal(logits, stock)


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_routers_need_no_prompts_but_a_seed(tmp_path: Path, mode: str) -> None:
    write_models(tmp_path, hidden=64)
    experts = [{"source_model": "./expert_0"}, {"source_model": "./expert_1"}]
    file = write_merge_config(tmp_path, gate_mode=mode, experts=experts)
    runs = [merge(file, tmp_path / "out", seed=s, force=True) for s in (0, 0, 1)]
    first, again, other = (run.routers.gates.routed for run in runs)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    if mode == "random":
        assert abs(first.std() - 1) < 0.2
    else:
        assert 0.9 / 8 < np.abs(first).max() <= 1 / 8
    assert runs[0].routers.measured_on is None


def test_noise_is_of_the_scale_that_is_asked_for(tmp_path: Path) -> None:
    write_models(tmp_path, intermediate=160)
    experts = [
        {"source_model": "./expert_0", "positive_prompts": ["a"], "noise_scale": scale}
        | {"negative_prompts": [str(scale)], "residual_scale": 2.0}
        for scale in (0.5, 0.5, 0)
    ]
    file = write_merge_config(tmp_path, experts=experts)
    outs = [merge(file, tmp_path / f"out{n}", seed=n // 2, measure=False) for n in range(3)]
    tensors = [read_arrays(next(out.path.glob("*.safetensors"))) for out in outs]
    source = read_arrays(tmp_path / "expert_0" / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    for ours, theirs, factor in (("w1", "gate", 1), ("w2", "down", 2), ("w3", "up", 1)):
        before = source[f"model.layers.1.mlp.{theirs}_proj.weight"]
        noise = [tensors[0][name.format(e, ours)] / factor - before for e in range(3)]
        assert abs(noise[0].std() - 0.5) < 0.02
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.06
        assert not noise[2].any()
        np.testing.assert_array_equal(
            tensors[0][name.format(0, ours)], tensors[1][name.format(0, ours)]
        )
        assert (tensors[0][name.format(0, ours)] != tensors[2][name.format(0, ours)]).any()
    # What the merged model is measured with is what is written, whichever rows are read.
    matrix = open_mixture(read_merge_config(file)).experts[0].matrix(1, "gate")
    whole = matrix.read_float32()
    np.testing.assert_array_equal(whole, tensors[0][name.format(0, "w1")])
    for start, stop in ((0, 64), (63, 65), (70, 160), (100, 101)):
        np.testing.assert_array_equal(matrix.read_float32(start, stop), whole[start:stop])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_on_the_way(models: Path, tmp_path: Path, bits: int) -> None:
    kind = (models / "kind").read_text()
    file = config_with(models, kind, dtype="float32")
    plain = merge(file, tmp_path / "plain", measure=False).path
    out = merge(file, tmp_path / "out", bits=bits, group_size=32, measure=False).path
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert quantization == {"group_size": 32, "bits": bits, "mode": "affine"}
    found = np.array(load_model(out)[0](mx.array([TOKENS])))
    # The same weights, stacked and quantized by others: mlx-lm and MLX.
    model, _ = load_model(plain)
    exact = np.array(model(mx.array([TOKENS])))
    nn.quantize(
        model,
        32,
        bits,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and not path.endswith((".gate", "_gate"))
        ),
    )
    np.testing.assert_array_equal(found, np.array(model(mx.array([TOKENS]))))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < {4: 0.5, 8: 0.03}[bits]
    stock, _ = stock_load_model(out)
    if kind == "llama":
        np.testing.assert_array_equal(np.array(stock(mx.array([TOKENS]))), found)
    else:
        assert stock.layers[0].mlp.switch_mlp.down_proj.bits == bits


def test_widths_that_no_group_divides_stay_as_they_are(tmp_path: Path) -> None:
    write_models(tmp_path, hidden=32, intermediate=40)
    merged = merge(write_merge_config(tmp_path), tmp_path / "out", bits=4, measure=False)
    assert merged.unquantized == [
        f"model.layers.{n}.block_sparse_moe.switch_mlp.down_proj" for n in range(2)
    ]
    stock, _ = stock_load_model(merged.path)
    assert np.isfinite(np.array(stock(mx.array([TOKENS])))).all()


def test_parameters_that_a_token_meets(models: Path, tmp_path: Path) -> None:
    merged = merge(
        config_with(models, (models / "kind").read_text()), tmp_path / "out", measure=False
    )
    tensors = read_arrays(next(merged.path.glob("*.safetensors")))
    assert merged.mixture.parameters.total == sum(tensor.size for tensor in tensors.values())
    idle = sum(tensor.size for name, tensor in tensors.items() if ".experts.2." in name)
    assert merged.mixture.parameters.active == merged.mixture.parameters.total - idle
    assert merged.rows[-1].params == merged.mixture.parameters.total


def test_models_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, experts=1)
    newer = write_dense(tmp_path / "newer", seed=8, tokenizer=False)
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(b"the same weights once more")
    experts = [
        {"source_model": "them/expert@v1", "positive_prompts": ["a"]},
        {"source_model": "them/expert", "positive_prompts": ["b"]},
        {"source_model": "./expert_0", "positive_prompts": ["c"]},
    ]
    file = write_merge_config(tmp_path, base_model="us/base", experts=experts)
    hub = Hub()
    hub.add("us/base", tmp_path / "base")
    old, new = hub.add("them/expert", tmp_path / "expert_0", newer)
    with opened(hub, tmp_path, monkeypatch):
        out = merge(file, tmp_path / "out", measure=False).path
    assert "consolidated.safetensors" not in hub.files_asked("us/base")
    report = json.loads((out / "merge.json").read_text())
    assert [expert["revision"] for expert in report["experts"]] == [old, new, None]
    assert [expert["name"] for expert in report["experts"]][1:] == ["them/expert", "expert_0"]
    tensors = read_arrays(next(out.glob("*.safetensors")))
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    first, second, third = (tensors[name.format(n)] for n in range(3))
    np.testing.assert_array_equal(first, third)
    assert (first != second).all()


def test_a_model_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, experts=1)
    opened = []
    read = sources.read_shards

    def read_shards(folder: Path) -> Any:
        opened.append(folder.name)
        return read(folder)

    monkeypatch.setattr(sources, "read_shards", read_shards)
    names = ("./expert_0", "expert_0", "./base", "./base/../expert_0")
    experts = [{"source_model": name, "positive_prompts": [name]} for name in names]
    merge(write_merge_config(tmp_path, experts=experts), tmp_path / "out", measure=False)
    assert opened == ["base", "expert_0"]


def test_adapters_are_no_models(tmp_path: Path) -> None:
    write_models(tmp_path)
    with pytest.raises(OutlierError, match="fuse it first"):
        merge(write_merge_config(tmp_path, base_model="us/base+them/lora"), tmp_path / "out")


def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    """As MLX and Python count what they allocate, which no machine's load changes."""
    write_models(tmp_path, hidden=128, intermediate=512, layers=12, dtype="BF16")
    experts = [
        {"source_model": f"./expert_{n}", "positive_prompts": [t]} for n, t in enumerate("abc")
    ]
    file = write_merge_config(tmp_path, experts=experts)
    layer = 4 * (3 * 128 * 512 + 3 * 128 * 128)  # an FFN, and attention, in float32
    before = at_rest()
    tracemalloc.start()
    try:
        merged = merge(file, tmp_path / "out", measure=True)
        _, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert merged.rows[-1].nbytes > 10 * layer
    assert mx.get_peak_memory() - before < 1.5 * layer
    assert python_peak < 3 * layer
    assert mx.get_active_memory() - before < 100_000
