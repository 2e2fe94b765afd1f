"""Configs of plain models from any version of transformers, in one spelling."""

from outlier_mlx.models.families import families
from outlier_mlx.models.rope import agree, spell_rope

NESTED = "text_config"
_NULLS = (NESTED, "rope_traditional", "quantize_activations")


def normalised(config: dict, where: str = "config.json") -> dict:
    """A config with the old names of fields beside the new ones, for models that read the old ones.

    See `rope.spell_rope` for RoPE. `dtype` and `torch_dtype` are copied to each other, and the
    defaults of a family in `models/` are added. So are they in a nested `text_config`.

    Args:
        config: the config; it is not changed.
        where: name of the config in messages.

    Raises:
        CheckpointError: two spellings of a field contradict each other.
    """
    known = families().get(str(config.get("model_type")))
    defaults = dict(known.defaults) if known is not None else {}
    result = spell_rope(config, where, defaults.get("max_position_embeddings"))
    agree(result, "dtype", config.get("torch_dtype"), "torch_dtype", where)
    if config.get("torch_dtype") is None and result.get("dtype") is not None:
        result["torch_dtype"] = result["dtype"]
    for name, value in defaults.items():
        if result.get(name) is None:
            result[name] = value
    inner = config.get(NESTED)
    if isinstance(inner, dict):
        result[NESTED] = normalised(inner, f"{where}: {NESTED}")
    return result


def without_nulls(config: dict) -> dict:
    """A config without fields that are null, where mlx-lm takes null for a value."""
    return {key: value for key, value in config.items() if value is not None or key not in _NULLS}


def lifted(config: dict) -> dict:
    """A config with the fields of a nested `text_config` at the top.

    Fields that the text model does not have, such as quantization, are those of the outer config.
    """
    inner = config.get(NESTED)
    if not isinstance(inner, dict):
        return config
    outer = {key: value for key, value in config.items() if key != NESTED}
    return outer | {key: value for key, value in inner.items() if value is not None}
