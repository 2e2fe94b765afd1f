"""Costs of the decode kernels with several pairs of one expert, counted by the emulator."""

from functools import cache

import mlx.core as mx
import numpy as np

from kernels.costs import ROWS, Figures, figures_of, random_rows
from kernels.emulator import virtual_metal
from outlier_mlx.runtime.blocks import tq1_0_sort
from outlier_mlx.runtime.kernels import tq1_0_qmv, tq1_0_swiglu

# Pairs of a full block.
SIZES = (2, 4, 8)


@cache
def block_cost(
    kernel: str, wide: int, size: int, pairs: int, dtype: mx.Dtype = mx.float16
) -> Figures:
    """Cost of a launch for pairs of one expert, for each of the weights that they share.

    Args:
        kernel: "swiglu", or "qmv", which with blocks multiplies for `tq1_0_down`, too.
        wide: columns of its matrices.
        size: most pairs of a block.
        pairs: number of pairs, at most `size`.
        dtype: dtype of x.
    """
    packed = random_rows(1, ROWS, wide), mx.ones((1, ROWS))
    x, indices = mx.random.normal((pairs, wide)).astype(dtype), mx.zeros((pairs, 1), mx.uint32)
    with virtual_metal() as metal:
        blocks = tq1_0_sort(indices, 1, size)
        if kernel == "swiglu":
            tq1_0_swiglu(x, *packed, *packed, indices, blocks=blocks)
        else:
            tq1_0_qmv(x, *packed, indices.flatten(), blocks=blocks)
    names = ("gate", "gate_scales", "up", "up_scales") if kernel == "swiglu" else ("rows", "scales")
    return figures_of(metal.launches[-1].cost, ROWS * wide * (len(names) // 2), names)


def sort_cycles(pairs: int, experts: int, size: int) -> float:
    """Main-pipe cycles of the simdgroup of `tq1_0_sort` that has most to do."""
    rng = np.random.default_rng(0)
    indices = mx.array(rng.integers(0, experts, pairs).astype(np.uint32))
    with virtual_metal() as metal:
        tq1_0_sort(indices, experts, size)
    launch = metal.launches[0]
    return launch.cost.cycles.main / (launch.threadgroup[0] / 32)
