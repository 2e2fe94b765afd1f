"""Configs of plain models in one spelling, whichever version of transformers wrote them.

Version 5 of transformers writes `rope_parameters: {rope_theta, rope_type, ...}` and `dtype` where
version 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`. Most models of mlx-lm 0.32 read the
old names alone, and fall back to a default without a word.
"""

from outlier_mlx.errors import CheckpointError

# Found inside `rope_parameters` where version 4 had them at the top.
_LIFTED = ("rope_theta", "partial_rotary_factor")


def normalised(config: dict, where: str = "config.json") -> dict:
    """A config with the old names beside the new ones.

    `rope_theta` and `partial_rotary_factor` are lifted out of `rope_parameters`, a `rope_type`
    other than "default" becomes `rope_scaling`, and `dtype` and `torch_dtype` stand for each other.
    `rope_parameters` stays, for the models that read it. One that has an entry for each type of
    layer is left alone: only a model that knows about it can use it.

    Args:
        config: as it was read; it is not changed.
        where: what messages call it.

    Raises:
        CheckpointError: two spellings of a field contradict each other.
    """
    result = dict(config)
    nested = config.get("rope_parameters")
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError(f"{where}: rope_parameters is not an object")
    if nested and not any(isinstance(value, dict) for value in nested.values()):
        for name in _LIFTED:
            _agree(result, name, nested.get(name), f"rope_parameters.{name}", where)
        _lift_scaling(result, nested, where)
    _agree(result, "dtype", config.get("torch_dtype"), "torch_dtype", where)
    if config.get("torch_dtype") is None and result.get("dtype") is not None:
        result["torch_dtype"] = result["dtype"]
    return result


def _agree(result: dict, name: str, value: object, shown: str, where: str) -> None:
    """Set a field that is absent; one that is there must have this value."""
    if value is None:
        return
    if result.get(name) is None:
        result[name] = value
    elif result[name] != value:
        raise CheckpointError(
            f"{where}: {name} is {result[name]!r}, but {shown} is {value!r}: which one holds?"
        )


def _lift_scaling(result: dict, nested: dict, where: str) -> None:
    given = result.get("rope_scaling")
    if given is not None and not isinstance(given, dict):
        raise CheckpointError(f"{where}: rope_scaling is not an object")
    ours, theirs = _scaling(nested), _scaling(given or {})
    if ours is None:
        return
    if theirs is not None and theirs != ours:
        raise CheckpointError(
            f"{where}: rope_scaling is {theirs}, but rope_parameters is {ours}: which one holds?"
        )
    result["rope_scaling"] = ours


def _scaling(fields: dict) -> dict | None:
    """How positions are scaled, or None where they are not."""
    kind = fields.get("rope_type") or fields.get("type")
    if kind in (None, "default"):
        return None
    own = {k: v for k, v in fields.items() if k not in ("rope_theta", "type", "rope_type")}
    return {"rope_type": kind, **own}
