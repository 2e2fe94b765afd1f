"""Convert a linear layer of an AWQ checkpoint, or one projection of all experts, for MLX."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod

import numpy as np

from outlier_mlx.imports.awq_layout import to_five_bits, to_four_bits, unpack
from outlier_mlx.models.quantization import largest_group
from outlier_mlx.storage.rounding import narrowed, require_affine, widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.writing.float_parts import affine_specs
from outlier_mlx.writing.parts import Chunk, Part, ahead
from outlier_mlx.writing.writer import TensorSpec

# Words of a row to transpose at a time, and bytes of the slab that a thread packs at a time.
_WORDS = 64
_SLAB_BYTES = 1 << 20


@dataclass
class BiasErrors:
    """Rounding errors of biases in float16; counted while they are written."""

    groups: int = 0
    exact: int = 0
    largest: float = 0.0
    largest_in_steps: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, exact: np.ndarray, rounded: np.ndarray, scales: np.ndarray) -> None:
        """Count the biases of some groups: exact in float32, rounded in float16."""
        error = np.abs(exact - rounded)
        steps = np.abs(scales)
        relative = np.divide(error, steps, out=np.zeros_like(error), where=steps > 0)
        with self._lock:
            self.groups += error.size
            self.exact += int((error == 0).sum())
            self.largest = max(self.largest, float(error.max(initial=0)))
            self.largest_in_steps = max(self.largest_in_steps, float(relative.max(initial=0)))


@dataclass(frozen=True)
class AwqMatrix:
    """A linear layer on disk; see `awq_layout`.

    Attributes:
        qweight: (in, out / 8) int32.
        scales: (in / group, out) float16.
        qzeros: (in / group, out / 8) int32; None if all zero points are 8.
    """

    qweight: TensorRef
    scales: TensorRef
    qzeros: TensorRef | None

    @property
    def group(self) -> int:
        """Number of weights along `in` that share a scale."""
        return self.qweight.shape[0] // self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of its tensors on disk, in bytes."""
        tensors = (self.qweight, self.scales, self.qzeros)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def read_scales(self) -> np.ndarray:
        """Read the scales (groups, out) as float32; who rounds them checks that they are finite."""
        return self.scales.read_float32()


@dataclass(frozen=True)
class AwqPart(Part):
    """The `weight`, `scales` and `biases` of a module.

    Attributes:
        shape: shape of the module's weight before quantization.
        matrices: the linear layer, or one for each expert.
        bits: 4 or 5; with 5, biases in float16 are exact.
        dtype: "float32" or "float16", the dtype of scales and biases.
        errors: counts the rounding errors of float16.
    """

    shape: tuple[int, ...]
    matrices: tuple[AwqMatrix, ...]
    bits: int
    dtype: str
    errors: BiasErrors

    @property
    def params(self) -> int:
        """Number of weights of all matrices."""
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes of the matrices' tensors."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def affine(self) -> tuple[int, int]:
        """Bits and group size. A larger group of AWQ becomes several with the same scale."""
        size = largest_group(self.matrices[0].group)
        assert size is not None
        return self.bits, size

    def specs(self) -> list[TensorSpec]:
        """Packed weight, scales and biases; see `affine_specs`."""
        return affine_specs(self.path, self.shape, self.affine, self.dtype)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The packed weight in slabs of rows; then scales, then biases, one expert at a time."""
        for rows, used in ahead(pool, self._slabs()):
            yield f"{self.path}.weight", rows.reshape(-1).data, used
        for name, read in (("scales", self._scales), ("biases", self._biases)):
            calls = (partial(read, matrix) for matrix in self.matrices)
            for matrix, values in zip(self.matrices, ahead(pool, calls), strict=True):
                used = matrix.nbytes - matrix.qweight.nbytes if name == "biases" else 0
                yield f"{self.path}.{name}", values.reshape(-1).data, used

    def _slabs(self) -> Iterator[Callable[[], tuple[np.ndarray, int]]]:
        """Calls that pack one slab each. A matrix is read when its first slab is needed."""
        for matrix in self.matrices:
            words = matrix.qweight.read()
            zeros = None
            if self.bits == 5 and matrix.qzeros is not None:
                zeros = matrix.qzeros.read()
            step = _WORDS * max(1, _SLAB_BYTES // (4 * _WORDS * len(words)))
            for start in range(0, words.shape[1], step):
                columns = slice(start, start + step)
                part = None if zeros is None else zeros[:, columns]
                yield partial(_pack, words[:, columns], part, self.bits)

    def _scales(self, matrix: AwqMatrix) -> np.ndarray:
        return self._spread(matrix, self._rounded(matrix, matrix.read_scales()))

    def _biases(self, matrix: AwqMatrix) -> np.ndarray:
        """The biases -z s or -16 s, which have at most 15 significant bits: exact in float32."""
        scales = matrix.read_scales()
        factor: np.ndarray | np.float32 = np.float32(16 if self.bits == 5 else 8)
        if self.bits == 4 and matrix.qzeros is not None:
            factor = unpack(matrix.qzeros.read()).astype(np.float32)
        exact = -(factor * scales)
        stored = self._rounded(matrix, exact)
        biases = widened(stored, self.dtype)
        require_affine(scales, biases, self.bits, self.dtype, matrix.scales.where)
        if self.dtype == "float16":
            self.errors.count(exact, biases, scales)
        return self._spread(matrix, stored)

    def _rounded(self, matrix: AwqMatrix, values: np.ndarray) -> np.ndarray:
        return narrowed(values, self.dtype, matrix.scales.where)

    def _spread(self, matrix: AwqMatrix, values: np.ndarray) -> np.ndarray:
        """Transpose (groups of AWQ, out) to (out, groups of MLX)."""
        times = matrix.group // self.affine[1]
        return np.ascontiguousarray(np.repeat(values.T, times, axis=1))


def _pack(words: np.ndarray, zeros: np.ndarray | None, bits: int) -> tuple[np.ndarray, int]:
    """Pack a slab of columns; returns packed rows, and the number of source bytes in the slab."""
    pieces = []
    for start in range(0, words.shape[1], _WORDS):
        columns = slice(start, start + _WORDS)
        if bits == 4:
            pieces.append(to_four_bits(words[:, columns]))
        else:
            part = None if zeros is None else zeros[:, columns]
            pieces.append(to_five_bits(words[:, columns], part))
    return np.concatenate(pieces), words.nbytes
