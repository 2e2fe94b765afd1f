"""Costs of the routing kernels, counted by the emulator, and lower bounds of their time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from unittest.mock import patch

import mlx.core as mx

from kernels.costs import Chip
from kernels.emulator import virtual_metal
from outlier_mlx.runtime import routing

# What a core takes from outside in a cycle: github.com/philipturner/metal-benchmarks, "I/O bus".
BUS_BYTES = 32
SCHEDULERS = 4
# Tokens to run: each threadgroup has as many, and every one costs the same.
TOKENS = routing.ROUTER_TOKENS


@dataclass(frozen=True)
class Group:
    """What one threadgroup of a launch costs, and how many there are.

    Attributes:
        name: the kernel.
        count: threadgroups for `TOKENS` tokens, or for one.
        main: cycles of all its simdgroups on the main pipe.
        second: the same on the second pipe.
        bytes: bytes that it reads.
        registers: estimated 16-bit registers of a thread.
    """

    name: str
    count: int
    main: float
    second: float
    bytes: float
    registers: int

    def microseconds(self, chip: Chip, groups: int) -> float:
        """Time of a launch of so many groups: of what a core reads, or of its arithmetic."""
        cycles = max(self.bytes / BUS_BYTES, (self.main + self.second) / SCHEDULERS)
        return ceil(groups / chip.cores) * cycles / chip.clock / 1000


@cache
def launched(
    hidden: int, experts: int, top_k: int, tokens: int, together: bool = False
) -> tuple[Group, ...]:
    """The launches that route 1 or `TOKENS` float16 tokens through a float32 router.

    Args:
        hidden: width of a token.
        experts: experts of the router.
        top_k: experts of a token.
        tokens: 1 or `TOKENS`.
        together: one threadgroup reads the router, whatever its size.
    """
    # Always the same draw: in one of 200, all experts of a token are in one register of the lanes,
    # and nothing is written from the other.
    keys = mx.random.split(mx.random.key(0))
    x = mx.random.normal((tokens, hidden), key=keys[0]).astype(mx.float16)
    router, alpha = mx.random.normal((experts, hidden), key=keys[1]), mx.ones((experts,))
    most = router.nbytes if together else routing.LARGEST_SHARED
    with virtual_metal() as metal, patch.object(routing, "LARGEST_SHARED", most):
        routing.tq1_0_route(x, router, alpha, k=top_k)
    found = []
    for launch in metal.launches:
        cost, size = launch.cost, launch.threadgroup[0]
        count = launch.grid[0] // size * launch.grid[1]
        # Each threadgroup reads all of x, and its own part of the router.
        read = cost.read["x"] + cost.read["router"] / (count if len(metal.launches) > 1 else 1)
        main, second = (cycles / count for cycles in cost.cycles)
        found.append(Group(launch.name, count, main, second, read, cost.registers))
    return tuple(found)


def rows(chip: Chip, hidden: int) -> Iterator[list[str]]:
    """Lines of the page's table: numbers for one token, and times for some numbers of tokens."""
    for experts, top_k, together in ((8, 2, False), (64, 8, True), (64, 8, False)):
        one = launched(hidden, experts, top_k, 1, together)
        several = launched(hidden, experts, top_k, TOKENS, together)
        for alone, group in zip(one, several, strict=True):
            times = [alone.microseconds(chip, alone.count)]
            times += [group.microseconds(chip, group.count * n // TOKENS) for n in (32, 512)]
            name = f"`{alone.name}`, {experts} experts" + (", one threadgroup" if together else "")
            numbers = [alone.count, round(alone.main * alone.count)]
            numbers += [round(alone.second * alone.count), round(alone.bytes), group.registers]
            yield [name, *map(str, numbers), *(f"{t:.1f}" for t in times)]
