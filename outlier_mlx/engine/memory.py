"""What a model needs, what this machine gives, and what to do when that is not enough."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outlier_mlx.engine.buffers import MAX_MB
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.attention import fitting_group
from outlier_mlx.models.config import Description, describe, is_ternary_model, raw_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import size

#: Bytes of a budget that is not known: everything fits, and swapping is the user's to notice.
UNLIMITED = sys.maxsize
# The share of its memory that macOS lets the GPU use by default; docs/sizes.md has the source.
GPU_SHARE = 0.75
# Without a GPU: the experts once more in MLX's 2-bit format, everything else in float32.
CPU_FACTOR = 2.0
# The same for a model whose own matrices are ternary: 1.6 bits, and 2 once more, with scales and
# biases in float32.
TERNARY_CPU_FACTOR = 2.5


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take.

    Attributes:
        nbytes: how much; `UNLIMITED` where that is not known.
        whose: what sets the limit, for messages.
    """

    nbytes: int
    whose: str

    def __str__(self) -> str:
        """What gives how much."""
        if self.nbytes == UNLIMITED:
            return f"it is not known how much {self.whose} gives"
        return f"{self.whose} gives {size(self.nbytes)}"


def budget(ram_gb: float | None = None) -> Budget:
    """What this machine gives a model, or what a Mac with `ram_gb` gigabytes (2^30) would."""
    if ram_gb is not None:
        return Budget(int(ram_gb * 2**30 * GPU_SHARE), f"a Mac with {ram_gb:g} GB")
    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size")
    if mx.metal.is_available() and limit:
        return Budget(int(limit), "this Mac's GPU")
    physical = physical_memory()
    return Budget(UNLIMITED if physical is None else int(physical * GPU_SHARE), "this machine")


def physical_memory() -> int | None:
    """Bytes of memory that the machine has; None where the system does not say."""
    try:
        pages, nbytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return pages * nbytes if pages > 0 and nbytes > 0 else None


def wait_within_budget() -> None:
    """Let MLX wait for the GPU before it takes more than the GPU's memory, if buffers are large.

    Intermediate results of a command buffer are freed when the GPU is done with all of it, and MLX
    prepares up to ten buffers ahead. With MLX's own small buffers this is little; with larger ones
    it can be gigabytes in a long prompt. MLX waits at its memory limit, which by default is one and
    a half times what the GPU should use; here it becomes just that. A lower limit stays.
    """
    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size")
    if MAX_MB in os.environ and mx.metal.is_available() and limit:
        before = mx.set_memory_limit(int(limit))
        if before < int(limit):
            mx.set_memory_limit(before)


@dataclass(frozen=True)
class Needs:
    """What a model takes of a budget.

    Attributes:
        weights: bytes of its weights.
        config: what is known of it.
        factor: how many times as large a KV cache is as it would be in 16 bits.
    """

    weights: int
    config: Description
    factor: float

    def cache(
        self, tokens: int, bits: int | None = None, group_size: int = 64, start: int = 0
    ) -> int:
        """Bytes of the KV cache of a conversation at its largest; 0 where that is not known.

        Args:
            tokens: tokens in the cache.
            bits: bits of a value in a quantized cache; None: it is not quantized.
            group_size: values of a quantized cache that share a scale.
            start: from how many tokens on the cache is quantized.
        """
        plain = kv_bytes(self.config, tokens if bits is None else min(tokens, start)) or 0
        if bits is None or tokens < start:
            return int(self.factor * plain)
        quantized = kv_bytes(self.config, tokens, bits, group_size) or 0
        return int(self.factor * max(plain, quantized))


def needs_of(folder: Path, available: Budget) -> Needs:
    """What the model in a folder takes: a tier, or a plain MLX model."""
    weights = sum(tensor.nbytes for tensor in read_shards(folder).values())
    config, factor = raw_config(folder), _factor(available)
    own = TERNARY_CPU_FACTOR if is_ternary_model(config) and factor > 1 else factor
    return Needs(int(weights * own), describe(config), factor)


def cache_needs(config: Description) -> Needs:
    """What the KV caches of a loaded model take on this machine, without its weights."""
    return Needs(0, config, _factor(budget()))


def _factor(available: Budget) -> float:
    return CPU_FACTOR if available.whose == "this machine" else 1.0


def check_fits(
    folder: Path,
    tokens: int,
    kv_bits: int | None = None,
    available: Budget | None = None,
    *,
    kv_group_size: int = 64,
    kv_start: int = 0,
    conversations: int = 1,
    cures: Sequence[str] = (),
    may_quantize: bool = True,
    beside: Path | None = None,
) -> None:
    """Refuse to load a model that does not fit, before the machine swaps.

    Args:
        folder: a tier or a plain MLX model.
        tokens: tokens that the KV cache of a conversation will hold.
        kv_bits: bits of a value in a quantized KV cache.
        available: available memory; None: that of this machine.
        kv_group_size: values of a quantized KV cache that share a scale.
        kv_start: from how many tokens on it is quantized.
        conversations: how many have a KV cache at the same time.
        cures: more remedies to name in the message.
        may_quantize: whether the user could have the KV cache quantized.
        beside: another model that will be in memory at the same time, without a KV cache.

    Raises:
        OutlierError: it does not fit; the message says what can be done.
    """
    available = available or budget()
    needs, names = needs_of(folder, available), f"{folder.name} needs"
    if beside is not None:
        other = needs_of(beside, available)
        needs = replace(needs, weights=needs.weights + other.weights)
        names = f"{folder.name} and {beside.name} need"
    cache = conversations * needs.cache(tokens, kv_bits, kv_group_size, kv_start)
    needed = needs.weights + cache
    if needed <= available.nbytes:
        return
    helps = list(cures)
    if kv_bits is None and may_quantize:
        room = (available.nbytes - needs.weights) // conversations
        helps += _quantizing(needs, room, tokens, kv_group_size, kv_start)
    helps.append("a smaller recipe (`outlier-mlx tiers OVERLAY` lists them)")
    if available.whose == "this Mac's GPU":
        megabytes = -(-needed // 2**20)
        helps.append(f"a higher limit (sudo sysctl iogpu.wired_limit_mb={megabytes})")
    whose = f" of {conversations} conversations of {tokens} tokens" if conversations > 1 else ""
    raise OutlierError(
        f"{names} {size(needed)}, {size(cache)} of it for the KV cache{whose}; {available}."
        f" What helps: {', or '.join(helps)}; --ignore-memory loads it anyway"
    )


def _quantizing(needs: Needs, room: int, tokens: int, group_size: int, start: int) -> list[str]:
    """The options that make a KV cache fit into `room` bytes by quantizing it, if there are any."""
    group = fitting_group(needs.config, group_size)
    if group is None or needs.cache(tokens) == 0:
        return []
    options = "--kv-bits 4" + (f" --kv-group-size {group}" if group != group_size else "")
    if needs.cache(tokens, 4, group, start) <= room:
        return [options]
    if needs.cache(tokens, 4, group) <= room:
        return [f"{options} --quantized-kv-start 0"]
    return []
