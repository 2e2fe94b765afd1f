"""Overlays in one folder of shards: the forms "real" (V1, V2) and "v3.2".

They differ in spelling alone: `base.model.layers.N.mlp.shared_expert.gate_W` is
`model.layers.N.mlp.gate_proj.weight`. A folder that was repacked may mix the two.
"""

from collections.abc import Mapping
from pathlib import Path

from outlier_mlx.checkpoints.collect import collect
from outlier_mlx.checkpoints.keys import ExpertKey, RouterKey, parse_key
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.models.config import read_config
from outlier_mlx.storage.safetensors import TensorRef

SIGN = "[base.]model.layers.N.mlp.experts.* or .mlp.router.weight in *.safetensors"


def open_single(folder: Path, tensors: Mapping[str, TensorRef]) -> Overlay | None:
    """Open a folder of shards as an overlay, or return None if it has no expert and no router.

    Raises:
        CheckpointError: it is an overlay, but not a valid one.
    """
    if not any(isinstance(parse_key(key), ExpertKey | RouterKey) for key in tensors):
        return None
    form = "real" if any(key.startswith("base.") for key in tensors) else "v3.2"
    return collect(tensors).overlay(folder, form, read_config(folder))
