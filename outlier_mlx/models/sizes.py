"""Sizes of a model: parameters, context length, bytes of the KV cache, bytes read per token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

from outlier_mlx.models.description import Description, ModelConfig
from outlier_mlx.models.rope import ORIGINAL, YARN

# A group of quantized values of the KV cache has a scale and a bias of 16 bits.
_GROUP_BITS = 32


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters before quantization and packing.

    Attributes:
        total: all parameters.
        active: those that one token uses: without the experts that it is not routed to.
    """

    total: int
    active: int


def context_length(config: Description) -> int | None:
    """Tokens of context that a model was made for; None if not known.

    `max_position_embeddings`, or the original context times YaRN's factor if that is more.
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
    """Bytes of the KV cache of a conversation, with the state of layers of linear attention.

    Args:
        config: the model.
        tokens: tokens in the cache.
        bits: bits of a value in a quantized cache; None for 16 bits without quantization.
        group_size: values of a quantized cache that share a scale and a bias.

    Returns:
        None if a layer has another kind of attention, or the model's sizes are not known.
    """
    layers, heads, width = config.attention, config.kv_heads, config.head_dim
    if layers is None or heads is None or width is None:
        return None
    kept = sum(tokens if window is None else min(tokens, window) for window in layers)
    value_bits = 16 if bits is None else bits + _GROUP_BITS / group_size
    states = sum(config.linear.state_nbytes for n in layers if n == 0) if config.linear else 0
    return int(2 * heads * width * kept * value_bits / 8) + states


def bytes_read(
    weights: Iterable[tuple[str, int, int]], config: Description, context: int, value_bytes: int
) -> int | None:
    """Bytes that decoding one token has to read.

    These are the KV cache and all weights, but only the experts that a token uses, and only one row
    of an embedding that is not also the output layer. Activations are left out.

    Args:
        weights: name, bytes and rows of each tensor, by mlx-lm's names.
        config: the model.
        context: tokens in the KV cache.
        value_bytes: bytes of a value in the cache.

    Returns:
        None if the size of the KV cache is not known.
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
    """Add up parameters by kind of part; the kind "experts" is the routed experts.

    Args:
        counts: kinds and numbers of parameters.
        config: has the number of experts that a token uses; without it, a token uses all.
    """
    total = routed = 0
    for kind, count in counts:
        total += count
        routed += count if kind == "experts" else 0
    experts = config.experts
    used = min(config.top_k or experts, experts)
    idle = routed * (experts - used) // experts if experts else 0
    return Parameters(total, total - idle)
