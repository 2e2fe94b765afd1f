"""Models whose own matrices are ternary rows, as `import` writes them: checked, and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.ternary_fields import (
    TernaryFields,
    module_tensors,
    read_ternary,
    signs_name,
)
from outlier_mlx.storage.rounding import widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import Stored
from outlier_mlx.storage.ternary_affine import HALVES
from outlier_mlx.storage.ternary_matrix import Scales, Seen, TernaryMatrix, WeightSource
from outlier_mlx.ternary import TernaryError, check_rows, unpack_rows
from outlier_mlx.ternary.scales import TILE_ROWS, untile_scales

_DTYPES = HALVES | {"F32": "float32"}


@dataclass(frozen=True)
class RowTrits(Stored):
    """A matrix in the layout `tq1_0_strided`, stored as (out, row_bytes) uint8."""

    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.tensor.shape[0], self.width)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in); see `read_rows`."""
        return unpack_rows(self.read_rows(start, stop), self.width)

    def read_rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as they are stored, (rows, row_bytes) uint8.

        Raises:
            CheckpointError: bytes that no conversion writes.
        """
        packed = self.tensor.read(start, stop)
        try:
            check_rows(packed, self.width)
        except TernaryError as error:
            raise CheckpointError(f"{self.where}: from row {start}: {error}") from None
        return packed


@dataclass(frozen=True)
class RowsSource(WeightSource):
    """A matrix in packed rows.

    Attributes:
        weight: (out, row_bytes) uint8.
        stored_scales: float32 (out,), or tiles of 16-bit floats.
        width: weights of a row.
        group: weights that share a scale; 0: one scale a row.
    """

    stored_scales: TensorRef
    width: int
    group: int

    always = True
    multiple = TILE_ROWS

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.weight.shape[0], self.width)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and scales."""
        return self.weight.nbytes + self.stored_scales.nbytes

    @property
    def scales(self) -> Scales:
        """As they are stored."""
        return Scales(self.group, _DTYPES[self.stored_scales.dtype])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and their scales; `start` is a multiple of 8."""
        trits = RowTrits(self.weight, self.width).read(start, stop)
        if self.group:
            tiles = self.stored_scales.read(start // TILE_ROWS, -(-stop // TILE_ROWS))
            scales = untile_scales(tiles, stop - start)
        else:
            scales = self.stored_scales.read(start, stop)
        numbers = widened(scales, self.scales.dtype)
        if not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise CheckpointError(
                f"{self.stored_scales.where}: a scale that is not a finite number of 0 or more"
            )
        return trits, scales

    def examine(self, start: int, stop: int) -> Seen:
        """Check bytes and scales; how scales are stored is settled."""
        self.read(start, stop)
        return Seen(one_a_row=False, pairs=False)


@dataclass(frozen=True)
class TernaryModel:
    """A ternary model on disk.

    Attributes:
        fields: what its config says.
        matrices: its ternary matrices, by path.
        signs: the signs of its rotations, int8; None where all are 1.
        rest: all other tensors.
    """

    fields: TernaryFields
    matrices: Mapping[str, TernaryMatrix]
    signs: tuple[np.ndarray | None, ...]
    rest: Mapping[str, TensorRef]


def open_ternary_model(
    folder: Path, raw: Mapping, tensors: Mapping[str, TensorRef]
) -> TernaryModel:
    """Check what a config says of ternary matrices against the tensors; no weights are read.

    Args:
        folder: the model.
        raw: its config, for which `config.is_ternary_model` holds.
        tensors: its tensors.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or is packed though the
            config does not list it; or a sign is not 1 or -1.
    """
    fields = read_ternary(raw)
    rest = dict(tensors)
    matrices = {}
    for path, module in fields.modules.items():
        weight, scales = (_take(rest, f"{path}.{leaf}", folder) for leaf in ("weight", "scales"))
        dtypes = tuple(HALVES) if module.group else ("F32",)
        if scales.dtype not in dtypes or len(weight.shape) != 2:
            raise CheckpointError(
                f"{scales.where}: {scales.dtype}, expected {listed(dtypes, last='or')}"
            )
        stored = Scales(module.group, _DTYPES[scales.dtype])
        shape = (weight.shape[0], module.width)
        for name, (size, dtype) in module_tensors(path, shape, stored).items():
            (weight if name.endswith(".weight") else scales).require(size, dtype)
        source = RowsSource(weight, scales, module.width, module.group)
        matrices[path] = TernaryMatrix(source, stored)
    signs = []
    for number, rotation in enumerate(fields.rotations):
        vector = None
        if rotation.signed:
            tensor = _take(rest, signs_name(number), folder)
            expected = (rotation.width,)
            sound = tensor.dtype == "I8" and tensor.shape == expected
            vector = tensor.read() if sound else None
            if vector is None or (np.abs(vector) != 1).any():
                raise CheckpointError(f"{tensor.where}: expected signs, I8 {expected}, 1 or -1")
        signs.append(vector)
    packed = next((tensor for tensor in rest.values() if tensor.dtype == "U8"), None)
    if packed is not None:
        raise CheckpointError(f"{packed.where}: packed, but config.json: ternary does not list it")
    return TernaryModel(fields, matrices, tuple(signs), rest)


def _take(tensors: dict[str, TensorRef], name: str, folder: Path) -> TensorRef:
    if name not in tensors:
        raise CheckpointError(f"{folder.name}: the tensor {name} is missing")
    return tensors.pop(name)
