"""What imported models hold, and what mlx-lm's own unquantized models compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes
from mlx_lm.utils import load_model as stock_load_model

EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stored_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Weights and biases by MLX's names, as MLX computes with them in float32."""
    found = {}
    for path, module in model.named_modules():
        if "weight" not in module:
            continue
        weight = module.weight
        if hasattr(module, "bits"):
            scales, biases = (a.astype(mx.float32) for a in (module.scales, module.biases))
            weight = mx.dequantize(weight, scales, biases, module.group_size, module.bits)
        found[f"{path}.weight"] = np.array(weight.astype(mx.float32))
        if "bias" in module:
            found[f"{path}.bias"] = np.array(module.bias.astype(mx.float32))
    return found


def apart(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with a tensor for each expert of Mixtral, as checkpoints before MLX have them."""
    result = {}
    for name, value in weights.items():
        stacked = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name)
        if stacked is None:
            result[name] = value
            continue
        letter = next(w for w, projection in EXPERT.items() if projection == stacked[2])
        result |= {f"{stacked[1]}.experts.{e}.{letter}.weight": v for e, v in enumerate(value)}
    return result


def assert_same_weights(
    folder: Path, expected: dict[str, np.ndarray], *, experts_apart: bool = False
) -> nn.Module:
    """Stock mlx-lm loads the folder, and every weight is the expected, bit for bit."""
    model, _ = stock_load_model(folder)
    found = stored_weights(model)
    found = apart(found) if experts_apart else found
    assert set(found) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights, err_msg=name)
    return model


def unquantized_logits(
    config: dict[str, Any], weights: dict[str, np.ndarray], tokens: list[int]
) -> np.ndarray:
    """(1, T, V): those of mlx-lm's own model with these weights, in float32.

    A model type that mlx-lm does not have is a Mixtral.
    """
    known = config["model_type"] in ("llama", "mistral", "qwen2", "qwen3")
    config = config if known else config | {"model_type": "mixtral"}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    arrays = {name: mx.array(value) for name, value in weights.items()}
    model.load_weights(list(model.sanitize(arrays).items()), strict=True)
    return np.array(model(mx.array([tokens])))
