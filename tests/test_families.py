"""Families as data: the modules of each are those of mlx-lm's model, with the same shapes."""

from __future__ import annotations

import importlib
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import describe, parse_config
from outlier_mlx.models.families import families, family

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "llama": {},
    "llama wide heads": {"head_dim": 32},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}


def mlx_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    name = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(config))
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return {key: tuple(value.shape) for key, value in flat}


def test_every_family_has_a_case() -> None:
    assert {name.split()[0] for name in CASES} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_modules_are_mlx_lms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = name.split()[0]
    raw = SIZES | CASES[name] | {"model_type": kind}
    monkeypatch.setitem(families(), kind, with_all_roles(kind))
    config = parse_config(raw, role="import")
    found: dict[str, tuple[int, ...]] = {}
    for module in family(kind).modules(config):
        assert not found.keys() & module.tensors().keys()
        found |= module.tensors()
    assert found == mlx_shapes(raw)
    assert describe(raw).head_dim == config.head_dim == raw.get("head_dim", 12)


def with_all_roles(kind: str) -> Any:
    from dataclasses import replace

    return replace(family(kind), roles=frozenset(["base", "import", "merge"]))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", {"head_dim": 16}, "head_dim 16 is not hidden_size / heads"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ("llama", {"head_dim": 15}, "odd"),
        ("llama", {"num_key_value_heads": 3}, "3 KV heads do not divide 4"),
        ("llama", {"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        (
            "mixtral",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling 'linear', expected none",
        ),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "is 3, of 2 experts"),
        ("gpt2", {}, "model_type 'gpt2', expected llama, mistral, mixtral, qwen2 or qwen3"),
    ],
)
def test_what_mlx_lm_would_ignore_is_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^models/config\.json: .*{message}"):
        parse_config(
            SIZES | changes | {"model_type": kind}, role="import", where="models/config.json"
        )
