"""Rounding to narrower dtypes: numbers stay finite or are refused. Nothing else narrows numbers."""

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.bounds import fits

#: The dtypes that models are written in, by the names that configs use; bfloat16 is held as its
#: 16 bits, because NumPy does not have it.
STORED: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
#: The option of most commands that rounds nothing.
KEEPS = "--dtype float32"


def require_fit(values: np.ndarray, dtype: str, where: str, keeps: str = KEEPS) -> None:
    """Check that numbers are finite and stay so in a dtype.

    Args:
        values: of any float dtype and shape.
        dtype: "float32", "float16" or "bfloat16".
        where: file and tensor, for the message.
        keeps: the option with which these numbers would stay as they are.

    Raises:
        CheckpointError: names the tensor, and the first number that is too large.
    """
    # NaN is neither above nor below a bound, and minimum and maximum pass it on.
    if not values.size or (fits(float(values.min()), dtype) and fits(float(values.max()), dtype)):
        return
    flat = values.reshape(-1)
    if not np.isfinite(flat).all():
        raise CheckpointError(f"{where}: holds NaN or infinity")
    worst = float(flat[np.abs(flat).argmax()])
    hint = "" if dtype == "float32" else f"; {keeps} keeps them"
    raise CheckpointError(f"{where}: holds numbers too large for {dtype}, as {worst:g}{hint}")


def narrowed(values: np.ndarray, dtype: str, where: str, keeps: str = KEEPS) -> np.ndarray:
    """Round to the nearest numbers of a dtype, ties to even.

    Args:
        values: float64 or float32, of any shape.
        dtype: "float32", "float16" or "bfloat16".
        where: file and tensor, for messages.
        keeps: as for `require_fit`.

    Returns:
        An array of the same shape and of the dtype `STORED[dtype]`.

    Raises:
        CheckpointError: see `require_fit`.
    """
    if dtype == "bfloat16" and values.dtype == np.float64:
        values = narrowed(values, "float32", where)
    require_fit(values, dtype, where, keeps)
    return _rounded(values, dtype)


def widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 of what `narrowed` returns."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def all_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether numbers of 16 bits are finite, from their bits (uint16) and in no more memory."""
    if not bits.size:
        return True
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    # NaN is above infinity. As int16, negative numbers are below all others; as uint16, above.
    return int(bits.view(np.int16).max()) < infinity and int(bits.max()) < infinity | 0x8000


def is_rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Which of some float32 numbers a dtype does not hold exactly: booleans, of their shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        return widened(_rounded(values, dtype), dtype) != values


def nearest_product(up: float, down: float) -> tuple[np.float16, np.float16]:
    """Two float16 numbers whose product is nearest to that of two others, neither of them 0."""
    start = np.float16(2.0 ** np.floor(np.log2(up)))
    ones = (start.view(np.uint16) + np.arange(1024, dtype=np.uint16)).view(np.float16)
    exact = up * down
    with np.errstate(over="ignore"):
        others = (exact / ones.astype(np.float64)).astype(np.float16)
    off = np.abs(ones.astype(np.float64) * others.astype(np.float64) - exact)
    best = int(np.where(np.isfinite(off), off, np.inf).argmin())
    return ones[best], others[best]


def rounding_error(values: np.ndarray, rounded: np.ndarray) -> float:
    """The largest difference between numbers and what they were rounded to, as a part of one."""
    exact = values.astype(np.float64)
    sizes = np.abs(exact)
    off = np.abs(rounded.astype(np.float64) - exact)
    return float((off[sizes > 0] / sizes[sizes > 0]).max(initial=0))


def require_affine(
    scales: np.ndarray, biases: np.ndarray, bits: int, dtype: str, where: str
) -> None:
    """Check that every weight scale * code + bias stays finite in a dtype.

    Args:
        scales: float32, one a group.
        biases: float32, of the same shape.
        bits: bits of a code.
        dtype: the dtype in which MLX computes the weights: that of scales and biases.
        where: file and tensor, for the message.

    Raises:
        CheckpointError: see `require_fit`.
    """
    for code in (0, 2**bits - 1):
        with np.errstate(over="ignore", invalid="ignore"):
            weights = scales * np.float32(code) + biases
        require_fit(weights, dtype, where)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(STORED[dtype], copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    result = bits >> 16
    result &= 1
    result += 0x7FFF  # half a step, less one where the number below is even
    result += bits
    result >>= 16
    return result.astype(STORED[dtype])
