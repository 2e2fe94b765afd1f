"""Alphas: one scalar per expert, from JSON of several shapes and from tensors.

The rules are those of the published runtime, except that what it drops without a word (numbers
out of range, contradictions, NaN) is refused here.
"""

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.storage.safetensors import TensorRef, parse_json, read_bytes

Alphas = dict[tuple[int, int], float]

_WRAPPERS = frozenset(
    ["alpha", "alphas", "expert_alpha", "expert_alphas", "experts", "layer_alpha", "layer_alphas"]
    + ["layers", "per_expert", "per_layer", "values"]
)
_LAYER = re.compile(r"(?:^|[._])layers?[._](\d+)(?=$|[._])")
_EXPERT = re.compile(r"(?:^|[._])experts?[._](\d+)(?=$|[._])")


def alphas_from_json(value: object, layers: int, experts: int, place: str) -> Alphas:
    """Alphas from a parsed alpha.json.

    Args:
        value: what the JSON parsed to.
        layers: layers of the model; numbers beyond are refused.
        experts: experts of a layer; numbers beyond are refused.
        place: the file's name, for messages.

    Raises:
        CheckpointError: a boolean, a number that is not finite, a layer or expert out of range,
            or two values for one expert.
    """
    found: Alphas = {}
    try:
        for layer, expert, alpha in _walk(value, None, None, place):
            _check(alpha, layer, expert, layers, experts, place)
            if found.setdefault((layer, expert), alpha) != alpha:
                raise CheckpointError(
                    f"{place}: layer {layer}, expert {expert}: two values,"
                    f" {found[layer, expert]} and {alpha}"
                )
    except RecursionError:
        raise CheckpointError(f"{place}: nested too deep") from None
    return found


def _check(alpha: float, layer: int, expert: int, layers: int, experts: int, place: str) -> None:
    where = f"{place}: layer {layer}, expert {expert}"
    if not (layer < layers and expert < experts):
        raise CheckpointError(f"{where}: the model has {layers} layers of {experts} experts")
    if not math.isfinite(alpha):
        raise CheckpointError(f"{where}: alpha is {alpha}")


def _walk(
    value: object, layer: int | None, expert: int | None, place: str
) -> Iterator[tuple[int, int, float]]:
    if isinstance(value, bool):
        raise CheckpointError(f"{place}: {value} where an alpha was expected")
    if isinstance(value, int | float):
        if layer is None or expert is None:
            warnings.warn(
                f"{place}: the number {value} belongs to no layer and expert; ignored",
                CheckpointWarning,
                stacklevel=2,
            )
            return
        # An int too large for a float is as infinite as JSON's 1e999.
        yield layer, expert, float(value) if abs(value) < 2**1023 else math.inf
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if layer is None:
                yield from _walk(item, number, None, place)
            elif expert is None:
                yield from _walk(item, layer, number, place)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, *key_place(key, layer, expert), place)


def key_place(key: str, layer: int | None, expert: int | None) -> tuple[int | None, int | None]:
    """The layer and expert that hold below `key`, given those that held above it."""
    key = key.lower()
    if key in _WRAPPERS:
        return layer, expert
    if re.fullmatch(r"[0-9]{1,9}", key):
        if layer is None:
            return int(key), expert
        return layer, int(key) if expert is None else expert
    if match := _LAYER.search(key):
        layer = int(match[1])
    if match := _EXPERT.search(key):
        expert = int(match[1])
    return layer, expert


def read_alpha_file(path: Path, layers: int, experts: int) -> Alphas:
    """Alphas from an alpha.json file; see `alphas_from_json`."""
    value = parse_json(read_bytes(path), path.name)
    return alphas_from_json(value, layers, experts, path.name)


def alphas_from_tensor(tensor: TensorRef, key: str, layers: int, experts: int) -> Alphas:
    """Alphas from a tensor: (experts,), or a single number where its key names the expert.

    Raises:
        CheckpointError: no layer in the key, a wrong shape, or a value that is not finite.
    """
    layer, expert = key_place(key, None, None)
    shapes = [(experts,)] if expert is None else [(), (1,)]
    if layer is None or tensor.shape not in shapes:
        raise CheckpointError(
            f"{tensor.where}: shape {tensor.shape}; alphas have shape ({experts},) and a layer in"
            " their key"
        )
    numbers = range(experts) if expert is None else [expert]
    values = tensor.read_float32().reshape(-1).tolist()
    found = {(layer, number): value for number, value in zip(numbers, values, strict=True)}
    for (_, number), value in found.items():
        _check(value, layer, number, layers, experts, tensor.where)
    return found


def resolve_alphas(
    files: list[Path],
    tensors: dict[str, TensorRef],
    moe_layers: tuple[int, ...],
    layers: int,
    experts: int,
    override: Path | None = None,
) -> dict[int, np.ndarray]:
    """The alphas in force: tensors win over files, and `override` over both.

    An expert that no source names has alpha 0 if there is any alpha.json, else 1: checkpoints
    with a partial alpha.json rely on the first, those without any on the second.

    Returns:
        For each MoE layer (experts,) float32.
    """
    found: Alphas = {}
    for file in files:
        found.update(read_alpha_file(file, layers, experts))
    for key, tensor in tensors.items():
        found.update(alphas_from_tensor(tensor, key, layers, experts))
    if override is not None:
        found.update(read_alpha_file(override, layers, experts))
    default = 0.0 if files else 1.0
    return {
        layer: np.array(
            [found.get((layer, expert), default) for expert in range(experts)], np.float32
        )
        for layer in moe_layers
    }
