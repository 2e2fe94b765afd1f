"""A tier's config as the metadata of llama.cpp's architecture `step35`."""

import math
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import ModelConfig
from outlier_mlx.models.rope import ORIGINAL, attention_factor
from outlier_mlx.writing.gguf_file import Field

ARCHITECTURE = "step35"
#: The tensor of factors by which the frequencies of RoPE are divided.
ROPE_FREQS = "rope_freqs.weight"

_SOFTMAX = 1  # llama.cpp's number of this way to weigh experts


def config_fields(config: ModelConfig, width: int, alpha: float, name: str) -> dict[str, Field]:
    """The metadata of a file, but for its tokenizer.

    Args:
        config: the tier's.
        width: width of an expert in the file.
        alpha: what all experts' weights are multiplied by.
        name: the model's name.

    Raises:
        CheckpointError: the architecture does not compute something that the tier does; says what.
    """
    _check(config)
    fields: dict[str, Field] = {
        "vocab_size": config.vocab,
        "context_length": config.max_positions,
        "embedding_length": config.hidden,
        "block_count": config.layers,
        "feed_forward_length": config.intermediate,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": 2 * config.head_dim,
        "rope.dimension_count_swa": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "rope.freq_base_swa": float(config.rope_theta),
        "expert_count": config.experts if config.moe_layers else 0,
        "expert_used_count": config.top_k if config.moe_layers else 0,
        "expert_feed_forward_length": width,
        "expert_shared_feed_forward_length": config.intermediate,
        "expert_gating_func": _SOFTMAX,
        "expert_weights_norm": True,
        "expert_weights_scale": alpha,
    }
    general: dict[str, Field] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.description": "An Outlier tier; step35 is the architecture that computes the same",
        "general.quantization_version": 2,
    }
    fields |= _window_fields(config) | _scaling_fields(config)
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """How often each wavelength of RoPE is longer than unscaled, (head_dim / 2,) float32.

    Wavelengths between two bounds change smoothly, those below stay, and those above are
    multiplied by the scaling's `factor` (transformers' `_compute_llama3_parameters` and
    `_compute_yarn_parameters`). The architecture does not read YaRN's `beta_fast` and `beta_slow`.

    Returns:
        None if positions are scaled otherwise, or not.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] not in ("llama3", "yarn"):
        return None
    kept = _kept_by_llama3 if scaling["rope_type"] == "llama3" else _kept_by_yarn
    share = kept(config, scaling)
    return (1 / ((1 - share) / scaling["factor"] + share)).astype(np.float32)


def _kept_by_llama3(config: ModelConfig, scaling: dict[str, Any]) -> np.ndarray:
    """How much of each frequency stays, (head_dim / 2,): 0 to 1."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    wavelengths = 2 * math.pi * config.rope_theta**exponents
    return np.clip((scaling[ORIGINAL] / wavelengths - low) / (high - low), 0, 1)


def _kept_by_yarn(config: ModelConfig, scaling: dict[str, Any]) -> np.ndarray:
    """The same, by the numbers of turns within the original context."""

    def place(turns: float) -> float:
        span = math.log(scaling[ORIGINAL] / (turns * 2 * math.pi))
        return config.head_dim * span / (2 * math.log(config.rope_theta))

    low = max(math.floor(place(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(place(scaling.get("beta_slow", 1))), config.head_dim - 1)
    steps = np.arange(config.head_dim // 2) - low
    return 1 - np.clip(steps / (high - low or 0.001), 0, 1)


def _check(config: ModelConfig) -> None:
    missing = {
        "bias of the attention's output (o_proj.bias)": config.o_bias,
        "bias of the FFN (mlp_bias)": config.mlp_bias,
    }
    for what, there in missing.items():
        if there:
            raise CheckpointError(
                f"config.json: llama.cpp's {ARCHITECTURE} has no {what}; --format gguf-experts"
                " writes the experts alone"
            )


def _window_fields(config: ModelConfig) -> dict[str, Field]:
    """Which layers attend to the last tokens only; llama.cpp asks for at least one.

    Where the tier has none, it is one with a window as long as the context. But in layers with a
    window, llama.cpp does not scale RoPE. Then it is a layer after the last, as some models have
    them to predict further tokens; its tensors may be in another file, and nothing runs it.
    """
    windows = np.array([window or 0 for window in config.attention or [0] * config.layers])
    widths = np.unique(windows[windows > 0])
    scaled = config.rope_scaling is not None
    if len(widths) > 1 or (scaled and len(widths)):
        raise CheckpointError(
            f"config.json: llama.cpp's {ARCHITECTURE} has windows of one width, and none where RoPE"
            " is scaled; --format gguf-experts writes the experts alone"
        )
    fields: dict[str, Field] = {}
    if scaled:
        windows = np.append(windows, 1)
        fields = {"block_count": config.layers + 1, "nextn_predict_layers": 1}
    elif not len(widths):
        windows[0] = 1
    return fields | {
        "attention.sliding_window": int(widths[0]) if len(widths) else config.max_positions,
        "attention.sliding_window_pattern": windows > 0,
    }


def _scaling_fields(config: ModelConfig) -> dict[str, Field]:
    """How positions are scaled, but for `rope_factors`."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        return {"rope.scaling.attn_factor": attention_factor(scaling)}
    return {}
