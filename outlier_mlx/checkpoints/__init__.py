"""Reading overlays: one small module a form, each turning what is on disk into an `Overlay`."""

from pathlib import Path

from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.single import open_single
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import read_json

__all__ = ["Overlay", "open_overlay"]


def open_overlay(path: str | Path) -> Overlay:
    """Find the form of the overlay in a folder and open it; only headers are read.

    Args:
        path: the overlay's folder.

    Raises:
        CheckpointError: there is no overlay, it is a tier already, or it is not sound.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = folder / "config.json"
    if config.exists() and "ternary" in read_json(config):
        raise CheckpointError(f"{folder}: this is a tier already; an overlay was expected")
    overlay = open_single(folder)
    if overlay is None:
        raise CheckpointError(
            f"{folder}: not an overlay: none of its tensors is an expert or a router"
            " ([base.]model.layers.N.mlp.experts.* or .mlp.router.weight)"
        )
    return overlay
