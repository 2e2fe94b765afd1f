"""The spellings that tensor keys have in overlays, and what each of them names.

Base tensors get the names that Qwen2 has in mlx-lm. Digits are ASCII only, and leading zeros do
not make another number: two spellings of one tensor are found to be one.
"""

import re
from dataclasses import dataclass

_LAYER = r"(?:model\.)?layers\.(?P<layer>[0-9]+)\."
_LEAF = r"(?P<projection>gate|up|down)(?:_(?P<packed>ternary|scale)|_proj\.(?P<plain>weight|scale))"
_EXPERT_LEAF = re.compile(_LEAF)
_EXPERT = re.compile(_LAYER + r"mlp\.experts\.(?P<expert>[0-9]+)\." + _LEAF)
_ROUTER = re.compile(
    _LAYER + r"(?:mlp\.)?router\.weight|layer_(?P<trainer_layer>[0-9]+)_router_weight"
)
_SHARED = re.compile(_LAYER + r"mlp\.shared_expert\.(?P<projection>gate|up|down)_W")
_BASE_LAYER = re.compile(
    r"model\.layers\.(?P<layer>[0-9]+)\.(?P<leaf>self_attn\.(?:[qkv]_proj\.(?:weight|bias)"
    r"|o_proj\.weight)|(?:input|post_attention)_layernorm\.weight|mlp\.(?:gate|up|down)_proj\.weight)"
)
_BASE_PLAIN = frozenset(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])

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
    """A tensor of alphas; which layer's is for the alpha reader to say."""

    key: str


@dataclass(frozen=True)
class BaseKey:
    """A tensor of the base model, by mlx-lm's Qwen2 name."""

    name: str


Key = ExpertKey | RouterKey | AlphaKey | BaseKey


def parse_number(digits: str) -> int:
    """A layer's or expert's number; absurdly many digits give one that is out of every range."""
    return int(digits) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS


def parse_key(key: str) -> Key | None:
    """What a tensor key of an overlay or base names, or None if it is nothing that is loaded."""
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
    if match := _BASE_LAYER.fullmatch(plain):
        return base_key(parse_number(match["layer"]), match["leaf"])
    return BaseKey(plain) if plain in _BASE_PLAIN else None


def base_key(layer: int, leaf: str) -> BaseKey:
    """The key of a layer's base tensor, such as "mlp.up_proj.weight"."""
    return BaseKey(f"model.layers.{layer}.{leaf}")


def parse_expert_leaf(leaf: str, layer: int, expert: int) -> ExpertKey | None:
    """What a bare key such as `gate_ternary` or `up_proj.scale` names within an expert."""
    match = _EXPERT_LEAF.fullmatch(leaf)
    return ExpertKey(layer, expert, match["projection"], _part(match)) if match else None


def _part(match: re.Match[str]) -> str:
    return "scale" if "scale" in (match["packed"], match["plain"]) else "trits"
