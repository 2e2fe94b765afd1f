"""Parts of KV caches as safetensors files, which are checked when they are read."""

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.serve.cache_parts import CUT, STATES, Form, LayerForm, Rows, State
from outlier_mlx.storage.safetensors import TensorRef, read_described
from outlier_mlx.storage.texts import parse_json, parse_json_object

FORMAT = "outlier-mlx prefix 1"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}
_PIECE = 1 << 23


@dataclass(frozen=True)
class Part:
    """What a file holds, except for its arrays.

    Attributes:
        form: the form of the whole cache.
        tokens: the tokens, int32.
        ends: whether it has the states at its end, too.
        checksum: CRC-32 of the arrays' bytes.
    """

    form: Form
    tokens: np.ndarray
    ends: bool
    checksum: int


def writable(form: Form) -> bool:
    """Whether parts of this form can be written: all of its kinds are known."""
    layers = [layer for layer in form.layers if layer.arrays is None]
    return all(layer.kind in STATES for layer in layers)


def form_text(form: Form) -> str:
    """A form as JSON."""
    return json.dumps(asdict(form), separators=(",", ":"))


def write(
    path: Path,
    form: Form,
    tokens: np.ndarray,
    rows: Rows,
    states: list[State] | None,
    check: Callable[[], None],
) -> None:
    """Write a part.

    Args:
        path: an empty file.
        form: the form of the whole cache.
        tokens: its tokens, int32.
        rows: their rows, evaluated.
        states: the states at its end, evaluated, or None.
        check: called every 8 MB; what it raises ends the writing.

    Raises:
        OSError: it cannot be written.
        CheckpointError: a state is of a kind that is not known.
    """
    arrays = {"tokens": _bytes(tokens)}
    header: dict[str, Any] = {"tokens": ("I32", list(tokens.shape))}
    for name, array in _named(rows, states):
        arrays[name] = _bytes(array)
        header[name] = (_DTYPES[str(array.dtype).split(".")[-1]], list(array.shape))
    checksum = 0
    for piece in _pieces(arrays.values()):
        checksum = zlib.crc32(piece, checksum)
        check()
    place, entries = 0, {}
    for name, (dtype, shape) in header.items():
        stop = place + arrays[name].nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, stop]}
        place = stop
    numbers = None if states is None else [_numbers(state) for state in states]
    metadata = {
        "format": FORMAT,
        "form": form_text(form),
        "states": json.dumps(numbers),
        "crc32": str(checksum),
    }
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in _pieces(arrays.values()):
            file.write(piece)
            check()


def is_ours(path: Path) -> bool:
    """Whether this project wrote a file, by its beginning."""
    try:
        if not path.is_file():  # to open a pipe can take for ever
            return False
        with path.open("rb") as file:
            return _header_is_ours(file)
    except OSError:
        return False


def _header_is_ours(file: BinaryIO) -> bool:
    mark = f'{{"__metadata__": {{"format": "{FORMAT.rsplit(" ", 1)[0]} '.encode()
    return file.read(8 + len(mark))[8:] == mark


def read_part(path: Path) -> Part:
    """What a file holds, without its arrays.

    Raises:
        CheckpointError: it is damaged, or no file of this kind.
        OSError: it cannot be read.
    """
    return _described(path)[0]


def read(path: Path) -> tuple[Part, Rows, list[State] | None]:
    """All that a file holds, evaluated.

    Raises:
        CheckpointError: it is damaged, or no file of this kind.
        OutlierError: it cannot be read.
        OSError: it cannot be read.
    """
    part, tensors, numbers = _described(path)
    checksum = zlib.crc32(_bytes(part.tokens))
    arrays: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        if name != "tokens":
            found = tensor.read()
            checksum = zlib.crc32(found.reshape(-1).view(np.uint8).data, checksum)
            array = mx.array(found)
            # On the CPU, because the GPU works for the thread that generates.
            bits = tensor.dtype == "BF16"
            arrays[name] = mx.view(array, mx.bfloat16, stream=mx.cpu) if bits else array
    if checksum != part.checksum:
        raise CheckpointError(f"{path.name}: damaged: its checksum differs")
    rows: Rows = []
    for layer in part.form.layers:
        if layer.arrays is not None:
            shapes, number = layer.arrays, len(rows)
            rows.append(tuple(arrays[f"{number}.{i}"] for i in range(len(shapes))))
    states = None
    if numbers is not None:
        layers = [layer for layer in part.form.layers if layer.arrays is None]
        states = []
        for number, (layer, (present, values)) in enumerate(zip(layers, numbers, strict=True)):
            names = [f"state.{number}.{i}" for i in range(len(present))]
            held = tuple(arrays[n] if p else None for n, p in zip(names, present, strict=True))
            if len(values) != len(STATES[layer.kind]):
                raise CheckpointError(f"{path.name}: states of another kind")
            states.append(State(held, tuple(values)))
    # MLX evaluates an array in the thread that made it.
    mx.eval(list(arrays.values()))
    return part, rows, states


def _named(rows: Rows, states: list[State] | None) -> Iterable[tuple[str, mx.array]]:
    for number, layer in enumerate(rows):
        for index, array in enumerate(layer):
            yield f"{number}.{index}", array
    for number, state in enumerate(states or []):
        for index, held in enumerate(state.arrays):
            if held is not None:
                yield f"state.{number}.{index}", held


def _numbers(state: State) -> Any:
    if state.whole is not None:
        raise CheckpointError("a state of an unknown kind")
    return [array is not None for array in state.arrays], list(state.numbers)


def _bytes(array: Any) -> memoryview:
    return memoryview(array).cast("B") if array.size else memoryview(b"")


def _pieces(arrays: Iterable[memoryview]) -> Iterable[memoryview]:
    for array in arrays:
        for start in range(0, array.nbytes, _PIECE):
            yield array[start : start + _PIECE]


def _described(path: Path) -> tuple[Part, dict[str, TensorRef], Any]:
    tensors, metadata = read_described(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path.name}: not a cache that this version wrote")
    try:
        form = _parse_form(metadata["form"], path)
        numbers = _parse_numbers(metadata["states"], form, path)
        tokens = tensors["tokens"].read()
        checksum = int(metadata["crc32"])
        _check_shapes(form, len(tokens), tensors, numbers)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path.name}: damaged: {reason}") from None
    return Part(form, tokens, numbers is not None, checksum), tensors, numbers


def _parse_form(text: str, path: Path) -> Form:
    value = parse_json_object(text.encode(), path.name)
    layers = []
    for layer in value["layers"]:
        known = STATES if layer["arrays"] is None else CUT
        if layer["kind"] not in known or not all(type(n) is int for n in layer["numbers"]):
            raise ValueError("a cache of an unknown kind")
        shapes = layer["arrays"]
        if shapes is not None:
            shapes = tuple((tuple(shape), dtype) for shape, dtype in shapes)
        layers.append(LayerForm(layer["kind"], tuple(layer["numbers"]), shapes))
    return Form(_tuples(value["nesting"]), tuple(layers))


def _tuples(nesting: Any) -> Any:
    return None if nesting is None else tuple(_tuples(inner) for inner in nesting)


def _parse_numbers(text: str, form: Form, path: Path) -> Any:
    numbers = parse_json(text.encode(), path.name)
    if numbers is None:
        return None
    if len(numbers) != sum(layer.arrays is None for layer in form.layers):
        raise ValueError("states of another model")
    for present, values in numbers:
        if not all(type(p) is bool for p in present) or not all(type(v) is int for v in values):
            raise ValueError("numbers of a state")
    return numbers


def _check_shapes(form: Form, count: int, tensors: dict[str, TensorRef], numbers: Any) -> None:
    """Raise ValueError or KeyError unless there are just the arrays that the form asks for."""
    expected = {"tokens"}
    if tensors["tokens"].dtype != "I32" or len(tensors["tokens"].shape) != 1:
        raise ValueError("tokens")
    layers = [layer.arrays for layer in form.layers if layer.arrays is not None]
    for number, arrays in enumerate(layers):
        for index, (shape, dtype) in enumerate(arrays):
            tensor = tensors[f"{number}.{index}"]
            if tensor.dtype != _DTYPES[dtype] or len(shape) != 3 or shape[0] != 1:
                raise ValueError("the dtype or shape of an array")
            if tensor.shape != (*shape[:-1], count, shape[-1]):
                raise ValueError("the shape of an array")
            expected.add(tensor.name)
    for number, (present, _) in enumerate(numbers or []):
        for index, there in enumerate(present):
            if there:
                expected.add(tensors[f"state.{number}.{index}"].name)
    if expected != set(tensors):
        raise ValueError("other arrays than expected")
