"""What the decode kernels cost by the emulator's count, and how long a chip would take at least."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kernels.emulator import virtual_metal
from kernels.emulator.mlx_kernels import gather_qmv
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.kernels import tq1_0_down, tq1_0_swiglu
from outlier_mlx.runtime.variants import Variant

# hidden size and width of an expert.
SHAPES = {"14B": (5120, 13824), "7B": (3584, 18944)}
KERNELS = ("swiglu", "down")
# Rows of a matrix that are run: what a weight costs does not depend on their number.
ROWS = 64
MLX_GROUP = 128


@dataclass(frozen=True)
class Figures:
    """What a weight costs: cycles of a lane on each pipe, bytes read, load instructions."""

    main: float
    second: float
    bytes: float
    loads: float
    private: bool  # whether an array of a thread is in memory

    @property
    def cycles(self) -> float:
        """Main-pipe plus half of second-pipe cycles."""
        return self.main + self.second / 2


@dataclass(frozen=True)
class Chip:
    """What the model of a chip takes: GB/s, GPU cores and their clock in GHz."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    def picoseconds(self, figures: Figures, overlapping: bool) -> float:
        """For a weight: memory or arithmetic, whichever takes longer.

        A core has four schedulers, each of which issues an instruction for 32 lanes in a cycle.
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
    """A decode kernel's figures for one token with two experts."""
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
    """MLX's own gathered 2-bit product, float16 throughout, in the same harness."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (2, ROWS, wide // 16), dtype=np.uint32)
    scales = mx.ones((2, ROWS, wide // MLX_GROUP), mx.float16)
    x, pair = mx.random.normal((1, wide)).astype(mx.float16), mx.array([[0, 1]], mx.uint32)
    found = gather_qmv(x, mx.array(codes), scales, -scales, pair, group_size=MLX_GROUP, bits=2)
    cost = found.cost.per_weight(found.weights, ("w", "scales", "biases"))
    return Figures(cost.main, cost.second, cost.bytes, cost.loads, False)
