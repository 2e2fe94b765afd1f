"""Modelled times of a layer's routed experts for several tokens: decoded in blocks, or converted.

Tokens choose their experts at random, so the times are expected values. The time of a launch is
that of its bytes or of its cycles (main pipe plus half of the second), whichever is longer. Bytes
of an expert count once for each block of its pairs, as if no cache kept them.
"""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kernels.costs import MLX_GROUP, ROWS, SHAPES, Chip, Figures, ours, random_rows
from kernels.costs_blocks import block_cost
from kernels.emulator import virtual_metal
from kernels.emulator.mlx_kernels import TILE_PAIRS, gather_qmm
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.costs import pairs_in_a_block, pairs_of_an_expert
from outlier_mlx.runtime.kernels import VARIANTS, block_variant, tq1_0_to_affine2

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Numbers of experts of a layer, and of those that a token uses.
ROUTINGS = ((8, 2), (8, 8), (64, 2), (64, 8))
# Cycles per weight (main plus half of second, the same prices) of the first kernels, which
# multiplied one pair at a time and decoded into the exponent of a half.
FIRST_CYCLES = {
    ("14B", "swiglu"): 2.786 + 0.332 / 2,
    ("14B", "down"): 2.912 + 0.233 / 2,
    ("7B", "swiglu"): 3.022 + 0.407 / 2,
    ("7B", "down"): 2.892 + 0.224 / 2,
}


@dataclass(frozen=True)
class Work:
    """Cycles of lanes (main plus half of second), and bytes from or to memory."""

    cycles: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.cycles + other.cycles, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.cycles * factor, self.bytes * factor)

    def seconds(self, chip: Chip) -> float:
        """Time on all cores: that of memory or of arithmetic, whichever is longer."""
        lanes = chip.cores * 128 * chip.clock  # lane-cycles a nanosecond
        return 1e-9 * max(self.bytes / chip.bandwidth, self.cycles / lanes)


def block(kernel: str, wide: int, size: int, pairs: int) -> Figures:
    """Cost per weight of a decode kernel's block of pairs of one expert.

    Args:
        kernel: "swiglu" with x in float16, or "down" with its float32.
        wide: columns of its matrices.
        size: most pairs of a block; 1: pairs one by one.
        pairs: pairs of this block.
    """
    if size == 1:
        return ours(kernel, wide, VARIANTS[f"tq1_0_{kernel}"])
    return block_cost(kernel, wide, size, pairs, mx.float32 if kernel == "down" else mx.float16)


def block_cycles(size: int, pairs: int, shape: str = "14B") -> float:
    """What `runtime/costs.py` says of a block: the mean of gate, up and down, of whole cores.

    Arithmetic with four independent instructions in a row needs 13 simdgroups on a core to be as
    fast as its price (metal-benchmarks measured 1.60 cycles for an fma with 8 of them).
    """
    total = 0.0
    for kernel, name, matrices in (("swiglu", "swiglu", 2), ("down", "qmv", 1)):
        found = block(kernel, SHAPES[shape][kernel], size, pairs)
        group = 2 if size == 1 else block_variant(f"tq1_0_{name}", size, mx.float16).simdgroups
        resident = found.threads // (32 * group) * group
        total += matrices / 3 * found.cycles * max(1.0, 13 / resident if size > 1 else 1.0)
    return total


@cache
def tile(wide: int) -> Work:
    """A weight's part of a tile of MLX's matrix kernel in float32, with 1 to 16 pairs."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (1, ROWS, wide // 16), dtype=np.uint32)
    scales = mx.ones((1, ROWS, wide // MLX_GROUP))
    x, experts = mx.zeros((TILE_PAIRS, wide)), mx.zeros(TILE_PAIRS, mx.uint32)
    found = gather_qmm(x, mx.array(codes), scales, -scales, experts, group_size=MLX_GROUP, bits=2)
    cost = found.cost.per_weight(ROWS * wide, ("w", "scales", "biases"))
    return Work(cost.main + cost.second / 2, cost.bytes)


@cache
def conversion(wide: int) -> Work:
    """A weight's part of its conversion, with a scale and a bias written for each group."""
    with virtual_metal() as metal:
        tq1_0_to_affine2(random_rows(1, ROWS, wide), wide)
    cost = metal.launches[0].cost
    found = cost.per_weight(ROWS * wide)
    written = sum(cost.written.values()) / (ROWS * wide) + 2 * 4 / MLX_GROUP
    return Work(found.main + found.second / 2, found.bytes + written)


@dataclass(frozen=True)
class Layer:
    """The routed experts of a layer, and the tokens that use them.

    Attributes:
        shape: a name in `SHAPES`.
        tokens: number of tokens.
        experts: number of experts.
        k: experts that a token uses.
        balanced: whether every expert has as many pairs as any other, instead of a random number.
    """

    shape: str
    tokens: int
    experts: int
    k: int
    balanced: bool = False

    @property
    def size(self) -> int:
        """The chosen number of pairs in a block; 0: experts are converted."""
        return pairs_in_a_block(self.tokens, self.experts, self.k, sum(self.weights.values()))

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden size, and width of an expert."""
        return SHAPES[self.shape]["swiglu"], SHAPES[self.shape]["down"]

    @property
    def weights(self) -> dict[str, int]:
        """Weights of an expert by kernel."""
        hidden, width = self.sizes
        return {"swiglu": 2 * hidden * width, "down": hidden * width}

    @property
    def runs(self) -> dict[int, float]:
        """The expected numbers of experts with so many pairs."""
        if self.balanced:
            each, more = divmod(self.tokens * self.k, self.experts)
            return {each: self.experts - more, each + 1: more}
        likely = pairs_of_an_expert(self.tokens, self.experts, self.k)
        return {pairs: self.experts * chance for pairs, chance in likely.items()}

    def first(self, chip: Chip) -> float:
        """Seconds that the first kernels took, or the conversion that they left many pairs to."""
        pairs = self.tokens * self.k
        if pairs >= max(64, TILE_PAIRS * self.experts):
            return self.converted(chip)
        total = 0.0
        for kernel, weights in self.weights.items():
            wide = SHAPES[self.shape][kernel]
            pair = Work(FIRST_CYCLES[self.shape, kernel], row_bytes(wide) / wide) * weights
            total += ((pair + Work(0, self._activations[kernel])) * pairs).seconds(chip)
        return total

    def now(self, chip: Chip) -> float:
        """Seconds in the way that is chosen."""
        return self.decoded(self.size, chip) if self.size else self.converted(chip)

    def decoded(self, size: int, chip: Chip) -> float:
        """Seconds if the decode kernels multiply blocks of up to `size` pairs."""
        total, pairs = 0.0, self.tokens * self.k
        for kernel, weights in self.weights.items():
            wide, work = SHAPES[self.shape][kernel], Work()
            for run, experts in self.runs.items():
                whole, rest = divmod(run, size)
                for full, times in ((size, whole), (rest, 1)):
                    if full and times:
                        cycles = block(kernel, wide, size, full).cycles
                        work += Work(cycles, row_bytes(wide) / wide) * (times * experts)
            moved = self._activations[kernel] * pairs
            if kernel == "down" and size > 1:  # products of pairs, written and read
                moved += 8 * self.sizes[0] * pairs
            total += (work * weights + Work(0, moved)).seconds(chip)
        return total

    def converted(self, chip: Chip) -> float:
        """Seconds if all experts are converted, and MLX's matrix kernel multiplies them."""
        hidden, width = self.sizes
        tiles = sum(-(-run // TILE_PAIRS) * experts for run, experts in self.runs.items())
        # Bytes of a pair: x is sorted in float32 and read twice; gate and up are written, read and
        # written as their product, which is read; the result is written, sorted back and summed.
        moved = hidden * (2 + 4 + 8) + width * (8 + 8 + 4 + 4) + hidden * (4 + 8 + 4)
        total = Work(0, moved * self.tokens * self.k).seconds(chip)
        for kernel, weights in self.weights.items():
            wide = SHAPES[self.shape][kernel]
            total += (conversion(wide) * (self.experts * weights)).seconds(chip)
            total += (tile(wide) * (tiles * weights)).seconds(chip)
        return total

    @property
    def _activations(self) -> dict[str, int]:
        """Bytes that the decode kernels read and write for a pair."""
        hidden, width = self.sizes
        return {"swiglu": 2 * hidden + 4 * width, "down": 4 * width}
