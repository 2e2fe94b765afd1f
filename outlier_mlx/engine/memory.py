"""What a model needs, what this machine gives, and what to do when that is not enough."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import Description, describe, raw_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.storage.shards import read_shards

# The share of its memory that macOS lets the GPU use by default; docs/sizes.md has the source.
GPU_SHARE = 0.75
# Without a GPU: the experts once more in MLX's 2-bit format, everything else in float32.
CPU_FACTOR = 2.0


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take.

    Attributes:
        nbytes: how much.
        whose: what sets the limit, for messages.
    """

    nbytes: int
    whose: str


def budget(ram_gb: float | None = None) -> Budget:
    """What this machine gives a model, or what a Mac with `ram_gb` gigabytes (2^30) would."""
    if ram_gb is not None:
        return Budget(int(ram_gb * 2**30 * GPU_SHARE), f"a Mac with {ram_gb:g} GB")
    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size")
    if mx.metal.is_available() and limit:
        return Budget(int(limit), "this Mac's GPU")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Budget(int(physical * GPU_SHARE), "this machine")


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

    def cache(self, tokens: int, bits: int | None = None, group_size: int = 64) -> int:
        """Bytes of the KV cache of a conversation; 0 where its size is not known."""
        return int(self.factor * (kv_bytes(self.config, tokens, bits, group_size) or 0))


def needs_of(folder: Path, available: Budget) -> Needs:
    """What the model in a folder takes: a tier, or a plain MLX model."""
    weights = sum(tensor.nbytes for tensor in read_shards(folder).values())
    factor = CPU_FACTOR if available.whose == "this machine" else 1.0
    return Needs(int(weights * factor), describe(raw_config(folder)), factor)


def check_fits(
    folder: Path,
    tokens: int,
    kv_bits: int | None = None,
    available: Budget | None = None,
    *,
    kv_group_size: int = 64,
    conversations: int = 1,
    cures: Sequence[str] = (),
) -> None:
    """Refuse to load a model that does not fit, before the machine swaps.

    Args:
        folder: a tier or a plain MLX model.
        tokens: tokens that the KV cache of a conversation will hold.
        kv_bits: bits of a value in a quantized KV cache.
        available: available memory; None: that of this machine.
        kv_group_size: values of a quantized KV cache that share a scale.
        conversations: how many have a KV cache at the same time.
        cures: more remedies to name in the message.

    Raises:
        OutlierError: it does not fit; the message says what can be done.
    """
    available = available or budget()
    needs = needs_of(folder, available)
    cache = conversations * needs.cache(tokens, kv_bits, kv_group_size)
    needed = needs.weights + cache
    if needed <= available.nbytes:
        return
    helps = list(cures)
    quantized = conversations * needs.cache(tokens, 4, kv_group_size)
    if cache and kv_bits is None and needs.weights + quantized <= available.nbytes:
        helps.append("--kv-bits 4")
    helps.append("a smaller recipe (`outlier-mlx tiers OVERLAY` lists them)")
    if available.whose == "this Mac's GPU":
        megabytes = -(-needed // 2**20)
        helps.append(f"a higher limit (sudo sysctl iogpu.wired_limit_mb={megabytes})")
    whose = f" of {conversations} conversations of {tokens} tokens" if conversations > 1 else ""
    raise OutlierError(
        f"{folder.name} needs {needed / 1e9:.1f} GB, {cache / 1e9:.1f} of it for"
        f" the KV cache{whose}; {available.whose} gives {available.nbytes / 1e9:.1f}. What helps:"
        f" {', or '.join(helps)}; --ignore-memory loads it anyway"
    )
