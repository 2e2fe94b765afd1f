"""Overlays on bases of every family: against the NumPy reference, and against the base itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.tiers.verify import verify_tier
from tests import builders, damage, form_builders
from tests.engine import (
    assert_decisive,
    assert_same_run,
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

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.9}

BASES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 24, "tied": True},
    "qwen3-yarn": {"family": "qwen3", "head_dim": 32, "yarn": YARN},
    "llama": {"family": "llama", "rope_theta": 5e5, "eps": 1e-5, "tied": True, "seed": 1},
    "llama3-rope": {"family": "llama", "rope_theta": 5e5, "scaling": LLAMA3},
    "llama-linear": {
        "family": "llama",
        "rope_theta": 1e4,
        "scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama-biases": {"family": "llama", "biases": True, "kv_heads": 4},
    "mistral": {"family": "mistral", "eps": 1e-5},
    "mistral-nemo": {"family": "mistral", "head_dim": 20, "eps": 1e-5, "kv_heads": 1},
}


def use_attention_factor(model: Any) -> None:
    """That of `YARN`, in mlx-lm's own model, which does not know it."""
    for layer in model.layers:
        layer.self_attn.rope.mscale = YARN["attention_factor"]


@pytest.mark.parametrize("name", BASES)
def test_the_reference_computes_each_base_as_mlx_lm_does(name: str, tmp_path: Path):
    built = builders.write_base(tmp_path / "base", base_dtype="F32", tokenizer=False, **BASES[name])
    model, _ = mlx_lm_load_model(built.path)
    if "yarn" in BASES[name]:
        use_attention_factor(model)
    prompt = built.prompt(80)
    expected = reference_trace(read_overlay(built.path), prompt).logits
    assert_logits_close(forward(model, prompt), expected)
    assert np.abs(expected).max() > 1


# Tiers


def build(path: Path, name: str, **options: Any) -> tuple[builders.Built, Path | None]:
    """An overlay, and the folder of its base where that is not inside; float32 throughout."""
    options = {"base_dtype": "F32"} | BASES[name] | options
    built = builders.write_overlay(path / "overlay", tokenizer=False, **options)
    if options.get("with_base", True):
        return built, None
    kept = ("base_dtype", "rope", *builders.Dims.__dataclass_fields__)
    options = {key: value for key, value in options.items() if key in kept}
    return built, builders.write_base(path / "base", shards=2, tokenizer=False, **options).path


def say_no_base(folder: Path) -> None:
    """As overlays are that do not name the family of their base."""
    damage.edit_config(folder, model_type="outlier_moe", base_model_type=damage.REMOVE)


@pytest.mark.parametrize("form", ["v32", "real", "per-file", "packed"])
@pytest.mark.parametrize("name", BASES)
def test_forward_and_greedy(name: str, form: str, tmp_path: Path):
    """With the base inside or beside, in four forms on disk."""
    written = "real" if form == "real" else "v32"
    with_base = form in ("v32", "real")
    built, base = build(tmp_path, name, form=written, with_base=with_base)
    reference = read_overlay(built.path, base)
    if form == "per-file":
        form_builders.to_expert_files(built)
    if form == "packed":
        form_builders.to_packed(built)
    if not with_base:
        say_no_base(built.path)
    tier = tier_of(built.path, base, tmp_path / "tier")
    verify_tier(tier)
    model = load(tier)
    prompt = built.prompt(35)
    expected = reference_trace(reference, prompt)
    assert_decisive(expected, reference.top_k)
    assert_same_run(trace(model, prompt), expected)
    tokens, logits = greedy(reference, prompt[:7], 8)
    assert np.diff(np.sort(logits, axis=-1)[:, -2:]).min() > 1e-3
    found, found_logits = greedy_cached(model, prompt[:7], 8, chunks=(4,))
    assert found == tokens
    assert_logits_close(found_logits, logits)


@pytest.mark.parametrize("name", BASES)
def test_without_alpha_it_is_exactly_the_base(name: str, tmp_path: Path):
    built, base = build(tmp_path, name, with_base=False)
    silent = tmp_path / "zero.json"
    silent.write_text(json.dumps({str(n): [0.0] * 4 for n in built.dims.routed_layers}))
    model = load(tier_of(built.path, base, tmp_path / "tier", alpha=silent))
    assert base is not None
    stock, _ = mlx_lm_load_model(base)
    if "yarn" in BASES[name]:
        use_attention_factor(stock)
    for length in (1, 6, 40):
        prompt = built.prompt(length)
        np.testing.assert_array_equal(forward(model, prompt), forward(stock, prompt))


@pytest.mark.parametrize("name", BASES)
def test_a_tiers_own_code_computes_the_same(name: str, tmp_path: Path):
    built, _ = build(tmp_path, name)
    prompt = built.prompt(20)
    for recipe in ({}, {"tier": "q4"}):
        tier = tier_of(built.path, None, tmp_path / recipe.get("tier", "f32"), **recipe)
        own, _ = mlx_lm_load_model(tier, trust_remote_code=True)
        assert type(own).__module__ == "custom_model"
        np.testing.assert_array_equal(forward(own, prompt), forward(load(tier), prompt))


@pytest.mark.parametrize("format", ["overlay", "packed"])
@pytest.mark.parametrize("name", BASES)
def test_an_export_reads_back_as_the_same_tier(name: str, format: str, tmp_path: Path):
    built, _ = build(tmp_path, name)
    tier = tier_of(built.path, None, tmp_path / "tier")
    export_tier(tier, tmp_path / "export", format)
    again = tier_of(tmp_path / "export", None, tmp_path / "again")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tier, again)]
    assert configs[0] == configs[1]
    name = "model-00001-of-00001.safetensors"
    assert (tier / name).read_bytes() == (again / name).read_bytes()
