"""Modelled time of a decoding step of ternary models: ours, and with MLX's 2-bit kernels.

Only products with ternary matrices, and rotations of their inputs, are counted; all else is the
same in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kernels.costs import MLX_GROUP, ROWS, Chip, Figures, figures_of
from kernels.costs_dense import linear, rotation
from kernels.emulator.mlx_kernels import qmv


@dataclass(frozen=True)
class Hybrid:
    """Dimensions of a Qwen3.5: three of four layers are gated delta nets.

    Attributes:
        name: how the table calls it.
        hidden: width of the residual stream.
        width: width of the FFN.
        layers: number of layers.
        heads: attention heads of 256.
        kv_heads: those of keys and values.
        values: value heads of a delta net, of 128; there are 16 key heads.
        tied: whether the head is the embedding.
        block: of the rotations.
        vocab: tokens.
    """

    name: str
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    values: int
    tied: bool
    block: int
    vocab: int = 248320

    def matrices(self) -> Iterator[tuple[int, int, int]]:
        """(count, out, in) of the ternary matrices that a token is multiplied with."""
        full, hidden, width = self.layers // 4, self.hidden, self.width
        nets, inner, mixed = self.layers - full, 128 * self.values, 256 * self.heads
        yield nets, 2 * 16 * 128 + inner, hidden  # in_proj_qkv
        yield nets, inner, hidden  # in_proj_z
        yield nets, hidden, inner  # out_proj
        yield full, 2 * mixed + 2 * 256 * self.kv_heads, hidden  # queries with gates; keys, values
        yield full, hidden, mixed
        yield 2 * self.layers, width, hidden
        yield self.layers, hidden, width
        yield 1, self.vocab, hidden  # the head

    @property
    def rotations(self) -> tuple[int, int]:
        """Rotations in a step: here, one for each input; and in mlx-lm, one for each matrix."""
        full = self.layers // 4
        return 4 * self.layers + 2, 6 * (self.layers - full) + 7 * full + 2


#: The 27B's dimensions are those whose sum is the published number of ternary weights; those of the
#: smaller ones are Qwen3.5's as its model cards have them, as far as they could be read, and their
#: blocks follow from the widths.
MODELS = (
    Hybrid("2B", 2048, 6144, 24, 8, 2, 16, True, 2048),
    Hybrid("4B", 2560, 9216, 32, 16, 4, 32, True, 512),
    Hybrid("9B", 4096, 12288, 32, 16, 4, 32, False, 4096),
    Hybrid("27B", 5120, 17408, 64, 24, 4, 48, False, 1024),
)


@dataclass(frozen=True)
class Step:
    """Modelled milliseconds of a decoding step: products, and all rotations."""

    products: float
    rotations: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.rotations


def steps(model: Hybrid, chip: Chip, overlapping: bool) -> tuple[Step, Step]:
    """Ours and MLX's. A rotation of mlx-lm is priced like ours, though it is several launches."""
    ours = theirs = 0.0
    for count, out, wide in model.matrices():
        ours += count * out * wide * chip.picoseconds(linear(wide, MLX_GROUP, 1), overlapping)
        theirs += count * out * wide * chip.picoseconds(mlx_linear(wide), overlapping)
    # Blocks are few: the time of each is that of its threads on one scheduler of one core.
    found = rotation(model.block)
    pipes = found.main, found.second
    cycles = (max(pipes) if overlapping else sum(pipes)) * model.block / 32
    here, there = (number * cycles / chip.clock / 1e6 for number in model.rotations)
    return Step(ours / 1e9, here), Step(theirs / 1e9, there)


@cache
def mlx_linear(wide: int) -> Figures:
    """Cost of MLX's own 2-bit product in float16 for a weight."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (ROWS, wide // 16), dtype=np.uint32)
    scales = mx.ones((ROWS, wide // MLX_GROUP), mx.float16)
    x = mx.random.normal((1, wide)).astype(mx.float16)
    found = qmv(x, mx.array(codes), scales, -scales, group_size=MLX_GROUP, bits=2)
    return figures_of(found.cost, found.weights, ("w", "scales", "biases"))
