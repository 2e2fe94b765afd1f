"""V3.3's `alpha_overlay.pt`: newer alphas for a V3.2 checkpoint, and those they replace.

How the numbers are keyed inside is not published, so every likely layout is read. What would have
to be guessed (a list that is as long as neither the layers nor the experts) is refused.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.checkpoints.alpha import Alphas, as_float, gather_alphas, key_place
from outlier_mlx.checkpoints.keys import parse_number
from outlier_mlx.errors import CheckpointError, CheckpointWarning, listed
from outlier_mlx.storage.torch_zip import load_torch_zip

_ORIGINALS = "originals"
_WRAPPERS = ("alphas", "alpha", "overlay", "alpha_values", "trained")
_ALPHA_OF_EXPERT = re.compile(r"(?:^|[._])alpha_e([0-9]+)$")

# Of what differs by less, nobody meant it to.
_TOLERANCE = 1e-3
# A file of four megabytes can refer to one list a million times, and lists can hold themselves.
_MAX_DEPTH = 12
_MAX_VALUES = 20_000


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
        """Warn if the checkpoint's own alphas are others than those that were replaced."""
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
        CheckpointError: not such a file, alphas that are not sound, or none that is recognised.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    content = load_torch_zip(path)
    values, originals = _unwrap(content, path.name)
    found, replaced = (
        gather_alphas(_Walker(place, layers, experts).walk(part), layers, experts, place)
        for place, part in ((path.name, values), (f"{path.name}: {_ORIGINALS}", originals))
    )
    if not found:
        raise CheckpointError(f"{path.name}: no alphas recognised; keys found: {_keys(content)}")
    return AlphaOverlay(found, replaced)


def _unwrap(content: Any, place: str) -> tuple[Any, Any]:
    """What is under the wrapper keys, if there are any, and the originals beside or above it."""
    originals = None
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, dict):
            break
        originals = content.get(_ORIGINALS, originals)
        wrappers = [key for key in _WRAPPERS if isinstance(content.get(key), dict | list | tuple)]
        if len(wrappers) > 1:
            raise CheckpointError(f"{place}: alphas under {wrappers[0]!r} and {wrappers[1]!r}")
        if not wrappers:
            break
        content = content[wrappers[0]]
    return content, originals


@dataclass
class _Walker:
    """Finds alphas in what a file holds."""

    place: str
    layers: int
    experts: int
    values: int = 0

    def walk(
        self, value: Any, layer: int | None = None, expert: int | None = None, depth: int = 0
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (layer, expert, alpha) below `value`, of which layer or expert may be known."""
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:
            raise CheckpointError(f"{self.place}: nested too deep, or more values than alphas")
        if isinstance(value, bool):
            raise CheckpointError(f"{self.place}: {value} where an alpha was expected")
        if isinstance(value, int | float):
            yield from self._number(as_float(value), layer, expert)
        elif isinstance(value, np.ndarray):
            yield from self._tensor(value, layer, expert, depth)
        elif isinstance(value, list | tuple):
            yield from self._sequence(value, layer, expert, depth)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key != _ORIGINALS:
                    yield from self.walk(item, *self._below(key, layer, expert), depth + 1)

    def _number(
        self, value: float, layer: int | None, expert: int | None
    ) -> Iterator[tuple[int, int, float]]:
        if layer is not None and expert is not None:
            yield layer, expert, value
        else:
            warnings.warn(
                f"{self.place}: the number {value:g} belongs to no layer and expert; ignored",
                CheckpointWarning,
                stacklevel=2,
            )

    def _tensor(
        self, value: np.ndarray, layer: int | None, expert: int | None, depth: int
    ) -> Iterator[tuple[int, int, float]]:
        if value.shape == () or (value.shape == (1,) and expert is not None):
            yield from self._number(value.item(), layer, expert)
        else:
            yield from self._sequence(value.tolist(), layer, expert, depth)

    def _sequence(
        self, items: Any, layer: int | None, expert: int | None, depth: int
    ) -> Iterator[tuple[int, int, float]]:
        if expert is not None:
            raise CheckpointError(
                f"{self.place}: layer {layer}, expert {expert}: {len(items)} values, expected one"
            )
        if all(item is None or isinstance(item, str) for item in items):
            return
        expected, what = (self.layers, "layers") if layer is None else (self.experts, "experts")
        if len(items) != expected:
            where = "a list" if layer is None else f"layer {layer}: a list"
            raise CheckpointError(
                f"{self.place}: {where} of {len(items)}, but the model has {expected} {what}"
            )
        for number, item in enumerate(items):
            if layer is None:
                yield from self.walk(item, number, None, depth + 1)
            else:
                yield from self.walk(item, layer, number, depth + 1)

    def _below(
        self, key: Any, layer: int | None, expert: int | None
    ) -> tuple[int | None, int | None]:
        """The layer and expert that hold below a key."""
        if isinstance(key, str):
            if match := _ALPHA_OF_EXPERT.search(key):
                expert = parse_number(match[1])
            return key_place(key, layer, expert)
        if type(key) is int:
            if layer is None:
                return key, expert
            return layer, key if expert is None else expert
        if isinstance(key, tuple) and len(key) == 2 and all(type(part) is int for part in key):
            return key
        return layer, expert


def _keys(content: Any) -> str:
    if not isinstance(content, dict):
        return f"none, but a {type(content).__name__}"
    return listed(map(repr, content), 12)
