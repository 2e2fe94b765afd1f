"""Convert ggml's quantized blocks to MLX's affine format: weight = scale * code + bias.

The layouts are those of the package `gguf` (`gguf/quants.py`) and of ggml's sources. The functions
take stored rows, (rows, row_bytes) uint8, and return their codes, scales and biases. With float32
scales, the types in `AFFINE` are exact: products of codes and scales have at most 24 significant
bits, and MLX adds the bias with one rounding, like ggml.

Q2_K, Q3_K and Q6_K have a scale for every 16 weights, but MLX's smallest group is 32. They are
decoded (`values`) and quantized again (`quantize`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.ternary import TernaryError
from outlier_mlx.ternary.ggml import unpack_tq1_0_blocks, unpack_tq2_0_blocks
from outlier_mlx.ternary.prism import (
    unpack_pq2_0_blocks,
    unpack_ptq1_0_blocks,
    unpack_q2_0_blocks,
)

#: Types that are not quantized.
FLOATS = ("F32", "F16", "BF16")
#: Types whose groups are smaller than MLX's smallest group.
REGROUPED = ("Q2_K", "Q3_K", "Q6_K")

#: The blocks of some rows, (rows, blocks, block_bytes) uint8.
Blocks = np.ndarray


@dataclass(frozen=True)
class Affine:
    """How to convert a type to the affine format.

    Attributes:
        bits: bits of a code.
        group: number of weights that share a scale.
        half: whether float16 holds all scales and biases exactly.
        block_bytes: size of a block in bytes.
        codes: function from blocks to codes (rows, blocks, weights of a block) uint8.
        scales: function from blocks to scales and biases, (rows, groups) float32 each.
    """

    bits: int
    group: int
    half: bool
    block_bytes: int
    codes: Callable[[Blocks], np.ndarray]
    scales: Callable[[Blocks], tuple[np.ndarray, np.ndarray]]


def codes(kind: str, raw: np.ndarray) -> np.ndarray:
    """The codes of rows of a type in `AFFINE`: (rows, in) uint8."""
    return _flat(AFFINE[kind].codes(_blocks(kind, raw)))


def scales(kind: str, raw: np.ndarray, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of rows of a type in `AFFINE`: (rows, in / group) float32 each.

    Args:
        kind: the type.
        raw: (rows, row_bytes) uint8.
        group: group size to return scales for, a divisor of the type's group size; 0: that size.

    Raises:
        CheckpointError: a scale or bias is NaN or infinite.
    """
    layout = AFFINE[kind]
    found = layout.scales(_blocks(kind, raw))
    times = layout.group // (group or layout.group)
    for array in found:
        if not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0].tolist()
            raise CheckpointError(
                f"row {row}: the scale of weight {column * layout.group} is {array[row, column]}"
            )
    s, b = found
    return np.repeat(s, times, axis=-1), np.repeat(b, times, axis=-1)


def values(kind: str, raw: np.ndarray) -> np.ndarray:
    """Decode rows of any supported type: (rows, in) float32, exact.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    if kind == "F32":
        result = raw.view("<f4").astype(np.float32, copy=False)
    elif kind == "F16":
        result = raw.view("<f2").astype(np.float32)
    elif kind == "BF16":
        result = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in ("Q2_0", "PQ2_0", "PTQ1_0"):  # not in the package
        result = affine_values(codes(kind, raw), *scales(kind, raw))
    else:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(invalid="ignore", over="ignore"):
            result = dequantize(raw, GGMLQuantizationType[kind])
    if not np.isfinite(result).all():
        row, column = np.argwhere(~np.isfinite(result))[0].tolist()
        raise CheckpointError(f"row {row}: weight {column} is {result[row, column]}")
    return result


def grid(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the range of each group into equal steps.

    Args:
        weights: (rows, in) float32, finite.
        bits: bits of a code.
        group: group size, a divisor of `in`.

    Returns:
        Step sizes and lowest weights, (rows, in / group) float32 each: MLX's scales and biases.
    """
    shape = (len(weights), weights.shape[1] // group)
    across = np.ascontiguousarray(weights.reshape(-1, group).T)  # NumPy is slow along short axes
    low, high = across.min(axis=0), across.max(axis=0)
    return ((high - low) / np.float32(2**bits - 1)).reshape(shape), low.reshape(shape)


def quantize(
    weights: np.ndarray, steps: np.ndarray, lowest: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round weights to the nearest codes of a `grid`.

    Args:
        weights: (rows, in) float32.
        steps: (rows, groups) float32; 0 for a group of equal weights.
        lowest: (rows, groups) float32.
        bits: bits of a code.

    Returns:
        Codes (rows, in) uint8, and the weights that they stand for, (rows, in) float32.
    """
    steps, lowest = steps[..., None], lowest[..., None]
    found = weights.reshape(*steps.shape[:-1], -1) - lowest
    found /= np.where(steps > 0, steps, 1)
    np.rint(found, out=found)
    np.clip(found, 0, 2**bits - 1, out=found)
    codes = found.astype(np.uint8)
    found *= steps
    found += lowest
    return codes.reshape(weights.shape), found.reshape(weights.shape)


def affine_values(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The weights (rows, in) float32 that MLX computes.

    Args:
        codes: (rows, in).
        scales: (rows, groups).
        biases: (rows, groups).
    """
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    return _flat(grouped * scales[..., None] + biases[..., None])


def _blocks(kind: str, raw: np.ndarray) -> Blocks:
    return raw.reshape(len(raw), -1, AFFINE[kind].block_bytes)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """Read a float16 at byte `at` of every block: (rows, blocks) float32."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Split bytes (rows, blocks, n) into (rows, blocks, 2 n): low nibbles first, then high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth(packed: np.ndarray) -> np.ndarray:
    """Turn four bytes of a block into 32 fifth bits: values 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _offset(offset: int) -> Callable[[Blocks], tuple[np.ndarray, np.ndarray]]:
    """Scales of types with weight = d * (code - offset)."""

    def scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        d = _half(blocks, 0)
        return d, d * np.float32(-offset)

    return scales


def _minimum(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Scales of types with weight = d * code + m."""
    return _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Scales d * sc and biases -dmin * mn of Q4_K and Q5_K; a block has eight groups."""
    p = blocks[..., 4:16]
    low, middle, high = p[..., 0:4], p[..., 4:8], p[..., 8:12]
    sc = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    mn = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    with np.errstate(invalid="ignore"):
        s = _half(blocks, 0)[..., None] * sc.astype(np.float32)
        b = -(_half(blocks, 2)[..., None] * mn.astype(np.float32))
    return _flat(s), _flat(b)


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """Split 128 bytes of a block: the low nibbles of 32 bytes are one group, the high the next."""
    runs = packed.reshape(*packed.shape[:2], 4, 32)
    return _nibbles(runs).reshape(*packed.shape[:2], 256)


def _q5_k(blocks: Blocks) -> np.ndarray:
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k_nibbles(blocks[..., 48:]) | high.reshape(*blocks.shape[:2], 256) << 4


def _ternary(unpack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable:
    def codes(blocks: Blocks) -> np.ndarray:
        try:
            return (unpack(_flat(blocks))[0] + 1).view(np.uint8)
        except TernaryError as error:
            raise CheckpointError(str(error)) from None

    return codes


def _ternary_scales(at: int, groups: int = 1) -> Callable[[Blocks], tuple[np.ndarray, np.ndarray]]:
    """Scales of ternary types, whose float16 at byte `at` is that of so many groups."""

    def scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        d = np.repeat(_half(blocks, at), groups, axis=-1)
        return d, -d

    return scales


AFFINE: dict[str, Affine] = {
    "Q4_0": Affine(4, 32, True, 18, lambda b: _nibbles(b[..., 2:]), _offset(8)),
    "Q4_1": Affine(4, 32, True, 20, lambda b: _nibbles(b[..., 4:]), _minimum),
    "Q5_0": Affine(
        5, 32, True, 22, lambda b: _nibbles(b[..., 6:]) | _fifth(b[..., 2:6]), _offset(16)
    ),
    "Q5_1": Affine(5, 32, True, 24, lambda b: _nibbles(b[..., 8:]) | _fifth(b[..., 4:8]), _minimum),
    "Q8_0": Affine(8, 32, True, 34, lambda b: b[..., 2:] ^ 128, _offset(128)),
    "Q4_K": Affine(4, 32, False, 144, lambda b: _k_nibbles(b[..., 16:]), _k_scales),
    "Q5_K": Affine(5, 32, False, 176, _q5_k, _k_scales),
    "TQ1_0": Affine(2, 128, True, 54, _ternary(unpack_tq1_0_blocks), _ternary_scales(52, 2)),
    "TQ2_0": Affine(2, 128, True, 66, _ternary(unpack_tq2_0_blocks), _ternary_scales(64, 2)),
    "Q2_0": Affine(2, 64, True, 18, _ternary(unpack_q2_0_blocks), _ternary_scales(0)),
    "PQ2_0": Affine(2, 128, True, 34, _ternary(unpack_pq2_0_blocks), _ternary_scales(0)),
    "PTQ1_0": Affine(2, 128, True, 28, _ternary(unpack_ptq1_0_blocks), _ternary_scales(26)),
}
