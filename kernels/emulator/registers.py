"""Estimates the registers of a thread: values that live at the widest point of a kernel.

Within each basic block, a greedy schedule from the last instruction to the first takes the one that
leaves the fewest registers alive; loads and stores keep their order. It is used if it needs fewer
registers than the order that LLVM has left. This is what Mesa's compiler for these GPUs does
(src/asahi/compiler/agx_pressure_schedule.c); docs/emulator.md compares with what it needed.
"""

from collections import Counter
from dataclasses import dataclass

from . import ir
from .flow import Flow
from .values import Values

# Most 16-bit registers of a thread, and the threads of a core that then fit
# (src/asahi/compiler/agx_performance.c in Mesa).
OCCUPANCY = (
    (104, 1024), (112, 896), (128, 832), (136, 768), (144, 704), (160, 640), (184, 576),
    (208, 512), (232, 448), (256, 384),
)  # fmt: skip
# What a kernel needs beyond its live values: nesting of branches, alignment, moves. Constant over
# the kernels of known machine code with strided rows.
UNSEEN = 9
_ORDERED = ("load", "store", "barrier", "atomic")


def threads(registers: int) -> int:
    """How many threads a core holds, if each has so many registers.

    More registers than 256 do not exist: values then spill to memory.
    """
    return next((n for most, n in OCCUPANCY if registers <= most), OCCUPANCY[-1][1])


def registers(values: Values) -> int:
    """Estimates the 16-bit registers of a thread from the values of a kernel."""
    return _Estimate(values).widest() + UNSEEN


@dataclass(frozen=True)
class _Step:
    """An issued instruction: the registers that it reads and writes; whether it has to keep its
    order with others of its kind."""

    read: set[int]
    written: set[int]
    ordered: bool


class _Estimate:
    def __init__(self, values: Values) -> None:
        self.values = values
        self.blocks = values.function.blocks
        self.flow = Flow(values.function)
        self.steps = [self._steps(block) for block in self.blocks]

    def _steps(self, block: ir.Block) -> list[_Step]:
        found = []
        for i in block.instructions:
            if i.opcode == "phi" or (i.result and i.result not in self.values.issued):
                continue
            kinds = self.values.kinds[id(i)]
            ordered = any(word in kind for kind in kinds for word in _ORDERED)
            found.append(_Step(self.values.read(i), self.values.written(i), ordered))
        return found

    def widest(self) -> int:
        """The largest number of registers that live at the same time."""
        return max(
            min(_pressure(steps, live), _pressure(_scheduled(steps, live), live))
            for steps, live in zip(self.steps, self._liveness(), strict=True)
        )

    def _liveness(self) -> list[set[int]]:
        """The registers that are needed after each block."""
        blocks = self.blocks
        phis: list[set[int]] = [set() for _ in blocks]
        passed: list[dict[int, set[int]]] = [{} for _ in blocks]  # by successor
        for n, block in enumerate(blocks):
            for i in block.instructions:
                if i.opcode != "phi":
                    break
                phis[n] |= self.values.written(i)
                for value, label in ir.incoming(i):
                    source = self.flow.block(label)
                    passed[source].setdefault(n, set()).update(self.values.all(value))
        live_in: list[set[int]] = [set() for _ in blocks]
        live_out: list[set[int]] = [set() for _ in blocks]
        changed = True
        while changed:
            changed = False
            for n in reversed(range(len(blocks))):
                live = set[int]()
                for target in self.flow.successors[n]:
                    live |= live_in[target] - phis[target]
                    live |= passed[n].get(target, set())
                live_out[n] = live
                for step in reversed(self.steps[n]):
                    live = (live - step.written) | step.read
                if live != live_in[n]:
                    live_in[n], changed = live, True
        return live_out


def _pressure(steps: list[_Step], live: set[int]) -> int:
    """The most registers that live at the same time within a block."""
    live = set(live)
    most = len(live)
    for step in reversed(steps):
        most = max(most, len(live | step.written))
        live = (live - step.written) | step.read
        most = max(most, len(live))
    return most


def _scheduled(steps: list[_Step], live: set[int]) -> list[_Step]:
    """A block's instructions in an order that is chosen from the end, greedily."""
    if not steps:
        return steps
    *body, last = steps  # the last one ends the block
    before = _dependences(body)
    waiting = Counter(n for sources in before for n in sources)  # instructions that come after
    ready = [n for n in range(len(body)) if not waiting[n]]
    live = (live - last.written) | last.read
    order = [last]
    while ready:
        n = min(ready, key=lambda k: _change(body[k], live))
        ready.remove(n)
        live = (live - body[n].written) | body[n].read
        order.append(body[n])
        waiting.subtract(before[n])
        ready += sorted(source for source in before[n] if not waiting[source])
    return order[::-1]


def _change(step: _Step, live: set[int]) -> int:
    """How many more registers live before an instruction than after it."""
    return len(step.read - live) - len(step.written & live)


def _dependences(steps: list[_Step]) -> list[set[int]]:
    """For each instruction of a block, those that it has to come after."""
    found: list[set[int]] = []
    made: dict[int, int] = {}
    previous: int | None = None
    for n, step in enumerate(steps):
        before = {made[register] for register in step.read if register in made}
        if step.ordered:
            before |= {previous} if previous is not None else set()
            previous = n
        made |= dict.fromkeys(step.written, n)
        found.append(before)
    return found
