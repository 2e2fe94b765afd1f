"""What a model needs, what this machine gives, and what to do when that is not enough."""

import os
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.config import Defaults, ModelConfig, parse_config, tier_config
from outlier_mlx.checkpoints.shards import read_shards
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.folders import inside
from outlier_mlx.storage.safetensors import read_json

# The share of its memory that macOS lets the GPU use by default; docs/sizes.md has the source.
GPU_SHARE = 0.75
# Weights without a GPU: the experts once more in MLX's 2-bit format, everything in float32.
CPU_FACTOR = 2.0
# Each group of 64 quantized values has a scale and a bias of 16 bits.
_GROUP_BITS = 32 / 64


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take.

    Attributes:
        nbytes: how much.
        whose: what sets the limit, for messages.
    """

    nbytes: int
    whose: str


def kv_bytes(config: ModelConfig, tokens: int, bits: int | None = None) -> int:
    """Bytes of the KV cache.

    Args:
        config: the model's dimensions.
        tokens: tokens in the cache.
        bits: of a quantized cache, in groups of 64; None for 16 bits.
    """
    width = 2 * config.layers * config.kv_heads * config.head_dim
    return int(width * tokens * (16 if bits is None else bits + _GROUP_BITS) / 8)


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


def check_fits(
    folder: Path,
    tokens: int,
    kv_bits: int | None = None,
    available: Budget | None = None,
) -> None:
    """Refuse to load a model that does not fit, before the machine swaps.

    Args:
        folder: a tier or a plain MLX model.
        tokens: tokens that the KV cache will hold.
        kv_bits: of a quantized KV cache.
        available: what there is; by default, what this machine gives.

    Raises:
        OutlierError: it does not fit; the message says what can be done.
    """
    weights = sum(tensor.nbytes for tensor in read_shards(folder).values())
    available = available or budget()
    if available.whose == "this machine":
        weights = int(weights * CPU_FACTOR)
    config = dimensions(read_json(inside(folder, "config.json")))
    cache = kv_bytes(config, tokens, kv_bits) if config else 0
    if weights + cache <= available.nbytes:
        return
    cures = []
    if config and kv_bits is None and weights + kv_bytes(config, tokens, 4) <= available.nbytes:
        cures.append("--kv-bits 4")
    cures.append("a smaller recipe (`outlier-mlx tiers OVERLAY` lists them)")
    if available.whose == "this Mac's GPU":
        megabytes = -(-(weights + cache) // 2**20)
        cures.append(f"a higher limit (sudo sysctl iogpu.wired_limit_mb={megabytes})")
    raise OutlierError(
        f"{folder.name} needs {(weights + cache) / 1e9:.1f} GB, {cache / 1e9:.1f} of it for the"
        f" KV cache; {available.whose} gives {available.nbytes / 1e9:.1f}. What helps:"
        f" {', or '.join(cures)}; --ignore-memory tries all the same"
    )


def dimensions(raw: dict) -> ModelConfig | None:
    """Dimensions by a Qwen2-like `config.json`; None for others, whose cache is not known."""
    try:
        if "ternary" in raw:
            return tier_config(raw)
        return parse_config({**raw, "model_type": "qwen2"}, Defaults())
    except CheckpointError:
        return None
