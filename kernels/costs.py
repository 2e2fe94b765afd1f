"""Costs of the decode kernels, counted by the emulator, and lower bounds of their time on chips."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kernels.emulator import virtual_metal
from kernels.emulator.cost import Cost
from kernels.emulator.mlx_kernels import gather_qmv
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.kernels import tq1_0_down, tq1_0_qmv, tq1_0_swiglu
from outlier_mlx.runtime.variants import Variant

# Columns of the matrices that each kernel reads in a model: its hidden size, or its experts' width.
SHAPES = {
    "14B": {"swiglu": 5120, "down": 13824, "qmv": 5120},
    "7B": {"swiglu": 3584, "down": 18944, "qmv": 3584},
}
# Number of matrix rows to run: the cost per weight does not depend on it.
ROWS = 64
MLX_GROUP = 128


@dataclass(frozen=True)
class Figures:
    """Cost per weight: cycles of a lane on each pipe, bytes read, load instructions; and estimates.

    Attributes:
        registers: 16-bit registers of a thread.
        threads: threads that a core holds with that many registers each.
        loop_bytes: machine code of the largest innermost loop.
        private: whether a thread keeps an array in memory instead of registers.
    """

    main: float
    second: float
    bytes: float
    loads: float
    registers: int
    threads: int
    loop_bytes: int
    private: bool

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


def random_rows(experts: int, out: int, wide: int) -> mx.array:
    """Random rows of trits (experts, out, row_bytes)."""
    shape = experts, out, row_bytes(wide)
    return mx.array(np.random.default_rng(0).integers(0, 243, shape, dtype=np.uint8))


@cache
def ours(kernel: str, wide: int, variant: Variant, dtype: mx.Dtype = mx.float16) -> Figures:
    """Cost of a decode kernel of this project for one token with two experts.

    Args:
        kernel: "swiglu", "down" or "qmv".
        wide: columns of its matrices.
        variant: variant of the kernel.
        dtype: dtype of x, or of the result.
    """
    pair = mx.array([[0, 1]], mx.uint32)
    packed = random_rows(2, ROWS, wide), mx.ones((2, ROWS))
    x = mx.random.normal((1, wide)).astype(dtype)
    names: tuple[str, ...] = ("rows", "scales")
    with virtual_metal() as metal:
        if kernel == "swiglu":
            tq1_0_swiglu(x, *packed, *packed, pair, variant=variant)
            names = ("gate", "gate_scales", "up", "up_scales")
        elif kernel == "down":
            h, shared = mx.random.normal((1, 2, wide)), mx.zeros((1, ROWS), dtype)
            tq1_0_down(h, *packed, pair, mx.ones((1, 2)), shared, variant=variant)
            names = ("down", "scales")
        else:
            tq1_0_qmv(x, *packed, pair.flatten(), variant=variant)
    return figures_of(metal.launches[0].cost, 2 * ROWS * wide * (len(names) // 2), names)


@cache
def mlx_two_bit(wide: int) -> Figures:
    """Cost of MLX's own gathered 2-bit product in float16, measured in the same way."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (2, ROWS, wide // 16), dtype=np.uint32)
    scales = mx.ones((2, ROWS, wide // MLX_GROUP), mx.float16)
    x, pair = mx.random.normal((1, wide)).astype(mx.float16), mx.array([[0, 1]], mx.uint32)
    found = gather_qmv(x, mx.array(codes), scales, -scales, pair, group_size=MLX_GROUP, bits=2)
    return figures_of(found.cost, found.weights, ("w", "scales", "biases"))


def figures_of(cost: Cost, weights: int, buffers: tuple[str, ...]) -> Figures:
    """The cost of a launch for each of its weights, whose bytes are in the named buffers."""
    private = bool({"private load", "private store"} & set(cost.instructions))
    estimates = cost.registers, cost.threads, cost.loop_bytes
    return Figures(*cost.per_weight(weights, buffers), *estimates, private)
