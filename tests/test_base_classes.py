"""Which class a tier's model has: mlx-lm's own of the base, and nothing that a config can name."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from outlier_mlx.runtime.model import Model, ModelArgs, classes_on
from outlier_mlx.runtime.moe import OutlierMoE

CONFIG: dict[str, Any] = {
    "model_type": "outlier_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "moe_layers": [1],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "ternary": {"format": "tq1_0_strided", "version": 2},
}


def model_on(base: str | None, **changes: Any) -> Any:
    fields = CONFIG | changes | ({"base_model_type": base} if base else {})
    return Model(ModelArgs.from_dict(fields))


@pytest.mark.parametrize(
    ("base", "module"), [(None, qwen2), ("qwen2", qwen2), ("qwen3", qwen3), ("llama", llama)]
)
def test_a_model_is_ours_and_the_bases(base: str | None, module: Any):
    model = model_on(base)
    assert isinstance(model, Model) and isinstance(model, module.Model)
    assert isinstance(model.args, ModelArgs) and isinstance(model.args, module.ModelArgs)
    assert type(model) is type(model_on(base)) and model.args.num_experts == 4
    kinds = [type(layer.mlp) for layer in model.layers]
    assert kinds == [module.MLP, OutlierMoE, module.MLP]
    assert isinstance(model.layers[1].mlp.shared_expert, module.MLP)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 50)
    assert type(copy.deepcopy(model)) is type(model)


def test_mistral_runs_as_llama():
    assert isinstance(model_on("mistral"), llama.Model)


def test_bases_in_one_process_do_not_mix():
    first, second = model_on("qwen2"), model_on("qwen3")
    assert type(first) is not type(second)
    assert not isinstance(second, qwen2.Model)
    assert "q_norm" in second.layers[0].self_attn and "q_norm" not in first.layers[0].self_attn


def test_the_cache_is_the_bases_own():
    windowed = model_on(
        "llama",
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
    )
    kinds = [type(cache) for cache in make_prompt_cache(windowed)]
    assert kinds == [KVCache, RotatingKVCache, KVCache]


def test_weights_of_the_base_are_sanitized_by_it():
    model = model_on("llama", tie_word_embeddings=True)
    weights = {"lm_head.weight": mx.zeros((2, 2)), "model.norm.weight": mx.zeros((2,))}
    assert list(model.sanitize(weights)) == ["model.norm.weight"]


HOSTILE = [
    "",
    "os",
    "evil",
    "evil.inner",
    "..utils",
    ".qwen2",
    "qwen2.Model",
    "/tmp/evil",
    "../evil",
]
HOSTILE += ["cache", "base", "switch_layers", "__init__", "qwen2\n", "mlx_lm.utils"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_base_is_a_model_of_mlx_lm_or_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "evil").mkdir()
    for file in ("evil/__init__.py", "evil/inner.py"):
        (tmp_path / file).write_text("raise SystemExit('a config made this run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {module for module in sys.modules if not module.startswith("mlx_lm.models.")}
    with pytest.raises(ValueError, match="mlx-lm has no such model"):
        ModelArgs.from_dict(CONFIG | {"base_model_type": name})
    after = {module for module in sys.modules if not module.startswith("mlx_lm.models.")}
    assert after == before


@pytest.mark.parametrize("name", [None, ["qwen2"], {"a": 1}, 7])
def test_a_base_that_is_no_name(name: Any):
    with pytest.raises(ValueError, match="mlx-lm has no such model"):
        ModelArgs.from_dict(CONFIG | {"base_model_type": name})


@pytest.mark.parametrize("base", ["qwen3", "llama"])
def test_yarn_scales_the_bases_own_rope(base: str):
    yarn = {"rope_type": "deepseek_yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = model_on(base, rope_scaling=yarn | {"attention_factor": 0.7})
    assert [layer.self_attn.rope.mscale for layer in model.layers] == [0.7] * 3


def test_llama3_under_the_name_that_tiers_have_for_it():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    usual, tiers = (
        model_on("llama", rope_scaling={"rope_type": name, **scaling})
        for name in ("llama3", "outlier_llama3")
    )
    ours, theirs = (model.layers[0].self_attn.rope._freqs for model in (tiers, usual))
    assert mx.array_equal(ours, theirs)


def test_classes_are_made_once():
    assert classes_on("qwen3") is classes_on("qwen3")
