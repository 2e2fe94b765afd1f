"""Rows of numbers as ggml's blocks. Layouts as in ggml's sources and in its package `gguf`."""

from collections.abc import Iterator

import numpy as np

from outlier_mlx.checkpoints.base_matrices import AffineMatrix
from outlier_mlx.checkpoints.folding import in_float16
from outlier_mlx.storage.rounding import is_rounded, narrowed, rounding_error
from outlier_mlx.storage.tensors import FloatTensor, Trits, row_ranges
from outlier_mlx.ternary.ggml import BLOCK, pack_tq1_0_blocks, pack_tq2_0_blocks

#: The types that hold trits exactly: 256 weights a block, or 32.
TERNARY = ("tq2_0", "tq1_0", "q4_0")
_SMALL = 32


def ternary_rows(kind: str, trits: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of trits in blocks of their row's scale.

    Args:
        kind: one of `TERNARY`.
        trits: (rows, in) int8.
        scales: (rows,) float16, finite.

    Returns:
        (rows, row_bytes) uint8.
    """
    if kind != "q4_0":
        pack = pack_tq1_0_blocks if kind == "tq1_0" else pack_tq2_0_blocks
        return pack(trits, np.repeat(scales[:, None], trits.shape[1] // BLOCK, axis=1))
    codes = (trits.reshape(len(trits), -1, _SMALL) + np.int8(8)).view(np.uint8)
    d = np.broadcast_to(scales[:, None], codes.shape[:2])
    return _joined([_halves(d), _nibbles(codes)])


def ternary_slabs(kind: str, trits: Trits, scales: np.ndarray) -> Iterator[np.ndarray]:
    """The blocks of an expert's matrix, a few rows at a time.

    Args:
        kind: as for `ternary_rows`.
        trits: (out, in); the block divides `in`.
        scales: (out,) float16, finite; rows that were added as padding may have none.
    """
    scales = np.pad(scales, (0, trits.shape[0] - len(scales)))
    for start, stop in row_ranges(*trits.shape):
        yield ternary_rows(kind, trits.read(start, stop), scales[start:stop])


def affine_kind(matrix: AffineMatrix) -> str | None:
    """The type of blocks that has the codes of a matrix as they are; None: there is none."""
    return {4: "Q4_1", 5: "Q5_1"}.get(max(4, matrix.bits))


def affine_rounding(matrix: AffineMatrix) -> float:
    """By how much float16 changes the scales and biases of a matrix: the largest part of one.

    Raises:
        CheckpointError: one is too large for float16.
    """
    worst = 0.0
    for start, stop in row_ranges(matrix.shape[0], matrix.scales.shape[1]):
        for values in matrix.read_groups(start, stop):
            if is_rounded(values, "float16").any():
                halves = in_float16(values, matrix.where)
                worst = max(worst, rounding_error(values, halves))
    return worst


def affine_slabs(matrix: AffineMatrix) -> Iterator[np.ndarray]:
    """A matrix of at most 5 bits in blocks of 32 with its own codes: Q4_1 or Q5_1.

    A weight is d * code + m. Block: d, m (float16); Q5_1: the codes' fifth bits (4 bytes); 16 bytes
    of which byte j has the low four bits of codes j and j + 16.
    """
    for start, stop in row_ranges(*matrix.shape):
        times = matrix.group // _SMALL
        d, m = (
            np.repeat(in_float16(values, matrix.where), times, axis=1)
            for values in matrix.read_groups(start, stop)
        )
        codes = matrix.read_codes(start, stop).reshape(*d.shape, _SMALL)
        parts = [_halves(d), _halves(m)]
        if matrix.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        yield _joined([*parts, _nibbles(codes & np.uint8(15))])


def q8_0_slabs(tensor: FloatTensor) -> Iterator[np.ndarray]:
    """A matrix in Q8_0: blocks of 32 weights d * q, d float16, q the nearest of -127 to 127."""
    out, width = tensor.shape
    for start, stop in row_ranges(out, width):
        weights = tensor.read_float32(start, stop).reshape(stop - start, -1, _SMALL)
        largest = np.abs(weights).max(axis=-1)
        d = in_float16(largest / np.float32(127), tensor.where)
        steps = d.astype(np.float32)[..., None]
        q = np.rint(np.divide(weights, steps, out=np.zeros_like(weights), where=steps > 0))
        yield _joined([_halves(d), np.clip(q, -127, 127).astype(np.int8).view(np.uint8)])


def float_slabs(tensor: FloatTensor) -> Iterator[np.ndarray]:
    """A tensor of any float dtype as float32."""
    rows = tensor.shape[0]
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    for start, stop in row_ranges(rows, width):
        yield narrowed(tensor.read_float32(start, stop), "float32", tensor.where)


def _halves(values: np.ndarray) -> np.ndarray:
    """The bytes of float16 numbers (rows, blocks): (rows, blocks, 2) uint8."""
    return np.ascontiguousarray(values, "<f2")[..., None].view(np.uint8)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits, (rows, blocks, 32), as (rows, blocks, 16) uint8."""
    return codes[..., :16] | codes[..., 16:] << np.uint8(4)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(len(blocks), -1)
