"""Small models of any kind that mlx-lm has, with random weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING

from tests.builders import write_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def make_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's model of a config; its matrices are four times as large as new ones."""
    name = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    model.load_weights([(k, 4 * v if v.ndim > 1 and "embed" not in k else v) for k, v in flat])
    return model


def write_model(folder: Path, config: dict[str, Any], said: dict[str, Any] | None = None) -> Path:
    """Write a model of a config, and as its config.json what is `said`."""
    folder.mkdir(parents=True)
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(make_model(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(flat), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config if said is None else said))
    write_tokenizer(folder, config.get("vocab_size", 300))
    return folder
