"""Alphas: one scalar per expert, from JSON of several shapes and from tensors.

The rules are those of the published runtime, except that what it drops without a word (numbers
out of range, contradictions, NaN) is refused here.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from outlier_mlx.checkpoints.keys import parse_number
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.storage.safetensors import TensorRef, parse_json, read_bytes

Alphas = dict[tuple[int, int], float]

_WRAPPERS = frozenset(
    ["alpha", "alphas", "expert_alpha", "expert_alphas", "experts", "layer_alpha", "layer_alphas"]
    + ["layers", "per_expert", "per_layer", "values"]
)
_LAYER = re.compile(r"(?:^|[._])layers?[._]([0-9]+)(?=$|[._])")
_EXPERT = re.compile(r"(?:^|[._])experts?[._]([0-9]+)(?=$|[._])")


def alphas_from_json(
    value: object, layers: int, experts: int, place: str, *, lenient: bool = False
) -> Alphas:
    """Alphas from a parsed alpha.json.

    Args:
        value: what the JSON parsed to.
        layers: layers of the model; numbers beyond are refused.
        experts: experts of a layer; numbers beyond are refused.
        place: the file's name, for messages.
        lenient: do as the published runtime does: drop what is out of range, let the last of two
            values win, count true as 1 and false as 0.

    Raises:
        CheckpointError: a boolean, a number that is not finite, a layer or expert out of range,
            or two values for one expert.
    """
    try:
        walk = list(_walk(value, None, None, place, lenient=lenient))
    except RecursionError:
        raise CheckpointError(f"{place}: nested too deep") from None
    if lenient:
        return {(n, e): alpha for n, e, alpha in walk if n < layers and e < experts}
    return gather_alphas(walk, layers, experts, place)


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
        if not math.isfinite(alpha):
            raise CheckpointError(f"{where}: alpha is {alpha}")
        first = found.setdefault((layer, expert), alpha)
        if first != alpha:
            raise CheckpointError(f"{where}: two values, {first} and {alpha}")
    return found


def _walk(
    value: object, layer: int | None, expert: int | None, place: str, *, lenient: bool
) -> Iterator[tuple[int, int, float]]:
    if isinstance(value, bool) and not lenient:
        raise CheckpointError(f"{place}: {value} where an alpha was expected")
    if isinstance(value, int | float):
        if layer is None or expert is None:
            warnings.warn(
                f"{place}: the number {value} belongs to no layer and expert; ignored",
                CheckpointWarning,
                stacklevel=2,
            )
            return
        yield layer, expert, as_float(value)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if layer is None:
                yield from _walk(item, number, expert, place, lenient=lenient)
            elif expert is None:
                yield from _walk(item, layer, number, place, lenient=lenient)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, *key_place(key, layer, expert), place, lenient=lenient)


def as_float(value: int | float) -> float:
    """A number as a float; an integer too large for one is infinite, as JSON's 1e999 is."""
    return float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.inf


def key_place(key: str, layer: int | None, expert: int | None) -> tuple[int | None, int | None]:
    """The layer and expert that hold below `key`, given those that held above it."""
    key = key.lower()
    if key in _WRAPPERS:
        return layer, expert
    if re.fullmatch(r"[0-9]+", key):
        if layer is None:
            return parse_number(key), expert
        return layer, parse_number(key) if expert is None else expert
    if match := _LAYER.search(key):
        layer = parse_number(match[1])
    if match := _EXPERT.search(key):
        expert = parse_number(match[1])
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
    places = ((layer, number, value) for number, value in zip(numbers, values, strict=True))
    return gather_alphas(places, layers, experts, tensor.where)
