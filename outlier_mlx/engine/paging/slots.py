"""Slots: the parts of few large arrays, each of which holds an expert as it is multiplied with.

On a GPU a slot holds the packed rows and their scales, and files are read straight into it. Without
one it holds MLX's affine 2-bit form, which the CPU multiplies with: rows are converted on the way.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from outlier_mlx.runtime.affine2 import affine_group, padded_width, row_bytes, rows_to_affine2
from outlier_mlx.runtime.packed import CONVERTED_BYTES
from outlier_mlx.runtime.switch import FOUR_ZERO_BYTES
from outlier_mlx.storage.tensors import row_ranges

#: The matrices of an expert, in the order in which their pieces are read.
MATRICES = ("gate_proj", "up_proj", "down_proj")

Piece = tuple[tuple[int, ...], mx.Dtype]


class Pool:
    """Slots of equal size for experts of one shape.

    Attributes:
        slots: number of slots.
        packed: whether they hold rows.
        arrays: the arrays of each of `MATRICES`: rows (slots, out, row_bytes) uint8 and scales
            (slots, out) float32, or affine weight, scales and biases. They are evaluated, and
            written in place; only `resize` makes others.
    """

    def __init__(self, slots: int, hidden: int, width: int, *, packed: bool) -> None:
        """Take memory for slots, all of them zero.

        Args:
            slots: their number.
            hidden: width of the model.
            width: width of an expert.
            packed: keep rows rather than the affine form.
        """
        self.packed = packed
        self._shapes, self._pieces = _shapes(hidden, width), _pieces(hidden, width, packed)
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Have another number of slots, all of them zero; memory of the old ones is freed first."""
        self.slots = slots
        self.arrays: dict[str, tuple[mx.array, ...]] = {}
        self._views: list[list[np.ndarray]] = []
        mx.clear_cache()
        arrays = {
            name: tuple(mx.zeros((slots, *shape), dtype) for shape, dtype in pieces)
            for name, pieces in zip(MATRICES, self._pieces, strict=True)
        }
        mx.eval(arrays)
        # NumPy's views of arrays are their own memory, and can be written.
        self._views = [[np.array(array, copy=False) for array in arrays[name]] for name in MATRICES]
        self.arrays = arrays

    def buffers(self, slot: int) -> list[memoryview]:
        """Where an expert is read to: its rows and scales, matrix by matrix.

        They are a slot's own memory, or buffers to convert from. `settle` has to follow.
        """
        if self.packed:
            parts = (view[slot] for views in self._views for view in views)
            return [part.reshape(-1).view(np.uint8).data for part in parts]
        return [
            memoryview(bytearray(nbytes))
            for out, columns in self._shapes
            for nbytes in (out * row_bytes(columns), 4 * out)
        ]

    def settle(self, slot: int, buffers: Sequence[memoryview]) -> None:
        """Make a slot what is multiplied with, from its `buffers` that were filled.

        Rows with only trits 0 get the scale 0, as `TernarySwitchLinear.prepare` does it.
        """
        for number, (out, columns) in enumerate(self._shapes):
            rows = np.frombuffer(buffers[2 * number], np.uint8).reshape(out, row_bytes(columns))
            scales = np.frombuffer(buffers[2 * number + 1], np.float32)
            words = rows.view(np.uint32)
            empty = np.flatnonzero(words[:, 0] == FOUR_ZERO_BYTES)
            scales[empty[(words[empty] == FOUR_ZERO_BYTES).all(axis=1)]] = 0
            if not self.packed:
                self._convert(self._views[number], slot, rows, scales, columns)

    def _convert(
        self,
        views: list[np.ndarray],
        slot: int,
        rows: np.ndarray,
        scales: np.ndarray,
        columns: int,
    ) -> None:
        for start, stop in row_ranges(len(rows), rows.shape[1], CONVERTED_BYTES):
            part = slice(start, stop)
            made = rows_to_affine2(mx.array(rows[part]), mx.array(scales[part]), columns)
            for view, array in zip(views, made, strict=True):
                view[slot, part] = np.array(array, copy=False)


def slot_nbytes(hidden: int, width: int, *, packed: bool) -> int:
    """Bytes of a slot; the arguments are those of `Pool`."""
    return sum(
        dtype.size * int(np.prod(shape))
        for pieces in _pieces(hidden, width, packed)
        for shape, dtype in pieces
    )


def _shapes(hidden: int, width: int) -> tuple[tuple[int, int], ...]:
    """(out, in) of each of `MATRICES`."""
    return (width, hidden), (width, hidden), (hidden, width)


def _pieces(hidden: int, width: int, packed: bool) -> list[tuple[Piece, ...]]:
    """What a slot has of each array of each matrix."""
    found: list[tuple[Piece, ...]] = []
    for out, columns in _shapes(hidden, width):
        if packed:
            found.append((((out, row_bytes(columns)), mx.uint8), ((out,), mx.float32)))
        else:
            padded = padded_width(columns)
            groups = (out, padded // affine_group(columns)), mx.float32
            found.append((((out, padded // 16), mx.uint32), groups, groups))
    return found
