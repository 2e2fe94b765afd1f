"""Costs of the decode kernels, counted by the emulator, and lower bounds of their time on chips."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kernels.emulator import virtual_metal
from kernels.emulator.mlx_kernels import gather_qmv
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.kernels import tq1_0_down, tq1_0_swiglu
from outlier_mlx.runtime.variants import Variant

# Hidden size and width of an expert.
SHAPES = {"14B": (5120, 13824), "7B": (3584, 18944)}
KERNELS = ("swiglu", "down")
# Number of matrix rows to run: the cost per weight does not depend on it.
ROWS = 64
MLX_GROUP = 128


@dataclass(frozen=True)
class Figures:
    """Cost per weight: cycles of a lane on each pipe, bytes read, load instructions."""

    main: float
    second: float
    bytes: float
    loads: float
    private: bool  # whether a thread keeps an array in memory instead of registers

    @property
    def cycles(self) -> float:
        """Main-pipe plus half of second-pipe cycles."""
        return self.main + self.second / 2


@dataclass(frozen=True)
class Chip:
    """A chip's memory bandwidth in GB/s, number of GPU cores, and their clock in GHz."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    def picoseconds(self, figures: Figures, overlapping: bool) -> float:
        """Time per weight: that of memory or arithmetic, whichever is longer.

        A core has four schedulers; each issues one instruction for 32 lanes per cycle.

        Args:
            figures: cost per weight.
            overlapping: whether both pipes work at the same time, or one after the other.
        """
        pipes = figures.main, figures.second
        cycles = max(pipes) if overlapping else sum(pipes)
        lanes = self.cores * 128 * self.clock  # lane-cycles a nanosecond
        return 1000 * max(figures.bytes / self.bandwidth, cycles / lanes)


# The sources are in docs/kernels.md.
CHIPS = (
    Chip("M1 Max", 400, 32, 1.296),
    Chip("M2 Max", 400, 38, 1.398),
    Chip("M3 Max", 400, 40, 1.398),
    Chip("M4 Max", 546, 40, 1.578),
)


def _rows(out: int, wide: int) -> mx.array:
    rows = np.random.default_rng(0).integers(0, 243, (2, out, row_bytes(wide)), dtype=np.uint8)
    return mx.array(rows)


@cache
def ours(
    kernel: str, hidden: int, width: int, variant: Variant, dtype: mx.Dtype = mx.float16
) -> Figures:
    """Cost of a decode kernel of this project for one token with two experts."""
    pair = mx.array([[0, 1]], mx.uint32)
    with virtual_metal() as metal:
        if kernel == "swiglu":
            x = mx.random.normal((1, hidden)).astype(dtype)
            gate, scales = _rows(ROWS, hidden), mx.ones((2, ROWS))
            tq1_0_swiglu(x, gate, scales, gate, scales, pair, variant=variant)
            names: tuple[str, ...] = ("gate", "gate_scales", "up", "up_scales")
            weights = 2 * 2 * ROWS * hidden
        else:
            h, shared = mx.random.normal((1, 2, width)), mx.zeros((1, ROWS), dtype)
            down, scales = _rows(ROWS, width), mx.ones((2, ROWS))
            tq1_0_down(h, down, scales, pair, mx.ones((1, 2)), shared, variant=variant)
            names, weights = ("down", "scales"), 2 * ROWS * width
    cost = metal.launches[0].cost
    figures = cost.per_weight(weights, names)
    private = bool({"private load", "private store"} & set(cost.instructions))
    return Figures(figures.main, figures.second, figures.bytes, figures.loads, private)


@cache
def mlx_two_bit(wide: int) -> Figures:
    """Cost of MLX's own gathered 2-bit product in float16, measured in the same way."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (2, ROWS, wide // 16), dtype=np.uint32)
    scales = mx.ones((2, ROWS, wide // MLX_GROUP), mx.float16)
    x, pair = mx.random.normal((1, wide)).astype(mx.float16), mx.array([[0, 1]], mx.uint32)
    found = gather_qmv(x, mx.array(codes), scales, -scales, pair, group_size=MLX_GROUP, bits=2)
    cost = found.cost.per_weight(found.weights, ("w", "scales", "biases"))
    return Figures(cost.main, cost.second, cost.bytes, cost.loads, False)
