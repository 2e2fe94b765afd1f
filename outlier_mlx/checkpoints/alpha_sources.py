"""Which alphas are used: where several sources name an expert, they have an order."""

import zipfile
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.alpha import (
    Alphas,
    alphas_from_tensor,
    gather_alphas,
    read_alpha_file,
)
from outlier_mlx.checkpoints.alpha_overlay import read_alpha_overlay
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import TensorRef

#: In place of a file: the alphas that `alpha_overlay.pt` replaced.
ORIGINAL = "original"


def resolve_alphas(
    files: list[Path],
    tensors: dict[str, TensorRef],
    moe_layers: tuple[int, ...],
    layers: int,
    experts: int,
    override: Path | str | None = None,
    newer: Path | None = None,
) -> dict[int, np.ndarray]:
    """The alphas that are used: tensors win over files, `newer` over tensors, `override` over all.

    An expert that no source names has alpha 0 if there is any alpha.json, else 1: checkpoints
    with a partial alpha.json rely on the first, those without any on the second.

    Args:
        files: alpha.json files; where two name an expert, the later wins.
        tensors: tensors of alphas by key.
        moe_layers: the layers to return alphas of.
        layers: layers of the model.
        experts: experts of a layer.
        override: a file of alphas, JSON or in the format of `newer`; or "original" for the alphas
            that `newer` replaced.
        newer: V3.3's `alpha_overlay.pt`.

    Returns:
        For each MoE layer (experts,) float32.

    Raises:
        CheckpointError: a source is not valid, two tensors disagree, or nothing was replaced.
    """
    found: Alphas = {}
    for file in files:
        found.update(read_alpha_file(file, layers, experts))
    stored: list[tuple[int, int, float]] = []
    for key, tensor in tensors.items():
        read = alphas_from_tensor(tensor, key, layers, experts)
        stored += [(layer, expert, value) for (layer, expert), value in read.items()]
    found.update(gather_alphas(stored, layers, experts, "tensors of alphas"))
    if newer is not None:
        replaced = read_alpha_overlay(newer, layers, experts)
        replaced.compare(found, newer.name)
        found.update(replaced.originals if override == ORIGINAL else replaced.alphas)
    elif override == ORIGINAL:
        raise CheckpointError("--alpha original: there is no alpha_overlay.pt")
    if override not in (None, ORIGINAL):
        found.update(_read_any(Path(override), layers, experts))
    default = 0.0 if files else 1.0
    return {
        layer: np.array(
            [found.get((layer, expert), default) for expert in range(experts)], np.float32
        )
        for layer in moe_layers
    }


def _read_any(path: Path, layers: int, experts: int) -> Alphas:
    """A file that the user named: JSON, or a zip as `torch.save` writes it."""
    if path.is_file() and zipfile.is_zipfile(path):
        return read_alpha_overlay(path, layers, experts).alphas
    return read_alpha_file(path, layers, experts)
