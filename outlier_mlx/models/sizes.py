"""What a model takes: parameters, bytes of weights, of the KV cache, and read for a token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

from outlier_mlx.models.description import Description, ModelConfig
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
        bits: bits of a value in a quantized cache; None for 16 bits.
        group_size: values that share a scale and a bias, where it is quantized.

    Returns:
        None where a layer is not plain attention, or sizes are unknown.
    """
    layers, heads, width = config.attention, config.kv_heads, config.head_dim
    if layers is None or heads is None or width is None:
        return None
    kept = sum(tokens if window is None else min(tokens, window) for window in layers)
    value_bits = 16 if bits is None else bits + _GROUP_BITS / group_size
    return int(2 * heads * width * kept * value_bits / 8)


def bytes_read(
    weights: Iterable[tuple[str, int, int]], config: Description, context: int, value_bytes: int
) -> int | None:
    """Bytes that decoding one token has to read.

    Every weight once, but: of the experts those that a token uses, of an embedding that is not
    also the output layer one row; and the KV cache. Activations are left out.

    Args:
        weights: name, bytes and rows of each tensor, by mlx-lm's names.
        config: the model.
        context: tokens in the KV cache.
        value_bytes: bytes of a value in the cache.

    Returns:
        None where the size of the KV cache is not known.
    """
    cache = kv_bytes(config, context)
    if cache is None:
        return None
    used = min(config.top_k or config.experts, config.experts) / max(1, config.experts)
    total = 0.0
    for name, nbytes, rows in weights:
        share = 1.0
        if ".switch_mlp." in name:
            share = used
        elif name.startswith("model.embed_tokens.") and not config.tied:
            share = 1 / rows
        total += nbytes * share
    return round(total) + cache * value_bytes // 2


def add_up(counts: Iterable[tuple[str, int]], config: Description) -> Parameters:
    """Parameters by kind of part, added up; those of the kind "experts" are routed to.

    Args:
        counts: kinds and parameters.
        config: says how many of the experts a token uses; all of them where it does not.
    """
    total = routed = 0
    for kind, count in counts:
        total += count
        routed += count if kind == "experts" else 0
    experts = config.experts
    used = min(config.top_k or experts, experts)
    idle = routed * (experts - used) // experts if experts else 0
    return Parameters(total, total - idle)
