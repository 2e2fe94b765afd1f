"""Linear layers and embeddings with ternary weights, which take the place of a model's own.

A row of trits has one scale, or one for each group of 64 or 128 weights. A layer may store W H S in
place of W (rotation.py): then its input is rotated, once for all layers of a block that read it.
"""

import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .dense import ternary_linear
from .groups import TILE_ROWS
from .ops import use_metal
from .packed import PackedModule
from .rotation import rotate


class RotationSigns(nn.Module):
    """The signs of a rotation: `signs` (width,) float16, each 1 or -1, frozen."""

    FIXED = ("signs",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.signs = mx.ones((width,), mx.float16)

    @property
    def _no_grad(self) -> set[str]:
        return {"signs"}  # always, as in `PackedModule`

    @_no_grad.setter
    def _no_grad(self, _: set[str]) -> None:
        pass


class _Rotated:
    """An input, its rotation, and the readers that have not taken it yet."""

    def __init__(self, x: mx.array, y: mx.array, waiting: set[int], forget: Any) -> None:
        self.x = weakref.ref(x, forget)
        self.y = y
        self.waiting = waiting


class Rotation:
    """The rotation of what some layers of one block read: H S x, computed once for all of them.

    The last result is kept until every other reader has taken it once, or its input is gone, so
    that nothing is held beyond a call of the block. It is found by the input's identity; a reader
    that comes again starts anew, so an input that was changed in place is rotated again.
    """

    def __init__(self, signs: RotationSigns, block: int) -> None:
        # Not an MLX module: the signs belong to the model, and appear once in its parameters.
        self.signs = signs
        self.block = block
        self.readers = 0
        self._last: _Rotated | None = None

    def add_reader(self) -> int:
        """The number of a new reader."""
        self.readers += 1
        return self.readers - 1

    def __call__(self, x: mx.array, reader: int, training: bool) -> mx.array:
        """Rotate x (..., width) for a reader; see `rotate`."""
        last = self._last  # other threads may replace it
        if last is not None and reader in last.waiting and last.x() is x:
            last.waiting.discard(reader)
            if not last.waiting:
                self._last = None
            return last.y
        y = rotate(x, self.signs.signs, self.block, training=training)
        waiting = set(range(self.readers)) - {reader}
        self._last = _Rotated(x, y, waiting, self._forget) if waiting else None
        return y

    def back(self, x: mx.array, training: bool) -> mx.array:
        """S H x, the inverse."""
        return rotate(x, self.signs.signs, self.block, inverse=True, training=training)

    def _forget(self, gone: Any) -> None:
        last = self._last
        if last is not None and last.x is gone:
            self._last = None


class TernaryRows(PackedModule):
    """A matrix of rows of trits.

    Parameters, all frozen but the bias: `weight` (out, row_bytes) uint8; `scales` (out,) float32,
    or tiles (ceil(out / 8), in / group, 8) of 16-bit floats; `bias` (out,), if there is one.
    """

    def __init__(self, input_dims: int, output_dims: int, group: int = 0) -> None:
        """Zeros, to be loaded; `group` is the number of weights that share a scale, 0: a row."""
        scales = mx.zeros((output_dims,))
        if group:
            tiles = -(-output_dims // TILE_ROWS), input_dims // group, TILE_ROWS
            scales = mx.zeros(tiles, mx.float16)
        super().__init__(input_dims, (output_dims,), scales)

    def product(self, x: mx.array) -> mx.array:
        """Multiply x (..., in) by the matrix: (..., out) of the dtype of x."""
        metal = use_metal()
        return ternary_linear(
            x,
            self.weight,
            self.scales,
            affine=None if metal else self.affine(),
            training=metal and self.training,
        )


class TernaryLinear(TernaryRows):
    """A linear layer with ternary weights: y = W H S x + b; H S and b may be missing."""

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        group: int = 0,
        *,
        bias: bool = False,
        rotation: Rotation | None = None,
    ) -> None:
        """Zeros, to be loaded.

        Args:
            input_dims: width of x.
            output_dims: width of y.
            group: number of weights that share a scale; 0: all of a row.
            bias: whether there is a bias.
            rotation: rotates x, together with the other layers that have it.
        """
        super().__init__(input_dims, output_dims, group)
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.rotation = rotation
        self.reader = 0 if rotation is None else rotation.add_reader()

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out)."""
        if self.rotation is not None:
            x = self.rotation(x, self.reader, self.training)
        y = self.product(x)
        return y + self.bias if "bias" in self else y

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """This layer with a low-rank adapter, as `mlx_lm.lora` trains it."""
        # Only who trains needs these modules.
        from mlx_lm.tuner.lora import LoRALinear

        out = self.weight.shape[0]
        lora: Any = LoRALinear(self.input_dims, out, r=r, dropout=dropout, scale=scale)
        lora.linear = self
        lora.fuse = _refuse_to_fuse
        made: nn.Module = lora
        return made


class TernaryEmbedding(TernaryRows):
    """An embedding with ternary rows; its vectors are S H w for rotated rows w.

    Attributes:
        dtype: dtype of the vectors. A row is rounded to it before it is rotated, and again after.
    """

    def __init__(
        self, num_embeddings: int, dims: int, group: int = 0, *, rotation: Rotation | None = None
    ) -> None:
        """Zeros, to be loaded; see `TernaryLinear`."""
        super().__init__(dims, num_embeddings, group)
        self.rotation = rotation
        self.reader = 0 if rotation is None else rotation.add_reader()
        self.dtype = mx.float32

    def prepare(self) -> None:
        """Nothing: only an embedding that is also the head needs the copy, and makes it then."""
        self.prepared = None

    def __call__(self, ids: mx.array) -> mx.array:
        """The vectors (..., dims) of tokens `ids` (...)."""
        x = looked_up(self.weight, self.scales, ids, self.input_dims).astype(self.dtype)
        return x if self.rotation is None else self.rotation.back(x, self.training)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the head: logits (..., num_embeddings) of x (..., dims)."""
        if self.rotation is not None:
            x = self.rotation(x, self.reader, self.training)
        return self.product(x)


def looked_up(rows: mx.array, scales: mx.array, ids: mx.array, in_features: int) -> mx.array:
    """Decode some rows of a matrix.

    Args:
        rows: (out, row_bytes) uint8.
        scales: of rows or in tiles, see `ternary_linear`.
        ids: (...) numbers of rows.
        in_features: weights of a row.

    Returns:
        (..., in_features) float32, exact.
    """
    some = scales[ids][..., None] if scales.ndim == 1 else scales[ids // 8, :, ids % 8]
    # Digit n of a byte is what carries out of it at the last of n + 1 multiplications by 3; in
    # uint8, what carries is lost.
    fractions = rows[ids][..., None, :] * mx.array([[1], [3], [9], [27], [81]], mx.uint8)
    digits = mx.flatten((fractions.astype(mx.uint16) * 3) >> 8, -2)[..., :in_features]
    trits = mx.unflatten(digits.astype(mx.float32) - 1, -1, (some.shape[-1], -1))
    return mx.flatten(trits * some[..., None].astype(mx.float32), -2)


def _refuse_to_fuse(dequantize: bool = False) -> nn.Module:
    raise ValueError(
        "an adapter cannot be fused with ternary weights, which have only three values; load it"
        " beside the model (--adapter-path)"
    )
