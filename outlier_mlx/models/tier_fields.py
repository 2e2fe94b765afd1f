"""The fields of a tier's config.json that decide what it computes, as written and as checked."""

from typing import Any

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import BASE_TYPE, DEFAULT_BASE
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.models.fields import short
from outlier_mlx.models.rope import TIER_NAMES

#: The name of the code that mlx-lm runs for a tier: its `model_file`.
MODEL_FILE = "outlier_moe.py"
#: The same for a ternary model (`ternary_fields`).
TERNARY_FILE = "outlier_ternary.py"
DTYPES = ("bfloat16", "float16", "float32")
# Fields that mlx-lm would honour, and that this project neither writes nor reads.
FOREIGN = (
    *("rope_parameters", "rope_traditional", "text_config", "quantize_activations"),
    "activation_dtype",
)


def base_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of the base, each under its usual name."""
    return family(config.family).config_fields(config) | {
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tied,
    }


def tier_fields(config: ModelConfig, expert_width: int) -> dict[str, Any]:
    """The fields of a tier, but for its code, dtype, quantization and how experts are stored.

    Args:
        config: the model's.
        expert_width: width of an expert; 0 if there are none.
    """
    scaling = config.rope_scaling
    if scaling is not None:
        kind = scaling["rope_type"]
        scaling = scaling | {"rope_type": TIER_NAMES.get(kind, kind)}
    base = {} if config.family == DEFAULT_BASE else {BASE_TYPE: config.family}
    return (
        base_fields(config)
        | base
        | {
            "model_type": "outlier_moe",
            "rope_scaling": scaling,
            "moe_layers": list(config.moe_layers),
            "num_experts": config.experts,
            "num_experts_per_tok": config.top_k,
            "moe_intermediate_size": expert_width,
        }
    )


def check_fields(config: ModelConfig) -> None:
    """Check that a tier's config.json says what was read from it in the words that are written.

    mlx-lm reads only these; a synonym that this project understands would mean nothing to it.

    Raises:
        CheckpointError: names the field.
    """
    raw = config.raw
    width = raw.get("moe_intermediate_size") if config.expert_width is None else config.expert_width
    for name, value in tier_fields(config, width or 0).items():
        found = raw.get(name)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {short(found)}, expected {short(value)}")
    if raw.get("dtype") not in DTYPES:
        raise CheckpointError(
            f"config.json: dtype is {short(raw.get('dtype'))}, expected one of {', '.join(DTYPES)}"
        )
    for name in FOREIGN:
        if raw.get(name) not in (None, False):
            raise CheckpointError(f"config.json: {name} is no field of a tier")
