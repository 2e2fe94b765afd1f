"""Other alphas for a loaded tier, one number per expert, from a file."""

from pathlib import Path

import mlx.nn as nn

from outlier_mlx.checkpoints.alpha import read_alpha_file
from outlier_mlx.measure.routing import moe_blocks


def apply_alphas(model: nn.Module, path: Path) -> None:
    """Set a loaded tier's alphas from an alpha.json; experts that it does not name keep theirs.

    Raises:
        CheckpointError: the file is invalid, or names layers or experts that do not exist.
        OutlierError: the model has no experts.
    """
    blocks = moe_blocks(model)
    experts = next(iter(blocks.values())).alpha.shape[0]
    for (layer, expert), value in read_alpha_file(path, len(model.layers), experts).items():
        if layer in blocks:
            blocks[layer].alpha[expert] = value
