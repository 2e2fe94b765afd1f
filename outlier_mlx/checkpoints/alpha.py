"""Alphas: one scalar per expert, from JSON and pickles of several shapes and from tensors.

The rules are those of the published runtime, except that what it drops silently (numbers out of
range, contradictions, NaN) is refused here.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.checkpoints.keys import parse_number
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.storage.rounding import fits
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.texts import parse_json, read_bytes

Alphas = dict[tuple[int, int], float]
#: The key, in a file of new alphas, of those that they replace.
ORIGINALS = "originals"

_WRAPPERS = frozenset(
    ["alpha", "alphas", "expert_alpha", "expert_alphas", "experts", "layer_alpha", "layer_alphas"]
    + ["layers", "per_expert", "per_layer", "values"]
)
_LAYER = re.compile(r"(?:^|[._])layers?[._]([0-9]+)(?=$|[._])")
_EXPERT = re.compile(r"(?:^|[._])experts?[._]([0-9]+)(?=$|[._])|(?:^|[._])alpha_e([0-9]+)$")

# A pickle of four megabytes can refer to one list a million times, and lists can hold themselves.
MAX_DEPTH = 12
_MAX_VALUES = 20_000


def find_alphas(
    value: Any, layers: int, experts: int, place: str, *, exact: bool = False
) -> Alphas:
    """Alphas by (layer, expert), wherever they are in dictionaries, lists and arrays.

    Args:
        value: what a file holds.
        layers: layers of the model; numbers beyond are refused.
        experts: experts of a layer; numbers beyond are refused.
        place: the file's name, for messages.
        exact: a list must have an entry for every layer, or every expert; else it may be shorter.

    Raises:
        CheckpointError: a boolean, a number that is not finite, a layer or expert out of range,
            two values for one expert, or what is nested too deep.
    """
    return gather_alphas(_Walker(place, layers, experts, exact).walk(value), layers, experts, place)


def gather_alphas(
    values: Iterable[tuple[int, int, float]], layers: int, experts: int, place: str
) -> Alphas:
    """Alphas from (layer, expert, alpha) of one source, each checked.

    Raises:
        CheckpointError: a number that is not finite, a layer or expert out of range, or two values
            for one expert; `place` names the source.
    """
    found: Alphas = {}
    for layer, expert, alpha in values:
        where = f"{place}: layer {layer}, expert {expert}"
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise CheckpointError(f"{where}: the model has {layers} layers of {experts} experts")
        if not fits(alpha, "float32"):
            wrong = "too large for float32" if math.isfinite(alpha) else "expected a finite number"
            raise CheckpointError(f"{where}: alpha is {alpha:g}, {wrong}")
        first = found.setdefault((layer, expert), alpha)
        if first != alpha:
            raise CheckpointError(f"{where}: two values, {first} and {alpha}")
    return found


def read_alpha_file(path: Path, layers: int, experts: int) -> Alphas:
    """Alphas from an alpha.json file; see `find_alphas`."""
    return find_alphas(parse_json(read_bytes(path), path.name), layers, experts, path.name)


def alphas_from_tensors(tensors: Mapping[str, TensorRef], layers: int, experts: int) -> Alphas:
    """Alphas from tensors by key: (experts,), or a single number where the key names the expert.

    Raises:
        CheckpointError: no layer in a key, a wrong shape, a value that is not finite, or two
            tensors that disagree.
    """
    found: list[tuple[int, int, float]] = []
    for key, tensor in tensors.items():
        layer, expert = _key_place(key, None, None)
        shapes = [(experts,)] if expert is None else [(), (1,)]
        if layer is None or tensor.shape not in shapes:
            raise CheckpointError(
                f"{tensor.where}: shape {tensor.shape}; alphas have shape ({experts},) and a layer"
                " in their key"
            )
        read = find_alphas({key: tensor.read_float32()}, layers, experts, tensor.where)
        found += [(layer, expert, alpha) for (layer, expert), alpha in read.items()]
    return gather_alphas(found, layers, experts, "tensors of alphas")


@dataclass
class _Walker:
    """Finds alphas; see `find_alphas`."""

    place: str
    layers: int
    experts: int
    exact: bool
    values: int = 0

    def walk(
        self, value: Any, layer: int | None = None, expert: int | None = None, depth: int = 0
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (layer, expert, alpha) below `value`, of which layer or expert may be known."""
        self.values += 1
        if depth > MAX_DEPTH or self.values > _MAX_VALUES:
            raise CheckpointError(f"{self.place}: nested too deep, or more values than alphas")
        if isinstance(value, np.ndarray):
            one = value.shape == () or (value.shape == (1,) and expert is not None)
            value = value.item() if one else value.tolist()
        if isinstance(value, bool):
            raise CheckpointError(f"{self.place}: {value} where an alpha was expected")
        if isinstance(value, int | float):
            # An integer too large for a float is infinite, as JSON's 1e999 is.
            small = isinstance(value, float) or abs(value) < 2**1023
            number = float(value) if small else math.inf
            if layer is not None and expert is not None:
                yield layer, expert, number
            else:
                self._warn(number)
        elif isinstance(value, str):
            self._check_text(value, layer, expert)
        elif isinstance(value, list | tuple):
            self._check_length(value, layer, expert)
            for number, item in enumerate(value):
                if layer is None:
                    yield from self.walk(item, number, expert, depth + 1)
                elif expert is None:
                    yield from self.walk(item, layer, number, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key != ORIGINALS:
                    yield from self.walk(item, *_key_place(key, layer, expert), depth + 1)

    def _warn(self, number: float) -> None:
        warnings.warn(
            f"{self.place}: the number {number:g} belongs to no layer and expert; ignored",
            CheckpointWarning,
            stacklevel=3,
        )

    def _check_text(self, text: str, layer: int | None, expert: int | None) -> None:
        """Refuse a number that is written as text; tell of other texts in the place of an alpha."""
        if layer is None:
            return  # a version or a note
        where = f"{self.place}: layer {layer}" + (
            f", expert {expert}" if expert is not None else ""
        )
        if _is_number(text):
            raise CheckpointError(f"{where}: alpha is the text {text[:40]!r}, expected a number")
        if expert is not None:
            warnings.warn(
                f"{where}: the text {text[:40]!r} is no alpha; ignored",
                CheckpointWarning,
                stacklevel=3,
            )

    def _check_length(self, items: Any, layer: int | None, expert: int | None) -> None:
        if not self.exact or all(item is None or isinstance(item, str) for item in items):
            return
        where = f"{self.place}: layer {layer}" if layer is not None else self.place
        if expert is not None:
            raise CheckpointError(f"{where}, expert {expert}: {len(items)} values, expected one")
        expected, what = (self.layers, "layers") if layer is None else (self.experts, "experts")
        if len(items) != expected:
            raise CheckpointError(
                f"{where}: a list of {len(items)}, but the model has {expected} {what}"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _key_place(key: Any, layer: int | None, expert: int | None) -> tuple[int | None, int | None]:
    """The layer and expert that hold below `key`, given those that held above it."""
    if isinstance(key, tuple) and len(key) == 2 and all(type(part) is int for part in key):
        return key
    if isinstance(key, str):
        key = key.lower()
        if key in _WRAPPERS:
            return layer, expert
        if re.fullmatch(r"[0-9]+", key):
            key = parse_number(key)
    if type(key) is int:
        if layer is None:
            return key, expert
        return layer, key if expert is None else expert
    if isinstance(key, str):
        if match := _LAYER.search(key):
            layer = parse_number(match[1])
        if match := _EXPERT.search(key):
            expert = parse_number(match[1] or match[2])
    return layer, expert
