"""V3.3's `alpha_overlay.pt`: newer alphas for a V3.2 checkpoint, and those they replace.

Its layout is not published, so every likely one is read. What would have to be guessed (a list that
is as long as neither the layers nor the experts) is refused.
"""

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints.alpha import (
    MAX_DEPTH,
    ORIGINALS,
    Alphas,
    find_alphas,
    read_alpha_file,
)
from outlier_mlx.errors import CheckpointError, CheckpointWarning, listed
from outlier_mlx.storage.torch_zip import load_torch_zip

_WRAPPERS = ("alphas", "alpha", "overlay", "alpha_values", "trained")

# Smaller differences come from rounding.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AlphaOverlay:
    """What an alpha_overlay.pt holds.

    Attributes:
        alphas: the newer alphas, by (layer, expert).
        originals: those they replace; empty if the file does not keep them.
    """

    alphas: Alphas
    originals: Alphas

    def compare(self, alphas: Alphas, place: str) -> None:
        """Warn if the checkpoint's own alphas are not those that this file replaced."""
        for (layer, expert), original in self.originals.items():
            own = alphas.get((layer, expert), original)
            if abs(own - original) > _TOLERANCE:
                warnings.warn(
                    f"{place}: made for another checkpoint? It replaces alpha {original:g} of layer"
                    f" {layer}, expert {expert}, which is {own:g} here",
                    CheckpointWarning,
                    stacklevel=2,
                )
                return


def read_alpha_overlay(path: Path, layers: int, experts: int) -> AlphaOverlay:
    """Read an alpha_overlay.pt; no code from it is run.

    Args:
        path: the file.
        layers: layers of the model.
        experts: experts of a layer.

    Raises:
        CheckpointError: not such a file, alphas that are not valid, or none that is recognised.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    content = load_torch_zip(path)
    values, originals = _unwrap(content, path.name)
    found, replaced = (
        find_alphas(part, layers, experts, place, exact=True)
        for place, part in ((path.name, values), (f"{path.name}: {ORIGINALS}", originals))
    )
    if not found:
        raise CheckpointError(f"{path.name}: no alphas recognised; keys found: {_keys(content)}")
    return AlphaOverlay(found, replaced)


def read_any_alphas(path: Path, layers: int, experts: int) -> Alphas:
    """Alphas from a file that the user named: JSON, or a zip as `torch.save` writes it."""
    if path.is_file() and zipfile.is_zipfile(path):
        return read_alpha_overlay(path, layers, experts).alphas
    return read_alpha_file(path, layers, experts)


def _unwrap(content: Any, place: str) -> tuple[Any, Any]:
    """What is under the wrapper keys, if there are any, and the originals beside or above it."""
    originals = None
    for _ in range(MAX_DEPTH):
        if not isinstance(content, dict):
            break
        originals = content.get(ORIGINALS, originals)
        wrappers = [key for key in _WRAPPERS if isinstance(content.get(key), dict | list | tuple)]
        if len(wrappers) > 1:
            raise CheckpointError(f"{place}: alphas under {wrappers[0]!r} and {wrappers[1]!r}")
        if not wrappers:
            break
        content = content[wrappers[0]]
    return content, originals


def _keys(content: Any) -> str:
    if not isinstance(content, dict):
        return f"none, but a {type(content).__name__}"
    return listed(map(repr, content), 12)
