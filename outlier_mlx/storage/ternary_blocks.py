"""Matrices in the ternary blocks of GGUF files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.ternary_matrix import (
    NotTernary,
    Scales,
    Seen,
    TernarySource,
    joined,
    seen,
    without_sign,
)
from outlier_mlx.ternary import TernaryError, ggml, prism
from outlier_mlx.ternary.arrays import items
from outlier_mlx.ternary.two_bits import has_code_3, twos_to_rows

# Rows that are unpacked at a time where scales leave a question open.
_FEW_ROWS = 16


@dataclass(frozen=True)
class BlockType:
    """A type of ternary blocks.

    Attributes:
        group: weights that share a scale, as they are read.
        unpack: function from rows of bytes to trits and the scales of blocks.
        at: byte of a block where its scale is.
        codes: whether there is a code that is no trit.
        may_be_rows: see `TernarySource`.
    """

    group: int
    unpack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    at: int
    codes: bool
    may_be_rows: bool = False


#: ggml's and PrismML's types of blocks that hold trits.
TYPES = {
    "TQ1_0": BlockType(128, ggml.unpack_tq1_0_blocks, 52, codes=False, may_be_rows=True),
    "TQ2_0": BlockType(128, ggml.unpack_tq2_0_blocks, 64, codes=True, may_be_rows=True),
    "Q2_0": BlockType(64, prism.unpack_q2_0_blocks, 0, codes=True),
    "PQ2_0": BlockType(128, prism.unpack_pq2_0_blocks, 0, codes=True),
    "PTQ1_0": BlockType(128, prism.unpack_ptq1_0_blocks, 26, codes=False),
}


class StoredRows(Protocol):
    """Rows of a GGUF tensor, perhaps in another order than the file's."""

    @property
    def tensor(self) -> GgufTensor:
        """The tensor that they are of."""

    @property
    def count(self) -> int:
        """Number of rows."""

    @property
    def multiple(self) -> int:
        """Ranges of rows begin and end at multiples of this."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored, (rows, row_bytes) uint8."""


@dataclass(frozen=True)
class WholeTensor:
    """All rows of a tensor, in the file's order."""

    tensor: GgufTensor

    multiple = 1

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.tensor.rows

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.tensor.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored, (rows, row_bytes) uint8."""
        return self.tensor.read(start, stop)


@dataclass(frozen=True)
class BlockSource(TernarySource):
    """A matrix in ternary blocks.

    Attributes:
        rows: where they are.
        factor: what the matrix is multiplied by, if there is such a number; each row must then
            have one scale.
        head: columns of a head, if the heads are in another order than the file's.
        order: for each head, its number in the file.
    """

    rows: StoredRows
    factor: np.float32 | None = None
    head: int = 0
    order: tuple[int, ...] = ()

    @property
    def type(self) -> BlockType:
        """The type of its blocks."""
        return TYPES[self.rows.tensor.kind]

    @property
    def always(self) -> bool:  # type: ignore[override]
        """Whether the type has nothing but trits."""
        return not self.type.codes

    @property
    def may_be_rows(self) -> bool:  # type: ignore[override]
        """Whether models are known whose blocks repeat the scale of a row."""
        return self.type.may_be_rows

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """Rows of a slab are a multiple of this."""
        return self.rows.multiple

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.rows.count, self.rows.tensor.shape[-1])

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return self.rows.tensor.where

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return self.rows.nbytes

    @property
    def scales(self) -> Scales:
        """A float16 a group; a float32 a row where there is a factor."""
        if self.factor is not None:
            return Scales(0, "float32")
        return Scales(self._group, "float16")

    @property
    def _group(self) -> int:
        # Heads that are narrower than a group split it.
        return self.type.group if self.head % self.type.group == 0 else 64

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and scales; a group of zeros keeps its scale."""
        trits, d = self._unpacked(self.rows.read(start, stop), start)
        d = without_sign(trits, d, "float16")
        group = self._group
        d = np.repeat(d, trits.shape[1] // d.shape[1] // group, axis=1)
        if self.order:
            trits, d = (self._ordered(array) for array in (trits, d))
        if self.factor is None:
            return trits, d
        if not seen(trits, d, group).one_a_row:
            raise CheckpointError(
                f"{self.where}: blocks of different scales, and a .scale beside it: float32 holds"
                " no product of both exactly"
            )
        row = joined(trits, d, d.shape[1]).reshape(-1).astype(np.float32) * abs(self.factor)
        if self.factor < 0:
            np.negative(trits, out=trits)
        if not np.isfinite(row).all():
            raise CheckpointError(f"{self.where}: the scale {self.factor} makes weights infinite")
        return trits, row

    def packed(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Like `read`, but for other blocks than of two bits and unusual scales: None."""
        if self.type.at != 0 or self.factor is not None or self.order:
            return None
        raw = self.rows.read(start, stop)
        codes, d = prism.split_two_bits(raw, self.rows.tensor.block_bytes)
        return None if np.signbit(d).any() or has_code_3(codes) else (twos_to_rows(codes), d)

    def examine(self, start: int, stop: int) -> Seen:
        """Like `read`; only rows whose scales leave a question open are unpacked."""
        raw = self.rows.read(start, stop)
        if self.factor is not None or self.order:
            return super().examine(start, stop)
        at, blocks = self.type.at, raw.reshape(len(raw), -1, self.rows.tensor.block_bytes)
        # As one item a block, both are copied faster.
        d = np.abs(np.ascontiguousarray(items(blocks, at, 2)).view("<f2"))
        codes = items(blocks, 2 if at == 0 else 0, blocks.shape[-1] - 2)
        if not np.isfinite(d).all() or (
            self.type.codes and has_code_3(np.ascontiguousarray(codes).view(np.uint8))
        ):
            self._unpacked(raw, start)  # it names the place
        if self.type.group == 64:
            even = d.shape[1] // 2 * 2
            open_rows = (d[:, 0:even:2] != d[:, 1:even:2]).any(axis=1)
        elif self.may_be_rows:
            open_rows = (d != d[:, :1]).any(axis=1)
        else:
            return Seen(one_a_row=False)
        found, numbers = Seen(), open_rows.nonzero()[0]
        # Nearly always the first of them decide.
        for part in np.split(numbers, range(_FEW_ROWS, len(numbers), _FEW_ROWS)):
            if not len(part) or not (found.one_a_row if self.may_be_rows else found.pairs):
                break
            found &= self._seen(raw[part], start)
        return found

    def glance(self, start: int, stop: int) -> Seen | None:
        """Nothing is read: groups of 128 with a scale each stay as they are."""
        open_scales = self.may_be_rows or self.factor is not None or self._group != 128
        return None if open_scales else Seen(one_a_row=False)

    def _seen(self, raw: np.ndarray, start: int) -> Seen:
        trits, d = self._unpacked(raw, start)
        group = trits.shape[1] // d.shape[1]
        return seen(trits, np.abs(d), group)

    def _unpacked(self, raw: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.type.unpack(raw)
        except TernaryError as error:
            kind = NotTernary if "code 3" in str(error) else CheckpointError
            raise kind(f"{self.where}: from row {start}: {error}") from None

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        """Columns in the order of `order`: (rows, columns) of trits or scales."""
        heads = array.reshape(len(array), len(self.order), -1)
        return np.ascontiguousarray(heads[:, list(self.order)]).reshape(array.shape)
