"""Scales of groups of weights, in the order in which the kernels read them.

A matrix (out, in) with a scale for each group of 64 or 128 weights along a row has scales (out,
in / group), 16-bit floats. They are stored in tiles of eight rows, (ceil(out / 8), in / group, 8):
the scales of eight rows for one group are 16 bytes that a kernel loads at once.
"""

from typing import Any

import numpy as np

from outlier_mlx.ternary.arrays import TernaryError, require_size

TILE_ROWS = 8
# Numbers of weights that may share a scale.
GROUP_SIZES = (64, 128)


def tile_scales(scales: np.ndarray) -> np.ndarray:
    """Tile the scales of groups. Bytes are moved, not converted.

    Args:
        scales: (..., out, groups) float16, or uint16 that holds bfloat16.

    Returns:
        (..., ceil(out / 8), groups, 8) of the same dtype. Scales of rows beyond `out` are 0.

    Raises:
        TernaryError: wrong type or shape.
    """
    scales = _require_half("scales", scales, 2)
    *leading, out, groups = scales.shape
    tiles = np.zeros((*leading, -(-out // TILE_ROWS), groups, TILE_ROWS), scales.dtype)
    rows = np.swapaxes(tiles, -1, -2)  # (..., tiles, 8, groups), a view
    full = out // TILE_ROWS
    whole = scales[..., : full * TILE_ROWS, :]
    rows[..., :full, :, :] = whole.reshape(*leading, full, TILE_ROWS, groups)
    if full * TILE_ROWS < out:
        rows[..., full, : out - full * TILE_ROWS, :] = scales[..., full * TILE_ROWS :, :]
    return tiles


def untile_scales(tiles: np.ndarray, out: int) -> np.ndarray:
    """The inverse of `tile_scales`.

    Args:
        tiles: (..., ceil(out / 8), groups, 8) float16 or uint16.
        out: number of rows.

    Returns:
        (..., out, groups) of the same dtype.

    Raises:
        TernaryError: wrong type or shape.
    """
    tiles = _require_half("tiles", tiles, 3)
    out = require_size("out", out)
    *leading, count, groups, rows = tiles.shape
    if rows != TILE_ROWS or count != -(-out // TILE_ROWS):
        raise TernaryError(
            f"tiles: expected (..., {-(-out // TILE_ROWS)}, groups, {TILE_ROWS}) for {out} rows,"
            f" got {tiles.shape}"
        )
    scales = np.swapaxes(tiles, -1, -2).reshape(*leading, count * TILE_ROWS, groups)
    return np.ascontiguousarray(scales[..., :out, :])


def _require_half(name: str, array: Any, dimensions: int) -> np.ndarray:
    half = isinstance(array, np.ndarray) and array.dtype in (np.float16, np.uint16)
    if not half or array.ndim < dimensions:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array)
        raise TernaryError(
            f"{name}: expected float16 or uint16 of at least {dimensions} dimensions, got {found}"
        )
    return np.asarray(array)
