"""The cost of a launch: bytes by buffer, instructions by class, cycles by pipe."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from . import ir
from .classify import classify
from .kernel import CompiledKernel
from .launch import Counts
from .trace import Origins, accesses

LANES = 32


class Cycles(NamedTuple):
    """Issue cycles of one instruction for a simdgroup, on each pipe."""

    main: float = 0.0
    second: float = 0.0


# Throughputs of the M1 and M2 from github.com/philipturner/metal-benchmarks. The main pipe executes
# float and integer additions, float multiplications, bitwise operations, compares and selects; the
# second ("integer and complex math") executes the rest. An operation without a figure there has the
# price of an equivalent sequence of operations; docs/emulator.md lists these.
TABLE: dict[str, Cycles] = {
    "float arithmetic": Cycles(main=1),
    "float compare or select": Cycles(main=1),
    "integer add": Cycles(main=1),
    "integer add, 64 bits": Cycles(main=4),
    "bitwise": Cycles(main=1),
    "integer compare or select": Cycles(main=1),
    "branch": Cycles(main=1),
    "address": Cycles(main=1),
    "move or convert a float": Cycles(main=1),
    "unpack merged bytes": Cycles(main=3),
    "round to bfloat": Cycles(main=5),
    "integer multiply": Cycles(second=4),
    "integer multiply, 32 x 32 to 64 bits": Cycles(second=8),
    "integer multiply, 64 bits": Cycles(second=16),
    "shift": Cycles(second=4),
    "shift, 64 bits": Cycles(second=8),
    "bit count or reversal": Cycles(second=4),
    "integer to float or back": Cycles(second=4),
    "round to integer": Cycles(second=4),
    "integer divide by a constant": Cycles(main=2, second=12),
    "integer divide": Cycles(main=20, second=32),
    "float divide": Cycles(second=30),
    "half divide": Cycles(main=1, second=6),
    "square root": Cycles(second=15),
    "reciprocal square root": Cycles(second=8),
    "exp or log": Cycles(main=1, second=4),
    "exp2 or log2": Cycles(second=4),
    "sine or cosine": Cycles(second=24),
    "power": Cycles(main=1, second=8),
    "tanh": Cycles(main=4, second=14),
    "other function": Cycles(main=20, second=12),
    "simd reduction": Cycles(second=15),
    "simd prefix": Cycles(second=12),
    "simd shuffle": Cycles(second=2),
    "quad reduction": Cycles(second=6),
    "simdgroup matrix multiply": Cycles(main=20),
    "barrier": Cycles(),
    "device load": Cycles(),
    "device store": Cycles(),
    "constant load": Cycles(),
    "threadgroup load": Cycles(),
    "threadgroup store": Cycles(),
    "private load": Cycles(),
    "private store": Cycles(),
    "atomic": Cycles(),
    "unknown": Cycles(main=1),
}


class PerWeight(NamedTuple):
    """A launch's cost divided by a number of weights."""

    main: float  # cycles of the main pipe for one lane
    second: float  # cycles of the second pipe
    bytes: float  # different bytes read from the chosen buffers
    loads: float  # load instructions from device memory


@dataclass(frozen=True)
class Cost:
    """The cost of a launch, or the sum of several.

    Attributes:
        instructions: number of instructions that simdgroups issued, by class. A vector operation
            counts once for each component. If lanes of a simdgroup take both sides of a branch,
            both count.
        read: number of different bytes read, by buffer.
        written: number of different bytes written, by buffer.
        requested: number of bytes that all threads read, including repeats, by buffer.
        loads: number of load instructions that simdgroups issued, by buffer.
        launches: number of launches.
    """

    instructions: dict[str, int]
    read: dict[str, int]
    written: dict[str, int]
    requested: dict[str, int]
    loads: dict[str, int]
    launches: int = 1

    @property
    def cycles(self) -> Cycles:
        """Issue cycles on each pipe, summed over simdgroups."""
        return Cycles(
            sum(TABLE[kind].main * n for kind, n in self.instructions.items()),
            sum(TABLE[kind].second * n for kind, n in self.instructions.items()),
        )

    def per_weight(self, weights: int, buffers: tuple[str, ...] | None = None) -> PerWeight:
        """Divides the cost by a number of weights.

        Args:
            weights: number of weights that the launch used.
            buffers: buffers that count as weight bytes; default: all that were read.
        """
        cycles = self.cycles
        names = self.read if buffers is None else buffers
        return PerWeight(
            cycles.main * LANES / weights,
            cycles.second * LANES / weights,
            sum(self.read[name] for name in names) / weights,
            self.instructions.get("device load", 0) * LANES / weights,
        )

    def __add__(self, other: "Cost") -> "Cost":
        def both(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
            return dict(Counter(one) + Counter(two))

        return Cost(
            both(self.instructions, other.instructions),
            both(self.read, other.read),
            both(self.written, other.written),
            both(self.requested, other.requested),
            both(self.loads, other.loads),
            self.launches + other.launches,
        )


def price(kernel: CompiledKernel, counts: Counts) -> Cost:
    """Computes the cost of a launch from its basic blocks and their numbers of runs."""
    module = ir.Module(kernel.ir)
    names = {p.buffer: p.name for p in kernel.signature.buffers}
    instructions: Counter[str] = Counter()
    requested: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    for function in module.functions:
        origins = Origins(function)
        kinds = classify(function, origins)
        for block in function.blocks:
            issued, executed = int(counts.issued[block.number]), int(counts.executed[block.number])
            for instruction in block.instructions:
                for kind, n in kinds[id(instruction)].items():
                    instructions[kind] += n * issued
                for access in accesses(instruction, origins):
                    if access.origin and access.origin.kind == "buffer" and not access.write:
                        name = names[access.origin.index]
                        requested[name] += access.bytes * executed
                        loads[name] += issued
    return Cost(
        instructions={kind: n for kind, n in sorted(instructions.items()) if n},
        read={names[i]: n for i, n in counts.read.items()},
        written={names[i]: n for i, n in counts.written.items()},
        requested=dict(requested),
        loads=dict(loads),
    )
