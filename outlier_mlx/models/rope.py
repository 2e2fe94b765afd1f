"""Rotary positions (RoPE), in both spellings of configs.

Version 5 of transformers writes `rope_parameters: {rope_theta, rope_type, ...}` instead of the
`rope_theta` and `rope_scaling` of version 4. Most models of mlx-lm 0.32 read only the old names,
and silently use a default without them.
"""

import math
from collections.abc import Mapping
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.fields import Fields, short
from outlier_mlx.storage.bounds import fits

ORIGINAL = "original_max_position_embeddings"
# transformers reads a tier's config when it loads the tokenizer. For a model type that it does not
# know, it fails on the names of its own RoPE types and ignores others. mlx-lm treats
# "deepseek_yarn" as YaRN.
TIER_NAMES = {"yarn": "deepseek_yarn", "llama3": "outlier_llama3"}
YARN = ("yarn", "deepseek_yarn")
# Found inside `rope_parameters` where version 4 had them at the top.
_LIFTED = ("rope_theta", "partial_rotary_factor")
_NAMES = ("rope_theta", "type", "rope_type")
_NEED_ORIGINAL = ("yarn", "llama3", "longrope")
# Numbers of a scaling besides factor and original context: YaRN's have defaults.
_YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor")
_LLAMA3_NUMBERS = ("low_freq_factor", "high_freq_factor")


def spell_rope(config: dict, where: str, default_positions: int | None = None) -> dict:
    """A config with RoPE's old names beside the new ones, and their defaults written out.

    `rope_theta` and `partial_rotary_factor` are copied from `rope_parameters`, and a `rope_type`
    other than "default" becomes `rope_scaling`. `rope_parameters` stays, for the models that read
    it. If it has an entry for each type of layer, nothing is copied.

    Args:
        config: the config; it is not changed.
        where: name of the config in messages.
        default_positions: `max_position_embeddings` if the config has none.

    Raises:
        CheckpointError: two spellings of a field contradict each other.
    """
    result = dict(config)
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{where}: {name} is not an object")
    if nested and not any(isinstance(value, dict) for value in nested.values()):
        for name in _LIFTED:
            agree(result, name, nested.get(name), f"rope_parameters.{name}", where)
        ours, theirs = _scaling(nested, where), _scaling(scaling or {}, where)
        if ours is not None and theirs is not None and _differ(ours, theirs):
            raise CheckpointError(
                f"{where}: rope_scaling is {theirs}, but rope_parameters is {ours}: which one"
                " holds?"
            )
        result["rope_scaling"] = scaling if ours is None else ours
        if scaling is None and ours is None and "rope_scaling" not in config:
            del result["rope_scaling"]
    for name in ("rope_scaling", "rope_parameters"):
        given = result.get(name)
        if given and rope_type(given, where) in _NEED_ORIGINAL:
            original = _original(config, given, default_positions)
            if original is not None:
                result[name] = given | {ORIGINAL: original}
    return result


def _original(config: dict, scaling: dict, default_positions: int | None) -> Any:
    """The context before scaling, by transformers' rule (`standardize_rope_params`)."""
    candidates = (config.get(ORIGINAL), scaling.get(ORIGINAL))
    positions = (config.get("max_position_embeddings"), config.get("max_seq_len"))
    given = (*candidates, *positions, default_positions)
    return next((value for value in given if value is not None), None)


def agree(result: dict, name: str, value: object, shown: str, where: str) -> None:
    """Set a field if it is missing; otherwise check that it has this value.

    Raises:
        CheckpointError: it has another value.
    """
    if value is None:
        return
    if result.get(name) is None:
        result[name] = value
    elif result[name] != value:
        raise CheckpointError(
            f"{where}: {name} is {short(result[name])}, but {shown} is {short(value)}: which one"
            " holds?"
        )


def _differ(ours: dict, theirs: dict) -> bool:
    """Whether two scalings differ. Fields that can be outside of them may be in only one."""
    names = (ours.keys() & theirs.keys()) | ((ours.keys() | theirs.keys()) - {*_LIFTED, ORIGINAL})
    return any(ours.get(name) != theirs.get(name) for name in names)


def rope_type(fields: Mapping[str, Any], where: str = "config.json") -> str:
    """How positions are scaled: "default", "yarn", "llama3" and so on.

    Raises:
        CheckpointError: two names for it contradict each other.
    """
    kinds = [fields[name] for name in ("rope_type", "type") if fields.get(name) is not None]
    kinds = [kind for kind in kinds if kind != "default"]
    if any(not isinstance(kind, str) for kind in kinds) or len(set(map(str, kinds))) > 1:
        raise CheckpointError(f"{where}: rope scaling {short(kinds)}, expected one type")
    return kinds[0] if kinds else "default"


def _scaling(fields: dict, where: str) -> dict | None:
    """The scaling of positions, or None if there is none."""
    kind = rope_type(fields, where)
    if kind == "default":
        return None
    return {"rope_type": kind, **{k: v for k, v in fields.items() if k not in _NAMES}}


def read_scaling(
    spelled: dict, where: str, allowed: tuple[str, ...], *, tier: bool
) -> dict[str, Any] | None:
    """Check the scaling of positions, and return it with the usual names; None: no scaling.

    Args:
        spelled: a config as `spell_rope` returns it.
        where: name of the config in messages.
        allowed: types of scaling that the model honours.
        tier: whether it is a tier's config, which has its own names for two types.

    Raises:
        CheckpointError: the type is not allowed, or its numbers are not valid.
    """
    scaling = _scaling(spelled.get("rope_scaling") or {}, where)
    if scaling is None:
        return None
    usual = {theirs: ours for ours, theirs in TIER_NAMES.items()} if tier else {}
    kind = usual.get(scaling["rope_type"], scaling["rope_type"])
    if kind not in allowed:
        raise CheckpointError(
            f"{where}: rope_scaling {short(kind)}, expected {listed(allowed, last='or')}"
        )
    fields = Fields(scaling, where, strict=True)
    if kind == "linear":
        return {"rope_type": kind, "factor": fields.positive("factor")}
    if kind == "longrope":
        _check_longrope(fields, scaling)
    if kind not in ("yarn", "llama3"):
        return scaling
    result: dict[str, Any] = {"rope_type": kind, "factor": fields.positive("factor")}
    result[ORIGINAL] = fields.size(ORIGINAL)
    for name in _YARN_NUMBERS if kind == "yarn" else _LLAMA3_NUMBERS:
        if scaling.get(name) is not None or kind == "llama3":
            result[name] = fields.positive(name)
    if kind == "yarn":
        _read_mscale(fields, scaling, result)
    elif result["high_freq_factor"] <= result["low_freq_factor"]:
        fields.refuse("rope scaling llama3: high_freq_factor must be above low_freq_factor")
    return result


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosines and sines by.

    For factors below 1, transformers would take 1 where this is not stated.

    Args:
        scaling: as `read_scaling` returns it.
    """
    return float(scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1)


def _check_longrope(fields: Fields, scaling: dict) -> None:
    """Refuse what mlx-lm could not read."""
    fields.size(ORIGINAL, least=2)
    for name in ("short_factor", "long_factor"):
        numbers = scaling.get(name)
        sound = isinstance(numbers, list) and all(type(n) in (int, float) for n in numbers)
        if not sound or not all(n > 0 and fits(n, "float32") for n in numbers or ()):
            fields.refuse(f"rope scaling longrope: {name} must be a list of positive numbers")


def _read_mscale(fields: Fields, scaling: dict, result: dict[str, Any]) -> None:
    """DeepSeek's names of the attention factor (transformers' `_compute_yarn_parameters`)."""
    if scaling.get("truncate") is False:
        fields.refuse("rope scaling yarn with truncate false is not supported by mlx-lm")
    both = [scaling.get("mscale"), scaling.get("mscale_all_dim")]
    if all(both) and "attention_factor" not in result:
        log = math.log(max(1.0, result["factor"]))
        top, bottom = (
            0.1 * fields.positive(name) * log + 1 for name in ("mscale", "mscale_all_dim")
        )
        result["attention_factor"] = top / bottom
