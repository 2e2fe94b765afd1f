"""The spellings that tensor keys have in overlays, and the one spelling used from here on.

Base tensors get the names that Qwen2 has in mlx-lm. Of the rest, a router is
`layers.N.router`, alphas are `layers.N.alpha`, and an expert's parts are
`layers.N.experts.E.{gate,up,down}.{trits,scale}`.
"""

import re
from dataclasses import dataclass

PROJECTIONS = ("gate", "up", "down")

_LAYER = r"(?:model\.)?layers\.(?P<layer>\d+)\."
_EXPERT = re.compile(
    _LAYER + r"mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate|up|down)"
    r"(?:_(?P<packed>ternary|scale)|_proj\.(?P<plain>weight|scale))"
)
_ROUTER = re.compile(
    _LAYER + r"(?:mlp\.)?router\.weight|layer_(?P<trainer_layer>\d+)_router_weight"
)
_SHARED = re.compile(_LAYER + r"mlp\.shared_expert\.(?P<projection>gate|up|down)_W")
_BASE = re.compile(
    r"model\.layers\.\d+\.(?:self_attn\.(?:[qkv]_proj\.(?:weight|bias)|o_proj\.weight)"
    r"|(?:input|post_attention)_layernorm\.weight|mlp\.(?:gate|up|down)_proj\.weight)"
    r"|model\.(?:embed_tokens|norm)\.weight|lm_head\.weight"
)


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


def parse_key(key: str) -> Key | None:
    """What a tensor key of an overlay or base names, or None if it is nothing that is loaded."""
    plain = key.removeprefix("base.")
    if match := _EXPERT.fullmatch(plain):
        part = "scale" if "scale" in (match["packed"], match["plain"]) else "trits"
        return ExpertKey(int(match["layer"]), int(match["expert"]), match["projection"], part)
    if match := _ROUTER.fullmatch(plain):
        return RouterKey(int(match["layer"] or match["trainer_layer"]))
    if match := _SHARED.fullmatch(plain):
        return BaseKey(f"model.layers.{int(match['layer'])}.mlp.{match['projection']}_proj.weight")
    if "alpha" in plain.lower():
        return AlphaKey(plain)
    if _BASE.fullmatch(plain):
        return BaseKey(plain)
    return None
