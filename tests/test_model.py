"""Synthetic overlays of many shapes through the converter and the loader, against the reference
model: what the goldens do not have, and what strangers can check without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen2
from mlx_lm.utils import load_model as mlx_lm_load_model

from tests import builders, damage
from tests.engine import (
    as_array,
    assert_decisive,
    assert_same_run,
    engine,
    forward,
    greedy_cached,
    load,
    tier_of,
    trace,
)
from tests.goldens import assert_logits_close
from tests.reference import greedy
from tests.reference import trace as reference_trace
from tests.reference_reader import read_overlay

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
# Widths that neither the 5 trits of a byte, nor 20 of a word, nor the group of 32 divides.
ODD = {"hidden": 44, "heads": 2, "kv_heads": 1, "intermediate": 50, "expert_intermediate": 37}

CASES: dict[str, dict[str, Any]] = {
    "v32": {},
    "real": {"form": "real", "scale_form": "per_row", "alpha": "json", "shards": 3},
    "real-tied": {"form": "real", "tied": True, "alpha": "none", "moe_layers": None},
    "scales-mixed": {"scale_form": ("0d", "per_row", "flat_row"), "scale_dtype": "F32"},
    "alpha-partial": {"alpha": "partial", "shards": 2, "base_dtype": "F16"},
    "alpha-both": {"alpha": "both", "base_dtype": "F32", "rope": "both"},
    "base-beside": {"with_base": False, "alpha": "json", "shards": 2, "rope": "new"},
    "base-beside-real-tied": {"with_base": False, "form": "real", "tied": True},
    "eps-theta": {"eps": 1e-3, "rope_theta": 1e4, "kv_heads": 4},
    "odd-widths": {**ODD, "scale_form": "per_row"},
    "odd-widths-short": {**ODD, "hidden": 12, "expert_intermediate": 3, "experts": 3, "seed": 5},
    "group-of-128": {"hidden": 128, "expert_intermediate": 256, "kv_heads": 1},
    "one-expert": {"experts": 1, "top_k": 2},
    "all-experts": {"experts": 3, "top_k": 5},
    "nine-experts": {"experts": 9, "top_k": 4, "expert_intermediate": 33, "seed": 4},
    "top-1": {"experts": 5, "top_k": 1},
    "dense-between": {"layers": 5, "moe_layers": (0, 3)},
    "yarn": {"yarn": YARN},
    "yarn-new-fields": {"yarn": YARN | {"attention_factor": 0.8}, "rope": "new"},
    "yarn-betas": {"yarn": YARN | {"factor": 2.5, "beta_fast": 8.0, "beta_slow": 0.5}},
    "yarn-shrinking": {"yarn": YARN | {"factor": 0.5}, "rope": "both"},
    "yarn-no-ramp": {"yarn": YARN | {"original_max_position_embeddings": 4}},
}
BASE_OPTIONS = ("base_dtype", "rope", *builders.Dims.__dataclass_fields__)


def build(path: Path, options: dict[str, Any]) -> tuple[builders.Built, Path | None]:
    """An overlay, and the folder of its base where that is not inside."""
    built = builders.write_overlay(path / "overlay", tokenizer=False, **options)
    if options.get("with_base", True):
        return built, None
    options = {key: value for key, value in options.items() if key in BASE_OPTIONS}
    return built, builders.write_base(path / "base", shards=2, tokenizer=False, **options).path


@pytest.mark.parametrize("name", CASES)
def test_forward_and_greedy(name: str, tmp_path: Path):
    built, base = build(tmp_path, CASES[name])
    reference = read_overlay(built.path, base)
    model = engine(built.path, base, tmp_path / "tier")
    assert model.args.moe_layers == list(built.dims.routed_layers)
    for layer, alphas in built.alphas.items():
        np.testing.assert_array_equal(np.array(model.layers[layer].mlp.alpha), alphas)

    prompt = built.prompt(35)  # with two experts a token: sorted by expert
    expected = reference_trace(reference, prompt)
    assert_decisive(expected, reference.top_k)
    assert_same_run(trace(model, prompt), expected)

    tokens, logits = greedy(reference, prompt[:7], 8)
    assert np.diff(np.sort(logits, axis=-1)[:, -2:]).min() > 1e-3  # else use another seed
    found, found_logits = greedy_cached(model, prompt[:7], 8, chunks=(4,))
    assert found == tokens
    assert_logits_close(found_logits, logits)


@pytest.mark.parametrize("name", ["v32", "real", "scales-mixed", "nine-experts"])
def test_experts_in_mlx_own_format(name: str, tmp_path: Path):
    options = CASES[name] | {"expert_intermediate": 96}
    built, base = build(tmp_path, options)
    reference = read_overlay(built.path, base)
    expected = reference_trace(reference, built.prompt(35))
    assert_decisive(expected, reference.top_k)
    model = engine(built.path, base, tmp_path / "affine2", experts="affine2")
    assert_same_run(trace(model, built.prompt(35)), expected)
    rows = engine(built.path, base, tmp_path / "rows", experts="tq1_0")
    for length in (3, 35):
        prompt = built.prompt(length)
        np.testing.assert_array_equal(forward(model, prompt), forward(rows, prompt))


def plain_qwen2(built: builders.Built, tier: Path, dtype: mx.Dtype) -> nn.Module:
    """mlx-lm's own model of the base in a folder of its own, quantized as the tier is."""
    config = json.loads((tier / "config.json").read_text())
    quantization = config.get("quantization")
    config = built.config | {"model_type": "qwen2"}
    weights = {key: mx.array(value).astype(dtype) for key, value in built.base.items()}
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.load_weights(list(weights.items()))
    if quantization:
        nn.quantize(model, quantization["group_size"], quantization["bits"])
    return model


def silence(built: builders.Built, how: str) -> dict[str, Any]:
    """Take all effect from the experts; returns what to tell the converter."""
    dims = built.dims
    if how == "alpha":
        table = {str(n): [0.0] * dims.experts for n in dims.routed_layers}
        (built.path / "zero.json").write_text(json.dumps(table))
        return {"alpha": built.path / "zero.json"}
    for (layer, expert, part), trits in built.trits.items():
        if how == "scales" or part == "down":
            leaf = "scale" if how == "scales" else "ternary"
            key = f"model.layers.{layer}.mlp.experts.{expert}.{part}_{leaf}"
            old = built.scales[layer, expert, part] if how == "scales" else trits
            damage.replace_tensor(built.path, key, np.zeros_like(old))
    return {}


@pytest.mark.parametrize(
    ("how", "recipe"),
    [("alpha", "f32"), ("trits", "f32"), ("scales", "f32")]
    + [("alpha", "bf16"), ("trits", "q4"), ("scales", "q8")],
)
def test_silent_experts_leave_exactly_the_base(how: str, recipe: str, tmp_path: Path):
    built = builders.write_overlay(
        tmp_path / "overlay", base_dtype="F32", tokenizer=False, shards=2
    )
    loud = engine(built.path, None, tmp_path / "loud", tier=recipe, dtype="float32")
    tier = tier_of(built.path, None, tmp_path / "tier", tier=recipe, **silence(built, how))
    dtypes = {"f32": mx.float32, "bf16": mx.bfloat16}
    stored = dtypes.get(recipe, mx.bfloat16)
    for activation in ("float32", "bfloat16"):
        model = load(tier, activation)
        base = plain_qwen2(built, tier, stored)
        base.set_dtype(getattr(mx, activation))
        for length in (1, 5, 40):
            tokens = mx.array([built.prompt(length)])
            np.testing.assert_array_equal(as_array(model(tokens)), as_array(base(tokens)))
    assert np.abs(forward(loud, built.prompt()) - forward(model, built.prompt())).max() > 0.5


def test_an_alpha_file_wins_over_tensors_for_what_it_names(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, alpha="both")
    override = tmp_path / "mine.json"
    override.write_text(json.dumps({"layer_3": {"expert_1": -2.5}}))
    model = engine(built.path, None, tmp_path / "tier", alpha=override)
    expected = built.alphas[3].copy()
    expected[1] = -2.5
    np.testing.assert_array_equal(np.array(model.layers[3].mlp.alpha), expected)
    np.testing.assert_array_equal(np.array(model.layers[1].mlp.alpha), built.alphas[1])


def test_a_base_without_attention_biases(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False)
    plain = builders.write_overlay(tmp_path / "plain", tokenizer=False)
    for layer in range(built.dims.layers):
        for name in "qkv":
            key = f"model.layers.{layer}.self_attn.{name}_proj.bias"
            damage.replace_tensor(built.path, key, np.zeros_like(built.base[key]))
            damage.drop_tensor(plain.path, key)
    zeros = engine(built.path, None, tmp_path / "zeros")
    none = engine(plain.path, None, tmp_path / "none")
    np.testing.assert_array_equal(forward(zeros, built.prompt()), forward(none, built.prompt()))


def test_what_an_overlay_leaves_unsaid_is_as_in_the_base(tmp_path: Path):
    dims: dict[str, Any] = {"eps": 1e-3, "rope_theta": 1e4, "tied": True}
    options = {"with_base": False, "tokenizer": False, **dims}
    built = builders.write_overlay(tmp_path / "overlay", **options)
    base = builders.write_base(tmp_path / "base", tokenizer=False, **dims).path
    whole = engine(built.path, base, tmp_path / "whole")
    unsaid = dict.fromkeys(
        ["rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings"],
        damage.REMOVE,
    )
    damage.edit_config(built.path, **unsaid)
    model = engine(built.path, base, tmp_path / "tier")
    np.testing.assert_array_equal(forward(model, built.prompt()), forward(whole, built.prompt()))


def test_an_overlay_that_repeats_its_base_is_the_same_model(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, base_dtype="BF16")
    base = builders.write_base(tmp_path / "base", tokenizer=False, base_dtype="BF16").path
    alone = tier_of(built.path, None, tmp_path / "alone", tier="q4")
    both = tier_of(built.path, base, tmp_path / "both", tier="q4")
    name = "model-00001-of-00001.safetensors"
    assert (alone / name).read_bytes() == (both / name).read_bytes()
    configs = [json.loads((tier / "config.json").read_text()) for tier in (alone, both)]
    assert configs[0] == configs[1]


def test_mlx_lm_loads_a_tier_only_when_told_to_trust_it(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False)
    tier = tier_of(built.path, None, tmp_path / "tier")
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm_load_model(tier)
    model, _ = mlx_lm_load_model(tier, trust_remote_code=True)
    assert type(model).__module__ == "custom_model"
    np.testing.assert_array_equal(
        forward(model, built.prompt()), forward(load(tier), built.prompt())
    )
