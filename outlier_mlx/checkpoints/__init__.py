"""Reading overlays: each form has a small module that turns what is on disk into an `Overlay`."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from outlier_mlx.checkpoints import expert_files, gguf, packed, single, toy
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.unsupported import refuse_unsupported
from outlier_mlx.errors import CheckpointError, CheckpointWarning, listed
from outlier_mlx.models.config import is_ternary_model
from outlier_mlx.storage.paths import inside, named, no_folder
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_json

__all__ = ["ALPHA_OVERLAY", "Overlay", "open_overlay"]

Opener = Callable[[Path, Mapping[str, TensorRef]], Overlay | None]

# Each opener returns None if the folder is not of its form; the first that returns an overlay
# decides. If none does, the error lists what they looked for.
_FORMS: tuple[tuple[str, Opener], ...] = (
    (toy.SIGN, toy.open_toy),
    (expert_files.SIGN, expert_files.open_expert_files),
    (packed.SIGN, packed.open_packed),
    (gguf.SIGN, gguf.open_gguf),
    (single.SIGN, single.open_single),
)
ALPHA_OVERLAY = "alpha_overlay.pt"


def open_overlay(path: str | Path) -> Overlay:
    """Find the form of the overlay in a folder and open it; only headers are read.

    Args:
        path: the overlay's folder.

    Raises:
        CheckpointError: there is no overlay, it is a tier already, or it is not valid.
    """
    folder = named(path)
    if not folder.is_dir():
        raise CheckpointError(no_folder(folder))
    config = folder / "config.json"
    raw = read_json(inside(folder, "config.json")) if config.exists() else {}
    if "ternary" in raw:
        what = "a ternary model" if is_ternary_model(raw) else "a tier already"
        raise CheckpointError(f"{folder}: this is {what}; an overlay was expected")
    tensors = read_shards(folder, required=False, every=True)
    refuse_unsupported(folder, tensors)
    for _, open_form in _FORMS:
        overlay = open_form(folder, tensors)
        if overlay is not None:
            _tell_unused(overlay)
            return _with_new_alphas(overlay)
    looked_for = "; ".join(sign for sign, _ in _FORMS)
    raise CheckpointError(
        f"{folder}: not an overlay: none of its tensors is an expert or a router (an overlay comes"
        f" first, and --base names its base). Looked for: {looked_for}"
    )


def _tell_unused(overlay: Overlay) -> None:
    """Warn of unknown tensors. RoPE's table is known, and is computed again."""
    names = [name for name in overlay.unused if not name.endswith("rotary_emb.inv_freq")]
    if names:
        warnings.warn(
            f"{overlay.path.name}: ignored: unknown tensors: {listed(names, 3)}",
            CheckpointWarning,
            stacklevel=3,
        )


def _with_new_alphas(overlay: Overlay) -> Overlay:
    """V3.3 is any other form plus a file of newer alphas."""
    if not (overlay.path / ALPHA_OVERLAY).exists() or not overlay.routers:
        return overlay
    file = inside(overlay.path, ALPHA_OVERLAY)
    return replace(overlay, form=f"{overlay.form} + {ALPHA_OVERLAY}", alpha_overlay=file)
