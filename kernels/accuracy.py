"""Errors of the decode kernels against float64 when a few activations are very large."""

import mlx.core as mx
import numpy as np

from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.kernels import tq1_0_qmv


def planted(
    seed: int, wide: int, rows: int, outliers: int, size: float, together: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make normal x with outliers, and random trits. In even rows, trits at outliers are 0.

    Args:
        seed: random seed.
        wide: number of elements of x.
        rows: number of rows of trits.
        outliers: number of large elements of x.
        size: magnitude of the large elements.
        together: whether the large elements all belong to one word of a row (20 elements).

    Returns:
        x (wide,) float16, trits (rows, wide) int8, and the indices of the outliers.
    """
    rng = np.random.default_rng([seed, wide, outliers])
    x = rng.standard_normal(wide)
    among = _word(rng, wide) if together else np.arange(wide)
    dims = rng.choice(among, outliers, replace=False)
    x[dims] = size * rng.choice([-1, 1], outliers)
    trits = rng.integers(-1, 2, (rows, wide), dtype=np.int8)
    trits[::2, dims] = 0
    return x.astype(np.float16), trits, dims


def _word(rng: np.random.Generator, wide: int) -> np.ndarray:
    """The elements of x that four neighbouring bytes of a row belong to."""
    pitch = row_bytes(wide)
    inside = wide - 4 * pitch  # bytes all of whose digits are elements of x
    first = 4 * rng.integers(inside // 4)
    return (np.arange(5)[:, None] * pitch + first + np.arange(4)).ravel()


def pack(trits: np.ndarray) -> np.ndarray:
    """Pack trits (..., wide) into the layout `tq1_0_strided`: (..., row_bytes) uint8."""
    wide = trits.shape[-1]
    digits = np.ones((*trits.shape[:-1], row_bytes(wide) * 5), np.int64)
    digits[..., :wide] = trits + 1
    q = 3 ** np.arange(4, -1, -1) @ digits.reshape(*trits.shape[:-1], 5, -1)
    return ((256 * q + 242) // 243).astype(np.uint8)


def half_ulp(typical: float) -> float:
    """Half the distance between float16 numbers near a value."""
    return float(2.0 ** (np.floor(np.log2(typical)) - 11))


def errors(x: np.ndarray, trits: np.ndarray, dtype: mx.Dtype = mx.float16) -> np.ndarray:
    """Errors (rows,) of the product `trits x`, in half ulps of a typical float16 output.

    The typical output is that for x of variance 1 without outliers, and random trits.
    """
    y = tq1_0_qmv(
        mx.array(x[None]).astype(dtype),
        mx.array(pack(trits)[None]),
        mx.ones((1, len(trits))),
        mx.zeros((1,), mx.uint32),
    )
    exact = trits.astype(np.float64) @ x.astype(np.float64)
    return np.abs(np.array(y)[0] - exact) / half_ulp((len(x) * 2 / 3) ** 0.5)
