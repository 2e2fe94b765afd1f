"""Configs of plain models in one spelling, whichever version of transformers wrote them."""

from outlier_mlx.models.families import families
from outlier_mlx.models.rope import agree, spell_rope

NESTED = "text_config"


def normalised(config: dict, where: str = "config.json") -> dict:
    """A config with the old names beside the new ones, for models that know only the old.

    See `rope.spell_rope` for RoPE; `dtype` and `torch_dtype` stand for each other; what a family of
    `models/` has for a default is written out. The same is done in a nested `text_config`.

    Args:
        config: as it was read; it is not changed.
        where: what messages call it.

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


def lifted(config: dict) -> dict:
    """A config whose text model's fields are at the top, where a nested `text_config` has them.

    What the text model does not say (tokens that end a text, quantization) is as outside.
    """
    inner = config.get(NESTED)
    if not isinstance(inner, dict):
        return config
    outer = {key: value for key, value in config.items() if key != NESTED}
    return outer | {key: value for key, value in inner.items() if value is not None}
