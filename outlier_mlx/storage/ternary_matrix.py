"""Matrices that hold only {-s, 0, s}, in whatever form they are stored: one way to read them all.

A `TernarySource` is a matrix of a file, which says what its form promises, and reads rows of it as
trits and scales. What the form does not promise (that there are no other values; that all groups
of a row have one scale) its numbers must say: `examine` goes through them, and `settled` decides
which scales are written. Reading is exact, or an error.

Scales are arrays of the dtypes in `rounding.STORED`: bfloat16 is held as its 16 bits. They are 0
or more, since trits carry the sign.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TypeVar

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.rounding import widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.ternary import pack_rows, row_bytes

#: Groups of weights along a row that kernels have scales for, besides one scale a row.
GROUPS = (64, 128)
#: Bytes of a source that are examined or read at a time: enough that threads seldom wait for each
#: other, little enough that the trits of a few slabs take some tens of megabytes.
SLAB_BYTES = 1 << 21

# Bytes of packed rows that are made of trits at a time, so that a cache holds the trits.
_PACKED_BYTES = 1 << 18

T = TypeVar("T")
#: Computes calls one after the other, or several of them at the same time; results are in order.
InOrder = Callable[[Iterable[Callable[[], T]]], Iterator[T]]


class NotTernary(CheckpointError):
    """A sound matrix that holds other values than {-s, 0, s}."""


@dataclass(frozen=True)
class Scales:
    """How the scales of a ternary matrix are stored.

    Attributes:
        group: weights along a row that share a scale; 0: one scale a row.
        dtype: "float32", "float16" or "bfloat16".
    """

    group: int
    dtype: str

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix (out, in): (out,) or (out, in / group)."""
        out, width = shape
        return (out, width // self.group) if self.group else (out,)


@dataclass(frozen=True)
class Seen:
    """What some rows say about the scales of a matrix.

    Attributes:
        one_a_row: each row has the same scale in all groups, but for groups of zeros.
        pairs: groups 2 n and 2 n + 1 of each row have the same scale, or one of them is zeros.
    """

    one_a_row: bool = True
    pairs: bool = True

    def __and__(self, other: "Seen") -> "Seen":
        return Seen(self.one_a_row and other.one_a_row, self.pairs and other.pairs)


class TernarySource(ABC):
    """A matrix of a file that is ternary, or may be: see the module."""

    #: Whether its form has nothing in it but trits.
    always: bool = False
    #: Whether one scale a row is written where the numbers allow it.
    may_be_rows: bool = False
    #: Rows of a slab are a multiple of this.
    multiple: int = 1

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    @property
    @abstractmethod
    def where(self) -> str:
        """File and tensor, for messages."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes on disk of all that is read."""

    @property
    @abstractmethod
    def scales(self) -> Scales:
        """Scales as `read` returns them."""

    @abstractmethod
    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, (rows, in) int8, and their scales.

        Raises:
            NotTernary: they hold other values.
            CheckpointError: they are damaged, as by a scale that is not finite.
        """

    def examine(self, start: int, stop: int) -> Seen:
        """Go through rows; raises like `read`."""
        trits, scales = self.read(start, stop)
        return seen(trits, scales, self.scales.group)

    def glance(self, start: int, stop: int) -> Seen | None:
        """What `examine` finds, if all codes are trits, which is not looked at; None: unknown."""
        return None

    def trusting(self) -> "TernarySource":
        """The same matrix for use after `glance`: it refuses codes that are no trits."""
        return self

    def packed(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What `read` returns, with the trits packed as by `pack_rows`; raises like it.

        None where this is not faster.
        """
        return None


@dataclass(frozen=True)
class WeightSource(TernarySource):
    """A source of one tensor, floats (out, in), unless a class says that it has more."""

    weight: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.weight.shape

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return self.weight.where

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.weight.nbytes


@dataclass(frozen=True)
class TernaryMatrix:
    """A source whose numbers were examined, and the scales that it gets.

    Attributes:
        source: what is read.
        scales: how scales are written; those of the source, or fewer of them.
        glanced: whether reading it may still find codes that are no trits.
    """

    source: TernarySource
    scales: Scales
    glanced: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.source.shape

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, (rows, in) int8, and scales of the dtype and group in `scales`."""
        trits, scales = self.source.read(start, stop)
        if self._joins > 1:
            scales = joined(trits, scales, self._joins)
        return trits, self._stored(scales)

    def packed(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Like `read`, with the trits packed: (rows, row_bytes(in)) uint8."""
        found = self.source.packed(start, stop)
        if found is not None:
            rows, scales = found
            parts = scales.reshape(len(rows), -1, self._joins)
            if (parts == parts[..., :1]).all():
                return rows, self._stored(np.ascontiguousarray(parts[..., 0]))
        count, pitch = stop - start, row_bytes(self.shape[1])
        rows = np.empty((count, pitch), np.uint8)
        found_scales = []
        for first, last in row_ranges(count, pitch, _PACKED_BYTES, self.source.multiple):
            trits, scales = self.read(start + first, start + last)
            rows[first:last] = pack_rows(trits)
            found_scales.append(scales)
        return rows, np.concatenate(found_scales)

    @property
    def _joins(self) -> int:
        """How many scales of the source become one."""
        have, want = self.source.scales.group, self.scales.group
        return (want or self.shape[1]) // (have or self.shape[1])

    def _stored(self, scales: np.ndarray) -> np.ndarray:
        if self.source.scales.dtype != self.scales.dtype:
            scales = widened(scales, self.source.scales.dtype)
        return scales if self.scales.group else scales.reshape(len(scales))


def settled(
    source: TernarySource, in_order: InOrder[Seen], *, quick: bool = False
) -> TernaryMatrix:
    """Examine all of a source, and choose the scales that are written.

    Groups of 64 become groups of 128 where this changes no weight; one scale a row is taken where
    the form allows it and a row has more than one block.

    Args:
        source: the matrix.
        in_order: computes the calls that it is given, perhaps in several threads.
        quick: only glance at it, where this is enough to choose the scales.

    Raises:
        NotTernary: it holds other values.
        CheckpointError: it is damaged.
    """
    if quick and (found := _glanced(source)) is not None:
        return replace(with_scales(source.trusting(), found), glanced=True)
    calls = (partial(source.examine, *rows) for rows in slabs(source))
    return with_scales(source, reduce(Seen.__and__, in_order(calls), Seen()))


def _glanced(source: TernarySource) -> Seen | None:
    found = Seen()
    for rows in slabs(source):
        if (more := source.glance(*rows)) is None:
            return None
        found &= more
    return found


def with_scales(source: TernarySource, found: Seen) -> TernaryMatrix:
    """A source with the scales that `found`, which is true of all rows, allows."""
    have, width = source.scales, source.shape[1]
    if have.group and source.may_be_rows and found.one_a_row and width > 2 * GROUPS[-1]:
        return TernaryMatrix(source, Scales(0, "float32"))
    if have.group == 64 and width % 128 == 0 and found.pairs:
        return TernaryMatrix(source, Scales(128, have.dtype))
    return TernaryMatrix(source, have)


def slabs(source: TernarySource) -> Iterator[tuple[int, int]]:
    """Row numbers (start, stop) of a source's slabs."""
    rows = source.shape[0]
    return row_ranges(rows, source.nbytes // max(1, rows), SLAB_BYTES, source.multiple)


def seen(trits: np.ndarray, scales: np.ndarray, group: int) -> Seen:
    """What rows say about their scales.

    Args:
        trits: (rows, in) int8.
        scales: (rows, in / group), 0 or more.
        group: weights that share a scale; 0: a row has one scale.
    """
    if not group or scales.shape[1] < 2:
        return Seen()
    if (scales == scales[:, :1]).all():
        return Seen()
    used = _used(trits, scales.shape)
    one = _first_used(scales, used)
    one_a_row = bool((~used | (scales == one)).all())
    even = scales.shape[1] // 2 * 2
    first, second = scales[:, 0:even:2], scales[:, 1:even:2]
    pairs = (first == second) | ~used[:, 0:even:2] | ~used[:, 1:even:2]
    return Seen(one_a_row, bool(pairs.all()))


def joined(trits: np.ndarray, scales: np.ndarray, count: int) -> np.ndarray:
    """One scale in place of `count`: that of the first group with a trit that is not 0.

    Args:
        trits: (rows, in) int8.
        scales: (rows, in / group).
        count: groups that are joined, a divisor of their number.

    Returns:
        (rows, in / group / count).
    """
    rows = scales.reshape(-1, count)
    if (rows == rows[:, :1]).all():
        return np.ascontiguousarray(rows[:, 0]).reshape(len(scales), -1)
    return _first_used(rows, _used(trits, scales.shape).reshape(rows.shape)).reshape(
        len(scales), -1
    )


def _used(trits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which groups have a trit other than 0: booleans of `shape`."""
    return np.asarray(trits.reshape(*shape, -1).any(axis=-1))


def _first_used(scales: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The scale of each row's first used group: (rows, 1)."""
    return np.take_along_axis(scales, used.argmax(axis=1, keepdims=True), axis=1)


def without_sign(trits: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Make scales 0 or more; where one was not, its trits are negated in place.

    Args:
        trits: (rows, in) int8.
        scales: (rows, groups) as stored, finite.
        dtype: their dtype.

    Returns:
        The scales without sign.
    """
    if dtype == "bfloat16":
        negative = (scales & np.uint16(0x8000)) != 0
        scales = scales & np.uint16(0x7FFF)
    else:
        negative = np.signbit(scales)
        scales = np.abs(scales)
    if negative.any():
        grouped = trits.reshape(*scales.shape, -1)
        np.negative(grouped, out=grouped, where=negative[..., None])
    return scales
