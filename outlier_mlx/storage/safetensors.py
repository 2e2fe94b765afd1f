"""Safetensors read lazily: headers first, then any range of rows of any tensor.

The `safetensors` package gives no bfloat16 to NumPy, and mapping a file would count every page
that was touched as memory in use. Here a tensor is a name, a place and a shape; its rows are
read with `pread` into an array of just their size.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, little-endian, a
JSON object, then the data; offsets are relative to the data's beginning).
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.errors import CheckpointError, OutlierError, listed
from outlier_mlx.storage.rounding import narrowed, widened
from outlier_mlx.storage.texts import parse_json_object

#: Safetensors dtype -> NumPy dtype of the bytes; bfloat16 is read as its 16 bits.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

#: Reads bytes (start, stop) of a file that is elsewhere.
ReadRange = Callable[[int, int], bytes]

# The safetensors library allows 100 MB, which as parsed JSON can take 3 GB of memory. A header of
# ours has some 150 bytes a tensor: this is for 100,000 of them.
MAX_HEADER_BYTES = 16_000_000
# NumPy's bound; a product of numbers without bounds could take hours.
MAX_RANK = 64
MAX_SIZE = 2**63 - 1


@dataclass(frozen=True)
class TensorRef:
    """A tensor on disk: nothing of it is in memory until `read`.

    Attributes:
        name: its key in the file.
        file: the file that holds it.
        dtype: the safetensors dtype, for example "BF16".
        shape: its shape.
        offset: where its first byte is in the file.
        fetch: reads bytes in place of the file, which has only a header; None: the file is whole.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    fetch: ReadRange | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Its size on disk in bytes."""
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return f"{self.file.name}: {self.name[:200]}"

    def require(self, shape: tuple[int, ...], *dtypes: str) -> None:
        """Check its shape and dtype.

        Raises:
            CheckpointError: the shape is another one, or the dtype is none of these.
        """
        if self.shape != shape or self.dtype not in dtypes:
            raise CheckpointError(
                f"{self.where}: {self.dtype} {self.shape}, expected {listed(dtypes, last='or')}"
                f" {shape}"
            )

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, as stored (bfloat16 as uint16).

        Raises:
            CheckpointError: the file became shorter since its header was read.
            OutlierError: it is gone, or cannot be read.
        """
        dtype = NUMPY_DTYPES[self.dtype]
        if not self.shape:
            rows = np.empty((), dtype)
            begin = 0
        else:
            stop = self.shape[0] if stop is None else min(stop, self.shape[0])
            rows = np.empty((stop - start, *self.shape[1:]), dtype)
            begin = start * prod(self.shape[1:]) * dtype.itemsize
        self._fill(rows.reshape(-1).view(np.uint8).data, self.offset + begin)
        return rows

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Like `read`, converted to float32 (exact for float16 and bfloat16).

        Raises:
            CheckpointError: the dtype is no float, or the file holds float64 numbers that float32
                has no room for.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{self.where}: dtype {self.dtype}, expected a float")
        rows = self.read(start, stop)
        if self.dtype == "F64":
            return narrowed(rows, "float32", self.where)
        return widened(rows, "bfloat16" if self.dtype == "BF16" else "float32")

    def read_finite(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Like `read`; floats are checked.

        Raises:
            CheckpointError: one is NaN or infinite.
        """
        rows = self.read(start, stop)
        floats = widened(rows, "bfloat16") if self.dtype == "BF16" else rows
        if self.dtype in FLOAT_DTYPES and not np.isfinite(floats).all():
            raise CheckpointError(f"{self.where}: holds NaN or infinity")
        return rows

    def _fill(self, buffer: memoryview, offset: int) -> None:
        if self.fetch is not None:
            if buffer.nbytes:
                buffer[:] = self.fetch(offset, offset + buffer.nbytes)
            return
        try:
            with self.file.open("rb", buffering=0) as file:
                while buffer.nbytes:
                    count = os.preadv(file.fileno(), [buffer], offset)
                    if count == 0:
                        raise CheckpointError(f"{self.where}: the file ends within this tensor")
                    buffer, offset = buffer[count:], offset + count
        except OSError as error:
            # Whoever writes meanwhile would report it as an error of the output. It is no
            # `CheckpointError`: a drive that is gone may come back, and the run be resumed.
            reason = f"cannot be read: {error.strerror or error}"
            raise OutlierError(f"{self.file}: {self.name}: {reason}") from error


def header_bytes(begin: bytes) -> int:
    """How much of a file `read_header` reads, given its first bytes."""
    length = int.from_bytes(begin[:8], "little")
    return 8 + (length if length <= MAX_HEADER_BYTES else 0)


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, from its header alone.

    Args:
        path: the file.

    Returns:
        A `TensorRef` for each key, in the order of their data.

    Raises:
        CheckpointError: the file is truncated, its header is not JSON or is too long, a dtype is
            unknown, or offsets overlap, leave gaps or disagree with shapes.
    """
    return read_described(path)[0]


def read_described(path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of a safetensors file, as `read_header`, and the texts of its metadata."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name}: not a file")
    size = found.st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path.name}: not a whole safetensors file (its header would take {length} bytes,"
                f" the file has {size})"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path.name}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        header = parse_json_object(file.read(length), path.name)
    metadata = header.pop("__metadata__", None)
    if not _is_metadata(metadata):
        raise CheckpointError(f"{path.name}: __metadata__ must map text to text")
    begin = 8 + length
    tensors = [_tensor_ref(path, name, entry, begin) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = begin
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{tensor.where}: its data overlaps another's or leaves a gap")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path.name}: truncated or padded: its header describes {end} bytes,"
            f" the file has {size}"
        )
    return {tensor.name: tensor for tensor in tensors}, metadata or {}


def _tensor_ref(path: Path, name: str, entry: object, begin: int) -> TensorRef:
    place = f"{path.name}: {name}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{place}: its header entry is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{place}: dtype {dtype!r} is not one this project reads")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{place}: shape or data_offsets are not lists of sizes")
    # NumPy cannot make arrays that would be too large if a size of 0 were 1.
    if prod(max(1, size) for size in shape) * NUMPY_DTYPES[dtype].itemsize > MAX_SIZE:
        raise CheckpointError(f"{place}: shape {tuple(shape)} is too large")
    expected = prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{place}: {offsets[1] - offsets[0]} bytes, but {dtype} {tuple(shape)} takes {expected}"
        )
    return TensorRef(name, path, dtype, tuple(shape), begin + offsets[0])


def _is_metadata(value: object) -> bool:
    # MLX writes null where there is none.
    if not isinstance(value, dict):
        return value is None
    return all(isinstance(text, str) for text in value.values())


def _sizes(value: object) -> list[int] | None:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return None
    if all(type(item) is int and 0 <= item <= MAX_SIZE for item in value):
        return value
    return None
