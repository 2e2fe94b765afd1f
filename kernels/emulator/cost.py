"""The cost of a launch: bytes by buffer, instructions by class, cycles by pipe."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from . import ir
from .classify import classify
from .flow import Flow
from .kernel import CompiledKernel
from .launch import Counts
from .registers import registers, threads
from .trace import Access, Origins, accesses
from .values import Values

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
# Bytes of an instruction in machine code. Classes that stand for a sequence have more of them.
BYTES = {"bitwise": 6, "branch": 6, "barrier": 2}
USUAL_BYTES = 8


def code_bytes(kind: str) -> int:
    """Estimates the bytes of machine code of one instruction of a class."""
    cycles = TABLE[kind]
    return BYTES.get(kind, USUAL_BYTES) * max(1, round(cycles.main + cycles.second / 4))


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
        registers: estimated 16-bit registers of a thread; of several launches, the most.
        loop_bytes: estimated bytes of machine code of the largest innermost loop, 0 without one;
            of several launches, the most.
        launches: number of launches.
    """

    instructions: dict[str, int]
    read: dict[str, int]
    written: dict[str, int]
    requested: dict[str, int]
    loads: dict[str, int]
    registers: int
    loop_bytes: int
    launches: int = 1

    @property
    def threads(self) -> int:
        """How many threads a core holds with that many registers each."""
        return threads(self.registers)

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
            max(self.registers, other.registers),
            max(self.loop_bytes, other.loop_bytes),
            self.launches + other.launches,
        )


@dataclass(frozen=True)
class _Code:
    """What is known about a kernel before it runs."""

    kinds: dict[int, Counter[str]]  # by block: its instructions by class
    accesses: dict[int, list[Access]]  # by block
    registers: int
    loop_bytes: int


@cache
def _code(kernel: CompiledKernel) -> _Code:
    kinds: dict[int, Counter[str]] = {}
    touched: dict[int, list[Access]] = {}
    most_registers = loop_bytes = 0
    for function in ir.Module(kernel.ir).functions:
        origins = Origins(function)
        classes = classify(function, origins)
        values = Values(function, origins, classes)
        for i in function:
            if i.result in values.uniform:  # computed once, before the launch
                classes[id(i)] = Counter()
        for block in function.blocks:
            counters = (classes[id(i)] for i in block.instructions)
            kinds[block.number] = sum(counters, Counter[str]())
            touched[block.number] = [a for i in block.instructions for a in accesses(i, origins)]
        for loop in Flow(function).innermost_loops():
            whole = sum((kinds[function.blocks[n].number] for n in loop), Counter[str]())
            loop_bytes = max(loop_bytes, sum(code_bytes(kind) * n for kind, n in whole.items()))
        most_registers = max(most_registers, registers(values))
    return _Code(kinds, touched, most_registers, loop_bytes)


def price(kernel: CompiledKernel, counts: Counts) -> Cost:
    """Computes the cost of a launch from its basic blocks and their numbers of runs."""
    code = _code(kernel)
    names = {p.buffer: p.name for p in kernel.signature.buffers}
    instructions: Counter[str] = Counter()
    requested: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    for number, kinds in code.kinds.items():
        issued, executed = int(counts.issued[number]), int(counts.executed[number])
        for kind, n in kinds.items():
            instructions[kind] += n * issued
        for access in code.accesses[number]:
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
        registers=code.registers,
        loop_bytes=code.loop_bytes,
    )
