"""What modules with packed rows of trits have in common: frozen parameters, and an affine copy."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .affine2 import row_bytes, rows_to_affine2
from .groups import TILE_ROWS
from .ops import use_metal

# Bytes of rows that are converted at a time: what is made meanwhile takes 25 times as much.
CONVERTED_BYTES = 1 << 20


class AffineCopy:
    """A copy of ternary rows in MLX's affine format, and the arrays that it was made from.

    It is not an MLX module, so MLX does not treat its arrays as parameters or state.
    """

    def __init__(self, rows: mx.array, scales: mx.array, in_features: int) -> None:
        self.rows = rows
        self.scales = scales
        # Products are float32. MLX would convert scales of 16 bits in each of them.
        self.arrays = _converted(rows, scales.astype(mx.float32), in_features)


class PackedModule(nn.Module):
    """A module with ternary weights, five trits in a byte.

    Parameters, both frozen: `weight` (..., out, row_bytes) uint8 in the layout `tq1_0_strided`, and
    `scales`, which stay as they are stored, whatever dtype the model gets.
    """

    FIXED = ("scales",)

    def __init__(self, input_dims: int, rows: tuple[int, ...], scales: mx.array) -> None:
        """Zeros, to be loaded; `rows` is the shape of the rows, (..., out)."""
        super().__init__()
        self.input_dims = input_dims
        self.weight = mx.full((*rows, row_bytes(input_dims)), 128, mx.uint8)
        self.scales = scales
        self.prepared: AffineCopy | None = None

    @property
    def _no_grad(self) -> set[str]:
        # MLX stores the names of frozen parameters here, and a parent's `unfreeze` clears the set.
        # The packed weights have no gradient, so they must always stay in it.
        return {"weight", "scales"}

    @_no_grad.setter
    def _no_grad(self, _: set[str]) -> None:
        pass

    def prepare(self) -> None:
        """Without a GPU, make and keep the affine copy; called after the weights are loaded."""
        self.prepared = None
        if not use_metal():
            self.affine()

    def affine(self) -> tuple[mx.array, mx.array, mx.array]:
        """The rows in MLX's affine format, from the copy if it is up to date.

        A compiled training step replaces the module's arrays; then the first call after training
        makes a new copy. While MLX traces a function, no copy is kept.
        """
        copy = self.prepared
        if copy is not None and copy.rows is self.weight and copy.scales is self.scales:
            return copy.arrays
        copy = AffineCopy(self.weight, self.scales, self.input_dims)
        # Evaluate now: a lazy array can only be evaluated in the thread that made it.
        self.prepared = None if self.training or not _evaluated(copy.arrays) else copy
        return copy.arrays


def _converted(
    rows: mx.array, scales: mx.array, in_features: int
) -> tuple[mx.array, mx.array, mx.array]:
    """What `rows_to_affine2` returns, computed piece by piece unless MLX traces a function."""
    matrix, flat = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
    step = max(1, CONVERTED_BYTES // (TILE_ROWS * flat.shape[1])) * TILE_ROWS
    by_row = scales.shape == matrix
    # A tile of scales never has rows of two matrices.
    if len(flat) <= step or not (by_row or rows.ndim == 2):
        return rows_to_affine2(rows, scales, in_features)
    scales, share = (scales.flatten(), 1) if by_row else (scales, TILE_ROWS)
    pieces = []
    for start in range(0, len(flat), step):
        stop = min(len(flat), start + step)
        part = scales[start // share : -(-stop // share)]
        pieces.append(rows_to_affine2(flat[start:stop], part, in_features))
        _evaluated(pieces[-1])
    weight, scale, bias = (mx.concatenate([*parts]) for parts in zip(*pieces, strict=True))
    shape = (*matrix, -1)
    return weight.reshape(shape), scale.reshape(shape), bias.reshape(shape)


def keeping_fixed(model: nn.Module, convert: Callable[[], object]) -> None:
    """Convert a model's floats by calling `convert`, except those that modules name in `FIXED`."""
    fixed = [(m, name, m[name]) for m in model.modules() for name in getattr(m, "FIXED", ())]
    convert()
    for module, name, value in fixed:
        module[name] = value


def _evaluated(arrays: tuple[mx.array, ...]) -> bool:
    try:
        mx.eval(arrays)
    except ValueError:  # placeholders of a function that MLX traces
        return False
    return True
