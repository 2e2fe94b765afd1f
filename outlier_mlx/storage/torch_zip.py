"""Files of `torch.save` with numbers in them, read without torch and without running anything.

Such a file is a zip of a pickle and of raw storages. A pickle is a program for a stack machine
that may call any function there is. The machine below knows just the instructions that build
numbers, strings, lists, tuples, dictionaries and tensors. The few names that it accepts are never
looked up: each stands for something that is built right here.

Formats: the pickle instructions of Python's `pickletools`; `torch/serialization.py`.
"""

import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError

# Files of alphas take kilobytes. The bounds keep what hostile ones cost in time and memory low.
MAX_FILE_BYTES = 4_000_000
_MAX_ELEMENTS = 1_000_000
_MAX_ENTRIES = 10_000

_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_STORAGES = {
    "torch FloatStorage": "f4",
    "torch DoubleStorage": "f8",
    "torch HalfStorage": "f2",
    "torch BFloat16Storage": "u2",  # as its bits
}
_BFLOAT16 = "torch BFloat16Storage"
# What zipfile and pickletools raise on malformed input.
_DAMAGE: tuple[type[Exception], ...] = (
    *(ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, EOFError),
    *(struct.error, OSError),
)


@dataclass(frozen=True)
class _Name:
    """A name from the list above, as a value on the stack."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Values of a storage, (elements,)."""

    values: np.ndarray


class _Mark:
    """Where the arguments of an instruction begin."""


def load_torch_zip(path: Path) -> Any:
    """The object in a file that `torch.save` wrote.

    Returns:
        Numbers, strings, None, lists, tuples, dictionaries, and float32 arrays of rank 0 or 1 for
        tensors. They may contain themselves: walk them with a bound.

    Raises:
        CheckpointError: not such a file, or one that holds anything else.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path.name}: {size} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        reason = str(error)[:200]
        raise CheckpointError(f"{path.name}: not a file of torch.save (a zip): {reason}") from None
    except _DAMAGE as error:
        raise CheckpointError(f"{path.name}: damaged: {str(error)[:200]}") from None


def _load(archive: zipfile.ZipFile) -> Any:
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(entries) > _MAX_ENTRIES or len(names) < len(entries):
        raise CheckpointError("too many entries, or two of one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError("compressed; torch.save stores without compression")
    if sum(entry.file_size for entry in entries) > MAX_FILE_BYTES:
        raise CheckpointError("its entries overlap")
    programs = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise CheckpointError("no data.pkl, or several: not a file of torch.save")
    folder = programs[0].removesuffix("data.pkl")
    order = "<"
    if f"{folder}byteorder" in names:
        order = {b"little": "<", b"big": ">"}[archive.read(f"{folder}byteorder")]

    def storage(name: str) -> bytes:
        if f"{folder}data/{name}" not in names:
            raise CheckpointError(f"the storage {name!r} is missing")
        return archive.read(f"{folder}data/{name}")

    return _Machine(storage, order).run(archive.read(programs[0]))


class _Machine:
    """The stack machine; `storage` gives the bytes of a storage by its name."""

    def __init__(self, storage: Callable[[str], bytes], order: str) -> None:
        self._read = storage
        self._order = order
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], _Storage] = {}
        self._elements = 0

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                self._stack.append(_bounded(argument))
            else:
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise CheckpointError(f"its pickle uses {opcode.name}, which is refused")
                step(self, argument)
        raise CheckpointError("its pickle has no end")

    def pop(self) -> Any:
        value = self._stack.pop()
        if isinstance(value, _Mark):
            raise CheckpointError("its pickle is malformed")
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while not isinstance(value := self._stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def ignore(self, _: Any) -> None:
        """Protocol and framing: nothing to do."""

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def tuple_to_mark(self, _: Any) -> None:
        self._stack.append(tuple(self.pop_to_mark()))

    def append(self, _: Any) -> None:
        self._extend([self.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise CheckpointError("its pickle is malformed")
        self._stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self.pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise CheckpointError("its pickle is malformed")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple within tuples within tuples could overflow the stack.
            parts = key if isinstance(key, tuple) else (key,)
            if len(parts) > 2 or not all(isinstance(part, str | int | float) for part in parts):
                raise CheckpointError("a key that is neither a string, a number nor a pair")
            target[key] = value

    def name(self, text: str) -> None:
        if text not in (_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES):
            raise CheckpointError(f"it names {text[:80]!r}: only tensors and numbers are read")
        self._stack.append(_Name(text))

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("its pickle is malformed")
        self.name(f"{module} {name}")

    def persistent(self, _: Any) -> None:
        """("storage", its class, its name, device, elements) becomes its values."""
        kind, storage, name, _device, count = self.pop()
        known = isinstance(storage, _Name) and storage.text in _STORAGES
        if kind != "storage" or not known or not isinstance(name, str) or type(count) is not int:
            raise CheckpointError("a reference that is not to a storage")
        place = (storage.text, name)
        if place not in self._storages:
            dtype = np.dtype(self._order + _STORAGES[storage.text])
            data = self._read(name)
            if count < 0 or count * dtype.itemsize > len(data):
                raise CheckpointError(f"the storage {name!r} is shorter than its {count} elements")
            self._count(count)
            values = np.frombuffer(data, dtype, count)
            if storage.text == _BFLOAT16:
                values = (values.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(over="ignore"):  # to infinity, which is refused later
                self._storages[place] = _Storage(values.astype(np.float32))
        self._stack.append(self._storages[place])

    def _count(self, elements: int) -> None:
        self._elements += elements
        if self._elements > _MAX_ELEMENTS:
            raise CheckpointError(f"tensors of more than {_MAX_ELEMENTS} elements")

    def reduce(self, _: Any) -> None:
        """Build what a name stands for from its arguments."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise CheckpointError("its pickle calls something that is not a name")
        if name.text == _ORDERED_DICT and arguments == ():
            self._stack.append({})
        elif name.text == _TENSOR and len(arguments) in (6, 7):
            self._stack.append(self._tensor(*arguments[:4]))
        elif name.text == _PARAMETER and len(arguments) == 3:
            if not isinstance(arguments[0], np.ndarray):
                raise CheckpointError("a parameter that is not a tensor")
            self._stack.append(arguments[0])
        else:
            raise CheckpointError(f"its pickle calls {name.text} with other arguments than torch")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        if not isinstance(storage, _Storage) or not _is_sizes((offset,)):
            raise CheckpointError("a tensor without a storage")
        if not _is_sizes(shape) or not _is_sizes(strides) or len(shape) != len(strides):
            raise CheckpointError("a tensor whose shape is not a list of sizes")
        if len(shape) > 1:
            raise CheckpointError(f"a tensor of shape {shape}, expected a number or a vector")
        count, stride = (shape[0], strides[0]) if shape else (1, 1)
        last = offset + stride * (count - 1)
        if count and last >= storage.values.size:
            raise CheckpointError(
                f"a storage of {storage.values.size} elements is shorter than its tensor, which"
                f" ends at {last + 1}"
            )
        self._count(count)
        return storage.values[offset + stride * np.arange(count)].reshape(shape)

    def build(self, _: Any) -> None:
        """Attributes of a dictionary, such as the versions in a state_dict: dropped."""
        self.pop()
        if not isinstance(self._stack[-1], dict):
            raise CheckpointError("its pickle sets attributes of something else than a dictionary")


def _is_sizes(values: Any) -> bool:
    """Whether these are a tensor's sizes or strides: few integers, none negative or huge."""
    if not isinstance(values, tuple) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def _bounded(value: Any) -> Any:
    """A literal; integers that no float can hold are refused."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise CheckpointError("an integer of more than 64 bits")
    return value


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_LITERALS = frozenset(
    ["BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"]
    + ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"]
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.ignore,
    "FRAME": _Machine.ignore,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
