"""The spellings of tensor keys in overlays, and what each key names.

Base tensors get the names that the base has in mlx-lm. Digits are ASCII only, and leading zeros do
not make another number: two spellings of one tensor are found to be one.
"""

import re
from dataclasses import dataclass
from functools import cache

from outlier_mlx.models.config import parse_config
from outlier_mlx.models.families import family, with_role

_LAYER = r"(?:model\.)?layers\.(?P<layer>[0-9]+)\."
_LEAF = r"(?P<projection>gate|up|down)(?:_(?P<packed>ternary|scale)|_proj\.(?P<plain>weight|scale))"
_EXPERT_LEAF = re.compile(_LEAF)
_EXPERT = re.compile(_LAYER + r"mlp\.experts\.(?P<expert>[0-9]+)\." + _LEAF)
_ROUTER = re.compile(
    _LAYER + r"(?:mlp\.)?router\.weight|layer_(?P<trainer_layer>[0-9]+)_router_weight"
)
_SHARED = re.compile(_LAYER + r"mlp\.shared_expert\.(?P<projection>gate|up|down)_W")
_BASE_LAYER = re.compile(r"model\.layers\.(?P<layer>[0-9]+)\.(?P<leaf>.+)")
# Any dimensions: the names are what is asked for.
_SMALL = {
    **dict.fromkeys(["hidden_size", "intermediate_size", "vocab_size", "head_dim"], 2),
    **dict.fromkeys(["num_hidden_layers", "num_attention_heads", "num_key_value_heads"], 1),
}

# More digits than any number of a layer or expert has, yet few enough to convert.
_MAX_DIGITS = 18


@dataclass(frozen=True)
class ExpertKey:
    """One part of one expert: `part` is "trits" or "scale"."""

    layer: int
    expert: int
    projection: str
    part: str


@dataclass(frozen=True)
class RouterKey:
    """The routing matrix of a layer."""

    layer: int


@dataclass(frozen=True)
class AlphaKey:
    """A tensor of alphas; `alpha.py` finds its layer."""

    key: str


@dataclass(frozen=True)
class BaseKey:
    """A tensor of the base model, by its name in mlx-lm."""

    name: str


Key = ExpertKey | RouterKey | AlphaKey | BaseKey


def parse_number(digits: str) -> int:
    """The number of a layer or expert; too many digits give a number that is out of range."""
    return int(digits) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS


def parse_key(key: str) -> Key | None:
    """What a tensor key of an overlay or base names, or None if the key is unknown."""
    plain = key.removeprefix("base.")
    if match := _EXPERT.fullmatch(plain):
        layer, expert = parse_number(match["layer"]), parse_number(match["expert"])
        return ExpertKey(layer, expert, match["projection"], _part(match))
    if match := _ROUTER.fullmatch(plain):
        return RouterKey(parse_number(match["layer"] or match["trainer_layer"]))
    if match := _SHARED.fullmatch(plain):
        return base_key(parse_number(match["layer"]), f"mlp.{match['projection']}_proj.weight")
    if "alpha" in plain.lower():
        return AlphaKey(plain)
    if (
        match := _BASE_LAYER.fullmatch(plain)
    ) and f"model.layers.0.{match['leaf']}" in base_names():
        return base_key(parse_number(match["layer"]), match["leaf"])
    return BaseKey(plain) if plain in base_names() and not match else None


@cache
def base_names() -> frozenset[str]:
    """Tensors that a base of any family has, if it has one layer."""
    names: set[str] = set()
    for known in map(family, with_role("base")):
        flags = [flag for flag in (known.qkv_bias, known.o_bias, known.mlp_bias) if flag]
        raw = _SMALL | {"model_type": known.model_type} | {str(flag): True for flag in flags}
        for module in known.modules(parse_config(raw)):
            names |= module.tensors().keys()
    return frozenset(names)


def base_key(layer: int, leaf: str) -> BaseKey:
    """The key of a layer's base tensor, such as "mlp.up_proj.weight"."""
    return BaseKey(f"model.layers.{layer}.{leaf}")


def parse_expert_leaf(leaf: str, layer: int, expert: int) -> ExpertKey | None:
    """What a bare key such as `gate_ternary` or `up_proj.scale` names within an expert."""
    match = _EXPERT_LEAF.fullmatch(leaf)
    return ExpertKey(layer, expert, match["projection"], _part(match)) if match else None


def _part(match: re.Match[str]) -> str:
    return "scale" if "scale" in (match["packed"], match["plain"]) else "trits"
