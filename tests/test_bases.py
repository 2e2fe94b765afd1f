"""Overlays on bases of every family: against the NumPy reference, and against the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

from tests import builders
from tests.engine import forward
from tests.goldens import assert_logits_close
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
    "llama": {"family": "llama", "rope_theta": 5e5, "eps": 1e-5, "tied": True},
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


@pytest.mark.parametrize("name", BASES)
def test_the_reference_computes_each_base_as_mlx_lm_does(name: str, tmp_path: Path):
    built = builders.write_base(tmp_path / "base", base_dtype="F32", tokenizer=False, **BASES[name])
    model, _ = mlx_lm_load_model(built.path)
    if "yarn" in BASES[name]:  # mlx-lm knows no `attention_factor`
        for layer in model.layers:
            layer.self_attn.rope.mscale = YARN["attention_factor"]
    prompt = built.prompt(80)
    expected = reference_trace(read_overlay(built.path), prompt).logits
    assert_logits_close(forward(model, prompt), expected)
    assert np.abs(expected).max() > 1
