"""What overlays and bases of several families say of each other, and what is refused of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_lm_load_model

from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.loading import load as load_with_tokenizer
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.tiers.verify import verify_tier
from tests import builders, damage
from tests.engine import forward, load, tier_of
from tests.goldens import assert_logits_close
from tests.reference import forward as reference_forward
from tests.reference_reader import read_overlay
from tests.test_bases import LLAMA3, YARN

WIDE: dict[str, Any] = {"family": "qwen3", "head_dim": 24}
ALL_BIASES: dict[str, Any] = {"family": "llama", "biases": True}


def pair(path: Path, **dims: Any) -> tuple[Path, Path]:
    """An overlay that does not contain its base, and the base."""
    built = builders.write_overlay(path / "overlay", with_base=False, tokenizer=False, **dims)
    return built.path, builders.write_base(path / "base", tokenizer=False, **dims).path


def tier_config(tier: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tier / "config.json").read_text())
    return config


# What is left unsaid


@pytest.mark.parametrize(
    "dims",
    [
        WIDE | {"tied": True, "kv_heads": 1, "yarn": YARN},
        ALL_BIASES | {"scaling": LLAMA3, "eps": 1e-3},
        {"family": "mistral", "head_dim": 8, "rope_theta": 1e4},
    ],
    ids=["qwen3", "llama", "mistral"],
)
def test_what_an_overlay_leaves_unsaid_is_as_in_the_base(dims: dict[str, Any], tmp_path: Path):
    overlay, base = pair(tmp_path, **dims)
    whole = tier_of(overlay, base, tmp_path / "whole")
    kept = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"]
    kept += ["vocab_size", "n_experts", "top_k", "moe_layer_indices"]
    config = json.loads((overlay / "config.json").read_text())
    (overlay / "config.json").write_text(json.dumps({name: config[name] for name in kept}))
    tier = tier_of(overlay, base, tmp_path / "tier")
    told = [tier_config(folder) for folder in (tier, whole)]
    for name in told[1]:
        assert told[0].get(name) == told[1][name], name
    assert told[0]["base_model_type"] == dims["family"]
    built = builders.Built(overlay, builders.Dims(**dims), {}, {})
    tokens = built.prompt(30)
    np.testing.assert_array_equal(forward(load(tier), tokens), forward(load(whole), tokens))


@pytest.mark.parametrize(
    ("family", "unsaid", "expected"),
    [
        ("llama", "rope_theta", 1e4),
        ("qwen3", "rope_theta", 1e4),
        ("mistral", "num_key_value_heads", 8),
        ("qwen3", "head_dim", 128),
    ],
)
def test_what_a_base_leaves_unsaid_is_as_in_transformers(
    family: str, unsaid: str, expected: float, tmp_path: Path
):
    dims: dict[str, Any] = {"family": family, "heads": 8, "kv_heads": 8, "layers": 2}
    dims |= {"moe_layers": (1,), "head_dim": 128 if family == "qwen3" else None}
    overlay, base = pair(tmp_path, **dims)
    for folder in (overlay, base):
        damage.edit_config(folder, **{unsaid: damage.REMOVE})
    assert tier_config(tier_of(overlay, base, tmp_path / "tier"))[unsaid] == expected


def test_a_tier_on_qwen2_does_not_name_it(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False)
    assert "base_model_type" not in tier_config(tier_of(built.path, None, tmp_path / "tier"))


# What does not fit


def test_an_overlay_for_another_family(tmp_path: Path):
    overlay, _ = pair(tmp_path, family="llama")
    base = builders.write_base(tmp_path / "other", tokenizer=False, family="mistral").path
    with pytest.raises(CheckpointError, match="overlay's base is llama, this one is mistral"):
        tier_of(overlay, base, tmp_path / "tier")


@pytest.mark.parametrize(("field", "value"), [("head_dim", 32), ("num_key_value_heads", 4)])
def test_an_overlay_that_says_otherwise(field: str, value: int, tmp_path: Path):
    overlay, base = pair(tmp_path, **WIDE)
    damage.edit_config(overlay, **{field: value})
    with pytest.raises(CheckpointError, match=f"different models.* {value} and"):
        tier_of(overlay, base, tmp_path / "tier")


@pytest.mark.parametrize("inside", [True, False])
def test_tensors_of_another_family_are_not_ignored(inside: bool, tmp_path: Path):
    """Norms of heads beside a config that says nothing of Qwen3 would change every logit."""
    dims: dict[str, Any] = {"family": "qwen3", "head_dim": 16}  # as Qwen2's heads would be
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, with_base=inside, **dims)
    base = None
    if not inside:
        base = builders.write_base(tmp_path / "base", tokenizer=False, **dims).path
    for folder in filter(None, (built.path, base)):
        damage.edit_config(folder, model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"q_norm\.weight: a qwen2 model has no such tensor"):
        tier_of(built.path, base, tmp_path / "tier")
    damage.edit_config(built.path, base_model_type="qwen3", model_type="outlier_moe")
    if inside:
        verify_tier(tier_of(built.path, base, tmp_path / "tier"))


@pytest.mark.parametrize(
    ("dims", "name"),
    [
        (WIDE, "self_attn.k_norm.weight"),
        (ALL_BIASES, "self_attn.q_proj.bias"),
        (ALL_BIASES, "self_attn.o_proj.bias"),
        (ALL_BIASES, "mlp.down_proj.bias"),
    ],
)
def test_a_missing_tensor(dims: dict[str, Any], name: str, tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **dims)
    for layer in range(4):
        damage.drop_tensor(built.path, f"model.layers.{layer}.{name}")
    with pytest.raises(CheckpointError, match=rf"layers\.0\.{name} \(\d+,\) is missing"):
        tier_of(built.path, None, tmp_path / "tier")


def test_a_norm_of_another_width(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **WIDE)
    damage.replace_tensor(built.path, "model.layers.2.self_attn.q_norm.weight", np.ones(16))
    with pytest.raises(CheckpointError, match=r"layers\.2.*q_norm\.weight.*\(16,\).*\(24,\)"):
        tier_of(built.path, None, tmp_path / "tier")


@pytest.mark.parametrize(
    ("dims", "change", "message"),
    [
        (WIDE, {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        (WIDE, {"attention_bias": True}, "attention_bias True is not supported by mlx-lm's qwen3"),
        (WIDE, {"head_dim": 23}, "odd width, 23"),
        (WIDE, {"head_dim": -2}, "head_dim is -2"),
        (WIDE, {"rope_scaling": LLAMA3}, "rope_scaling 'llama3', expected yarn"),
        (WIDE, {"base_model_type": "qwen4"}, "base_model_type 'qwen4', expected llama, mistral"),
        ({"family": "llama"}, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"family": "llama"}, {"rope_scaling": LLAMA3 | {"factor": 0}}, "factor is 0"),
        (
            {"family": "llama"},
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
            "low_freq_factor is missing",
        ),
        ({"family": "llama"}, {"rope_scaling": {"type": "longrope"}}, "rope_scaling 'longrope'"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_run(
    dims: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **dims)
    damage.edit_config(built.path, **change)
    with pytest.raises(CheckpointError, match=message):
        tier_of(built.path, None, tmp_path / "tier")


@pytest.mark.parametrize("name", ["os", "../evil", "kimi_vl", 7, ["qwen3"]])
def test_a_tier_that_names_no_base_of_ours(name: Any, tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False)
    tier = tier_of(built.path, None, tmp_path / "tier")
    damage.edit_config(tier, base_model_type=name)
    with pytest.raises(CheckpointError, match=r"base_model_type .*expected llama, mistral"):
        load(tier)


# Windows


def test_a_window_that_mlx_lm_does_not_keep_is_told(tmp_path: Path):
    overlay, base = pair(tmp_path, family="mistral")
    damage.edit_config(base, sliding_window=16)
    with pytest.warns(CheckpointWarning, match="beyond 16 tokens, results differ"):
        tier_of(overlay, base, tmp_path / "tier")
    damage.edit_config(base, sliding_window=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tier_of(overlay, base, tmp_path / "without")


def test_windows_that_mlx_lm_keeps(tmp_path: Path):
    overlay, base = pair(tmp_path, family="llama", base_dtype="F32")
    full, window = "full_attention", "sliding_attention"
    damage.edit_config(base, sliding_window=8, layer_types=[full, window, window, full])
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"1": [0.0] * 4, "3": [0.0] * 4}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tier = tier_of(overlay, base, tmp_path / "tier", alpha=zero)
    model, (stock, _) = load(tier), mlx_lm_load_model(base)
    tokens = list(range(40))
    np.testing.assert_array_equal(forward(model, tokens), forward(stock, tokens))
    caches = make_prompt_cache(model), make_prompt_cache(stock)
    for piece in (tokens[:20], tokens[20:21], tokens[21:40]):
        ours, theirs = (forward(m, piece, c) for m, c in zip((model, stock), caches, strict=True))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("types", [["sliding_attention"] * 4, ["full_attention"] * 3, ["x"] * 4])
def test_windows_that_mlx_lm_cannot_run(types: list[str], tmp_path: Path):
    overlay, base = pair(tmp_path, family="llama")
    damage.edit_config(base, sliding_window=8, layer_types=types)
    with pytest.raises(CheckpointError, match="layer_types"):
        tier_of(overlay, base, tmp_path / "tier")


# Tokenizers, sizes, and stock models


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_transformers_reads_the_tokenizer_of_a_tier(kind: str, tmp_path: Path):
    """It reads config.json for it, and must not fail on how positions are scaled."""
    scaling = LLAMA3 if kind == "llama3" else {"rope_type": kind, "factor": 2.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    built = builders.write_overlay(tmp_path / "overlay", family="llama", scaling=scaling)
    tier = tier_of(built.path, None, tmp_path / "tier")
    model, tokenizer = load_with_tokenizer(tier)
    assert tokenizer.encode("hello")
    expected = reference_forward(read_overlay(built.path), built.prompt(70))
    assert_logits_close(forward(model, built.prompt(70)), expected)


@pytest.mark.parametrize("dims", [WIDE, ALL_BIASES, {"family": "mistral", "head_dim": 8}], ids=str)
def test_sizes(dims: dict[str, Any], tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **dims)
    tier = tier_of(built.path, None, tmp_path / "tier")
    base = sum(tensor.size for tensor in built.base.values())
    experts = sum(trits.size for trits in built.trits.values())
    routers = sum(router.size + len(router) for router in built.routers.values())
    size = built.dims
    cache = 2 * size.layers * size.kv_heads * size.head_width * 2
    for folder in (built.path, tier):
        found = inspect(folder)
        assert found.params == base + experts + routers
        assert found.kv_bytes_per_token == cache
        assert found.base_architecture == size.family


PORTABLE: dict[str, Any] = {"intermediate": 192, "expert_intermediate": 96, "moe_layers": (1, 2)}


@pytest.mark.parametrize(
    "dims",
    [
        {"family": "llama"},
        {"family": "llama", "biases": True},
        {"family": "mistral", "head_dim": 20, "kv_heads": 1},
    ],
    ids=str,
)
def test_a_portable_tier(dims: dict[str, Any], tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **PORTABLE, **dims)
    tier = tier_of(built.path, None, tmp_path / "tier", portable=True)
    stock, _ = mlx_lm_load_model(tier, trust_remote_code=False)
    expected = reference_forward(read_overlay(built.path), built.prompt())
    assert_logits_close(forward(stock, built.prompt()), expected)
    verify_tier(tier)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        (WIDE, "norms of queries and keys"),
        ({"family": "llama", "scaling": LLAMA3}, r"scales positions \(llama3\)"),
    ],
    ids=str,
)
def test_what_no_portable_tier_can_be(dims: dict[str, Any], reason: str, tmp_path: Path):
    built = builders.write_overlay(tmp_path / "overlay", tokenizer=False, **PORTABLE, **dims)
    with pytest.raises(CheckpointError, match=f"no portable tier: .*{reason}"):
        tier_of(built.path, None, tmp_path / "tier", portable=True)
