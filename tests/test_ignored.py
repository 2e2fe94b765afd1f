"""What configs ask for and no model here does: refused where results change, else told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.engine.loading import check_model
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.models.config import check_plain, parse_config
from outlier_mlx.models.families import families, family
from outlier_mlx.models.ignored import ROUTING
from outlier_mlx.models.spelling import normalised
from tests.builders import Dims, model_config, write_base, write_overlay
from tests.damage import REMOVE, edit_config
from tests.engine import tier_of
from tests.merging import write_merge_config, write_models
from tests.program import assert_refused, run

DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}
EXPERTS: dict[str, Any] = {"moe_layers": (1,), "experts": 2, "expert_intermediate": 64}
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A sound config of a family, with 32768 positions."""
    config = model_config(Dims(layers=4, family=name)) | {"max_position_embeddings": 32768}
    if name == "mixtral":
        config |= {"num_local_experts": 2}
    if name == "qwen2_moe":
        config |= {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return normalised(config | changes)


def notes_of(name: str, **changes: Any) -> list[str]:
    """What is told of a plain model."""
    return check_plain(config_of(name, **changes), "config.json")


# Windows

SWITCHED = {"use_sliding_window": True, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("qwen2", SWITCHED, 4096),
        ("qwen2", SWITCHED | {"sliding_window": 512}, 512),
        ("qwen3", SWITCHED | {"sliding_window": 512, "head_dim": 16}, 512),
        ("qwen2", {"use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL, FULL]}, 4096),
        ("qwen2_moe", {"use_sliding_window": True}, 4096),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 1024}, 1024),
        ("mixtral", {"sliding_window": 1024}, 1024),
        # What means that there is none.
        ("qwen2", {"sliding_window": 512}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 512}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512}, None),  # from layer 28 on
        ("qwen2", SWITCHED | {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": True, "layer_types": [FULL] * 4}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"max_position_embeddings": 4096}, None),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL, SLIDING] * 2}, None),  # honoured
        ("mixtral", {}, None),
        ("llama", {}, None),
    ],
    ids=str,
)
def test_windows_as_transformers_has_them(
    name: str, changes: dict[str, Any], window: int | None
) -> None:
    expected = [f"mlx-lm has no sliding window here: beyond {window} tokens, results differ"]
    assert notes_of(name, **changes) == (expected if window else [])


def test_transformers_has_these_defaults() -> None:
    """The values that stand here for missing fields are its own."""
    from transformers import AutoConfig

    for name, known in families().items():
        own = AutoConfig.for_model(name)
        on = AutoConfig.for_model(name, use_sliding_window=True)
        assert getattr(on, "sliding_window", None) == known.window, name
        if known.window_from:
            assert getattr(own, known.window_from) == 28
        for field, harmless in known.refused.items():
            assert getattr(own, field) in harmless, (name, field)


# Fields that would change results


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"attention_bias": True, "head_dim": 16}),
        ("qwen2_moe", {"qkv_bias": False}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("qwen2_moe", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 0.5}}),
    ],
    ids=str,
)
def test_what_mlx_lm_would_ignore_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as error:
        notes_of(name, **changes)
    last = str(changes[next(iter(changes))])
    words = {"rope_parameters": "partial_rotary_factor", "rope_scaling": "rope"}
    field = next(iter(changes))
    assert words.get(field, field) in str(error.value), last
    # What is made is checked by the same rules.
    if "import" in family(name).roles:
        with pytest.raises(CheckpointError):
            parse_config(config_of(name, **changes), role="import")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_moe", {"qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        ("qwen2_moe", {"norm_topk_prob": False}),  # honoured, as True is
        ("llama", {"partial_rotary_factor": 1.0, "hidden_act": "silu"}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_scaling": YARN}),
        ("qwen3", {"attention_bias": False, "head_dim": 16}),
        ("qwen2", {"logit_scale": None, "final_logit_softcapping": 0, "residual_multiplier": 1.0}),
    ],
    ids=str,
)
def test_what_changes_nothing_is_not_told(name: str, changes: dict[str, Any]) -> None:
    assert notes_of(name, **changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_scale": 0.0625},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 144},
        {"residual_multiplier": 0.22},
        {"embedding_multiplier": 12},
        {"no_rope_layers": [3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_fields_of_other_families_are_told_of(name: str, changes: dict[str, Any]) -> None:
    (field, value), *_ = changes.items()
    said = f"{field} {value} is ignored: models of the family {name} have no such field"
    assert notes_of(name, **changes) == [said]


# Overlays and tiers

ROUTED = {
    "scoring_func": "sigmoid",
    "moe_gate_act": "sigmoid",
    "moe_router_activation_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 30.0,
}


@pytest.mark.parametrize("field", ROUTING)
def test_another_way_to_choose_experts_is_refused(field: str, tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", tokenizer=False, **DIMS, **EXPERTS).path
    for value in ROUTING[field]:
        edit_config(overlay, **{field: value})
        tier = tier_of(overlay, None, tmp_path / "tier", force=True)
        check_model(tier)
    edit_config(overlay, **{field: ROUTED[field]})
    refused = run("convert", overlay, "--out", tmp_path / "other", code=1)
    assert_refused(refused, "config.json", f"{field} {ROUTED[field]!r}")
    edit_config(tier, **{field: ROUTED[field]})
    with pytest.raises(CheckpointError, match=f"{field} "):
        check_model(tier)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False is ignored: the weights of a token's"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 is ignored: the tensors say"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers [0] is ignored"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is ignored"),
        ({"logit_scale": 0.5}, "logit_scale 0.5 is ignored: models of the family qwen2"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "beyond 64"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config {'quant_method'"),
    ],
    ids=str,
)
def test_convert_and_load_tell_once(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    overlay = write_overlay(tmp_path / "overlay", **DIMS, **EXPERTS).path
    edit_config(overlay, **changes)
    told = run("convert", overlay, "--out", tmp_path / "tier").err
    assert told.count(said) == 1, told
    if "quantization_config" not in changes:  # which the tier's own replaces
        told = run("generate", "--model", tmp_path / "tier", "--prompt", "a", "--max-tokens", 1).err
        assert told.count(said) == 1, told


def test_names_of_sizes_that_overlays_use_count_for_windows(tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", tokenizer=False, **DIMS, **EXPERTS).path
    changes = {"num_hidden_layers": REMOVE, "n_layers": 2, "max_position_embeddings": REMOVE}
    edit_config(overlay, **changes, max_seq_len=32768, use_sliding_window=True, max_window_layers=1)
    with pytest.warns(CheckpointWarning, match="beyond 4096 tokens"):
        tier_of(overlay, None, tmp_path / "tier")
    edit_config(overlay, max_window_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tier_of(overlay, None, tmp_path / "other")


@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
def test_a_quantized_base_is_refused(tmp_path: Path, field: str) -> None:
    overlay = write_overlay(tmp_path / "o", with_base=False, tokenizer=False, **DIMS, **EXPERTS)
    base = write_base(tmp_path / "base", tokenizer=False, **DIMS).path
    edit_config(base, **{field: {"bits": 4, "group_size": 64, "quant_method": "hqq"}})
    refused = run("convert", overlay.path, "--base", base, "--out", tmp_path / "tier", code=1)
    assert_refused(refused, f"base: config.json: {field}: ", "must not be quantized")


# Imports, merges and plain models


def test_import_tells(tmp_path: Path) -> None:
    source = write_base(tmp_path / "source", **DIMS).path
    edit_config(source, use_sliding_window=True, max_window_layers=0, logit_scale=0.5)
    edit_config(source, max_position_embeddings=8192)
    told = run("import", source, "--out", tmp_path / "out").err
    assert told.count("beyond 4096 tokens") == told.count("logit_scale 0.5 is ignored") == 1
    told = run("generate", "--model", tmp_path / "out", "--prompt", "a", "--max-tokens", 1).err
    assert told.count("beyond 4096 tokens") == told.count("logit_scale 0.5 is ignored") == 1
    edit_config(tmp_path / "out", hidden_act="gelu")
    refused = run("generate", "--model", tmp_path / "out", "--prompt", "a", code=1)
    assert_refused(refused, "out/config.json: hidden_act 'gelu'")


def test_merge_tells(tmp_path: Path) -> None:
    write_models(tmp_path, "mistral", experts=2)
    for folder in ("base", "expert_0", "expert_1"):
        edit_config(tmp_path / folder, sliding_window=128)
    experts = [{"source_model": f"./expert_{n}"} for n in range(2)]
    config = write_merge_config(tmp_path, gate_mode="random", experts=experts)
    told = run("merge", config, "--out", tmp_path / "out").both
    assert "base: mlx-lm has no sliding window here: beyond 128 tokens" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] is None
