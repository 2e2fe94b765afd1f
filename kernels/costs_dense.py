"""Costs of the kernels of ordinary linear layers and of the rotation, counted by the emulator."""

from functools import cache

import mlx.core as mx

from kernels.costs import ROWS, Figures, figures_of, random_rows
from kernels.emulator import virtual_metal
from outlier_mlx.runtime.groups import tq1_0_linear
from outlier_mlx.runtime.rotation import tq1_0_rotate


@cache
def linear(wide: int, group: int, vectors: int, dtype: mx.Dtype = mx.float16) -> Figures:
    """Cost of `tq1_0_linear` for a weight, with float16 scales of groups (0: one scale a row)."""
    rows = random_rows(1, ROWS, wide)[0]
    tiles = (ROWS // 8, wide // group, 8) if group else None
    scales = mx.ones((ROWS,)) if tiles is None else mx.ones(tiles, mx.float16)
    with virtual_metal() as metal:
        tq1_0_linear(mx.ones((vectors, wide), dtype), rows, scales, size=vectors)
    return figures_of(metal.launches[0].cost, ROWS * wide, ("rows", "scales"))


@cache
def rotation(block: int, dtype: mx.Dtype = mx.float16) -> Figures:
    """Cost of `tq1_0_rotate` for an element of x, of whole threadgroups of blocks."""
    wide = max(block, 1024)
    with virtual_metal() as metal:
        tq1_0_rotate(mx.ones((1, wide), dtype), mx.ones((wide,), mx.float16), block=block)
    return figures_of(metal.launches[0].cost, wide, ("x", "signs"))
