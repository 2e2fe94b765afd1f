"""What a model takes: parameters, bytes of weights, of the KV cache, and read for a token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

from outlier_mlx.models.description import Description, ModelConfig
from outlier_mlx.models.modules import Module
from outlier_mlx.models.rope import ORIGINAL, YARN

# A group of quantized values of the KV cache has a scale and a bias of 16 bits.
_GROUP_BITS = 32


@dataclass(frozen=True)
class Parameters:
    """Counts of logical parameters: quantized and ternary weights count as many as they stand for.

    Attributes:
        total: all of them.
        active: those that one token uses: all but those of experts that it is not routed to.
    """

    total: int
    active: int


def context_length(config: Description) -> int | None:
    """Tokens of context that a model was made for; None: not known.

    `max_position_embeddings`, or what YaRN stretches the original context to, if that is more.
    """
    length, scaling = config.max_positions, config.rope_scaling or {}
    if length is None or scaling.get("rope_type", scaling.get("type")) not in YARN:
        return length
    factor, original = scaling.get("factor"), scaling.get(ORIGINAL)
    if not isinstance(factor, int | float) or not isinstance(original, int):
        return length
    stretched = original * factor
    return max(length, int(stretched)) if stretched < float("inf") else length


@overload
def kv_bytes(
    config: ModelConfig, tokens: int, bits: int | None = None, group_size: int = 64
) -> int: ...
@overload
def kv_bytes(
    config: Description, tokens: int, bits: int | None = None, group_size: int = 64
) -> int | None: ...
def kv_bytes(
    config: Description, tokens: int, bits: int | None = None, group_size: int = 64
) -> int | None:
    """Bytes of the KV cache of a conversation.

    Args:
        config: the model.
        tokens: tokens in the cache.
        bits: of a value in a quantized cache; None for 16 bits.
        group_size: values that share a scale and a bias, where it is quantized.

    Returns:
        None where the model's layers are no plain attention, or its sizes are not known.
    """
    layers, heads, width = config.attention, config.kv_heads, config.head_dim
    if layers is None or heads is None or width is None:
        return None
    kept = sum(tokens if window is None else min(tokens, window) for window in layers)
    value_bits = 16 if bits is None else bits + _GROUP_BITS / group_size
    return int(2 * heads * width * kept * value_bits / 8)


def count_modules(modules: Iterable[Module], experts: int, top_k: int) -> Parameters:
    """The parameters of a model's modules, where a token uses `top_k` of `experts` experts."""
    return add_up(((module.kind, module.params) for module in modules), experts, top_k)


def add_up(counts: Iterable[tuple[str, int]], experts: int, top_k: int) -> Parameters:
    """Parameters by kind of part, added up; experts are those of the kind "experts"."""
    total = routed = 0
    for kind, count in counts:
        total += count
        routed += count if kind == "experts" else 0
    idle = routed * (experts - min(top_k, experts)) // experts if experts else 0
    return Parameters(total, total - idle)
