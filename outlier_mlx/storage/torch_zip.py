"""Files of `torch.save` with numbers in them, read without torch and without running anything.

Such a file is a zip of a pickle and of raw storages. A pickle is a program for a stack machine
that may call any function there is. Of its instructions just those are accepted that build
numbers, strings, lists, tuples, dictionaries and tensors; of names, the few that tensors need, and
these are never looked up: each stands for a function or a dtype of this module.

Formats: the pickle instructions of Python's `pickletools`; `torch/serialization.py`.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.rounding import widened

# Files of alphas take kilobytes. The limits keep time and memory low for hostile files.
MAX_FILE_BYTES = 4_000_000
_MAX_ELEMENTS = 1_000_000
_MAX_ENTRIES = 10_000

_BFLOAT16 = np.dtype("u2")  # as its bits
_DTYPES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2"}
_STORAGES = {f"torch {name}Storage": np.dtype(code) for name, code in _DTYPES.items()}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_OPCODES = frozenset(
    ["NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"]
    + ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"]
    + ["MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"]
    + ["BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL"]
    + ["BINPERSID", "REDUCE", "BUILD", "PROTO", "FRAME", "STOP"]
)
# What zipfile and pickle raise on malformed input.
_DAMAGE: tuple[type[Exception], ...] = (
    *(ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError),
    *(EOFError, OSError, struct.error, pickle.UnpicklingError),
)


@dataclass(frozen=True)
class _Storage:
    """Values of a storage, (elements,)."""

    values: np.ndarray


def load_torch_zip(path: Path) -> Any:
    """The object in a file that `torch.save` wrote.

    Returns:
        Numbers, strings, None, lists, tuples, dictionaries, and float64 arrays of rank 0 or 1 for
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
        raise CheckpointError(f"{path.name}: damaged or malformed: {str(error)[:200]}") from None


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

    return _Unpickler(archive.read(programs[0]), storage, order).load()


class _Instructions(dict[int, Callable[[Any], None]]):
    """What each instruction does, by its code."""

    def __missing__(self, code: int) -> None:
        raise CheckpointError(f"its pickle uses {_NAMES[code]}, which is refused")


class _Unpickler(pickle._Unpickler):
    """Python's own stack machine with only the instructions that are needed.

    The one in C is not safe even with an allow-list of names. It hashes any key of a dictionary:
    a tuple nested a million deep crashes the process, and tuples that share tuples take forever.
    It lets a pickle set attributes of allowed functions. Its memo is an array, so that a pickle of
    seven bytes takes gigabytes. Here a table holds what each instruction does, the memo is a
    dictionary, and reads end where the file ends.

    Args:
        program: the pickle.
        storage: gives the bytes of a storage by its name.
        order: byte order of storages, "<" or ">".
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, program: bytes, storage: Callable[[str], bytes], order: str) -> None:
        super().__init__(io.BytesIO(program))
        self._storage = storage
        self._order = order
        self._storages: dict[tuple[np.dtype, str], _Storage] = {}
        self._elements = 0

    def find_class(self, module: str, name: str) -> Any:
        """The function or dtype that a name stands for."""
        text = f"{module} {name}"
        calls = {
            "collections OrderedDict": self._ordered_dict,
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_parameter": self._parameter,
        }
        if text not in calls | _STORAGES:
            raise CheckpointError(f"it names {text[:80]!r}: only tensors and numbers are read")
        return (calls | _STORAGES)[text]

    def persistent_load(self, pid: Any) -> _Storage:
        """("storage", its class, its name, device, elements) becomes its values."""
        kind, dtype, name, _device, count = pid
        known = kind == "storage" and isinstance(dtype, np.dtype) and isinstance(name, str)
        if not known or type(count) is not int:
            raise CheckpointError("a reference that is not to a storage")
        if (dtype, name) not in self._storages:
            data = self._storage(name)
            if count < 0 or count * dtype.itemsize > len(data):
                raise CheckpointError(f"the storage {name!r} is shorter than its {count} elements")
            self._count(count)
            values = np.frombuffer(data, dtype.newbyteorder(self._order), count)
            if dtype == _BFLOAT16:
                values = widened(values, "bfloat16")
            self._storages[dtype, name] = _Storage(values.astype(np.float64))
        return self._storages[dtype, name]

    def _count(self, elements: int) -> None:
        self._elements += elements
        if self._elements > _MAX_ELEMENTS:
            raise CheckpointError(f"tensors of more than {_MAX_ELEMENTS} elements")

    def _ordered_dict(self) -> dict:
        return {}

    def _parameter(self, tensor: Any, _requires_grad: Any, _hooks: Any) -> np.ndarray:
        if not isinstance(tensor, np.ndarray):
            raise CheckpointError("a parameter that is not a tensor")
        return tensor

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_other: Any
    ) -> np.ndarray:
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

    # Instructions that differ from Python's own.

    def load_long1(self) -> None:
        """A whole number."""
        size = self.read(1)[0]
        if size > 8:
            raise CheckpointError("an integer of more than 64 bits")
        self.append(int.from_bytes(self.read(size), "little", signed=True))

    def load_setitem(self) -> None:
        """One item of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Items of a dictionary."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise CheckpointError("its pickle is malformed")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple within tuples within tuples could overflow the stack.
            parts = key if isinstance(key, tuple) else (key,)
            if len(parts) > 2 or not all(isinstance(part, str | int | float) for part in parts):
                raise CheckpointError("a key that is neither a string, a number nor a pair")
            self.stack[-1][key] = value

    def load_reduce(self) -> None:
        """A call of what a name stands for."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise CheckpointError("its pickle calls something that is not a name")
        self.append(function(*arguments))

    def load_build(self) -> None:
        """Attributes of a dictionary, such as the versions in a state_dict: dropped."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise CheckpointError("its pickle sets attributes of something else than a dictionary")


def _is_sizes(values: Any) -> bool:
    """Whether these are a tensor's sizes or strides: few integers, none negative or huge."""
    if not isinstance(values, tuple) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


_Unpickler.dispatch = _Instructions(
    {code: pickle._Unpickler.dispatch[code] for code, name in _NAMES.items() if name in _OPCODES}
    | {
        pickle.LONG1[0]: _Unpickler.load_long1,
        pickle.SETITEM[0]: _Unpickler.load_setitem,
        pickle.SETITEMS[0]: _Unpickler.load_setitems,
        pickle.REDUCE[0]: _Unpickler.load_reduce,
        pickle.BUILD[0]: _Unpickler.load_build,
    }
)
