"""The oldest form, V0: keys `layers.N.ffn.*`. Every layer is MoE, or none is.

Without experts, the FFN is stored as latent floats that are ternarised where they are used.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.collect import Collected
from outlier_mlx.checkpoints.keys import (
    BaseKey,
    Key,
    RouterKey,
    base_key,
    parse_expert_leaf,
    parse_number,
)
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.models.config import PROJECTIONS, Defaults, read_config
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.tensors import row_ranges

SIGN = "layers.N.ffn.* in *.safetensors"

# What this form's runtime assumes where config.json does not say.
DEFAULTS = Defaults(rope_theta=10_000.0, rms_norm_eps=1e-5, max_positions=4096)

_LAYER = re.compile(r"layers\.(?P<layer>[0-9]+)\.(?P<leaf>.+)")
_EXPERT = re.compile(r"ffn\.experts\.(?P<expert>[0-9]+)\.(?P<leaf>.+)")
_RENAMED = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.o_proj.weight": "self_attn.o_proj.weight",
    **{f"attn.{p}_proj.{w}": f"self_attn.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")},
    **{f"ffn.shared.{p}_proj.weight": f"mlp.{p}_proj.weight" for p in PROJECTIONS},
    **{f"ffn.{p}_proj.latent_weight": f"mlp.{p}_proj.weight" for p in PROJECTIONS},
}


@dataclass(frozen=True)
class LatentWeights(TensorRef):
    """Float weights W that stand for a * sign(W) where |W| > a / 2, else 0; a = mean |W|."""

    @cached_property
    def magnitude(self) -> np.float32:
        """The mean |W| of the whole tensor, summed in float64."""
        total = 0.0
        for start, stop in row_ranges(self.shape[0], self.shape[1]):
            values = super().read_float32(start, stop)
            total += float(np.abs(values).sum(dtype=np.float64))
        return np.float32(total / max(1, self.shape[0] * self.shape[1]))

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as the model uses them: -a, 0 or a."""
        values = super().read_float32(start, stop)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.where}: holds NaN or infinity")
        half = self.magnitude / 2
        return np.where(values > half, self.magnitude, np.where(values < -half, -self.magnitude, 0))


def open_toy(folder: Path, tensors: Mapping[str, TensorRef]) -> Overlay | None:
    """Open a V0 checkpoint, or return None if this is none.

    A dense one becomes an overlay without MoE layers, whose base is the whole model.

    Raises:
        CheckpointError: it is one, but not a valid one.
    """
    if not any(re.match(r"(?:model\.)?layers\.[0-9]+\.ffn\.", key) for key in tensors):
        return None
    collected = Collected()
    for key, tensor in tensors.items():
        parsed = _parse(key.removeprefix("model."))
        latent = isinstance(parsed, BaseKey) and key.endswith(".latent_weight")
        collected.add(parsed, _latent(tensor) if latent else tensor)
    config = read_config(folder, DEFAULTS)
    overlay = collected.overlay(folder, "toy" if config.experts else "toy dense", config)
    if overlay.alpha_files:
        warnings.warn(
            f"{folder.name}: alpha.json is ignored: experts of the form {overlay.form} have none",
            CheckpointWarning,
            stacklevel=2,
        )
    return replace(overlay, alpha_files=[])


def _parse(key: str) -> Key | None:
    """What a key without its `model.` names."""
    if key in ("embed_tokens.weight", "norm.weight"):
        return BaseKey(f"model.{key}")
    if key == "lm_head.weight":
        return BaseKey(key)
    match = _LAYER.fullmatch(key)
    if match is None:
        return None
    layer, leaf = parse_number(match["layer"]), match["leaf"]
    if leaf == "ffn.router_weight":
        return RouterKey(layer)
    if leaf in _RENAMED:
        return base_key(layer, _RENAMED[leaf])
    if match := _EXPERT.fullmatch(leaf):
        return parse_expert_leaf(match["leaf"], layer, parse_number(match["expert"]))
    return None


def _latent(tensor: TensorRef) -> LatentWeights:
    if len(tensor.shape) != 2 or tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected a float matrix (out, in)"
        )
    return LatentWeights(tensor.name, tensor.file, tensor.dtype, tensor.shape, tensor.offset)
