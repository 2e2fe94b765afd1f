"""Runs a compiled kernel twice, in two thread orders and two memory layouts, and compares."""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import errors, runtime
from .kernel import CompiledKernel, Facts

Size = tuple[int, int, int]

# Codes of runtime.cpp.
_MEMORY, _MISALIGNED, _DIVERGED, _BARRIER, _ARITHMETIC, _NO_LANE = range(1, 7)
_SPINNING, _STACK, _FAR_AWAY = range(7, 10)
_AT_SIMD, _AT_BARRIER, _DONE = 1, 2, 3
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Buffer:
    """The first content of a kernel's buffer.

    Attributes:
        data: bytes, uint8.
        written: whether the kernel may write to it.
        item: size of one element in bytes, for messages.
        before: the kernel gets an address that is this many bytes before the data.
    """

    data: np.ndarray
    written: bool = False
    item: int = 1
    before: int = 0


@dataclass
class Counts:
    """Numbers of runs of basic blocks, and of bytes touched."""

    issued: np.ndarray  # uint64 per block: runs by simdgroups (those of the busiest lane)
    executed: np.ndarray  # uint64 per block: runs by threads
    read: dict[int, int] = field(default_factory=dict)  # different bytes read, by buffer
    written: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The final content of the buffers that a launch may write, and its counts."""

    outputs: dict[int, np.ndarray]
    counts: Counts | None


def check_sizes(name: str, grid: Sequence[int], threadgroup: Sequence[int]) -> tuple[Size, Size]:
    """Checks grid and threadgroup; returns the sizes that Metal would use.

    Raises:
        LaunchError: not three positive numbers each, or more than 1024 threads in a threadgroup.
    """
    for what, size in (("grid", grid), ("threadgroup", threadgroup)):
        if len(size) != 3 or min(size) < 1:
            raise errors.LaunchError(f"{name}: {what} {tuple(size)} must be three numbers above 0")
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > runtime.MAX_THREADS:
        raise errors.LaunchError(
            f"{name}: a threadgroup of {threads} threads; Metal allows {runtime.MAX_THREADS}"
        )
    clamped = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
    return (grid[0], grid[1], grid[2]), (clamped[0], clamped[1], clamped[2])


def run(
    kernel: CompiledKernel,
    buffers: Sequence[Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    count: bool,
) -> Outcome:
    """Runs a kernel over a grid.

    The first run takes threads in ascending order and runs each as far as possible; every buffer
    begins at the start of its pages. The second run takes them in descending order and stops every
    thread before each write until the other threads of the threadgroup have also reached a write or
    a wait; every buffer ends at the end of its pages. Both must leave the same bits in every buffer
    that may be written.

    Args:
        kernel: the kernel.
        buffers: buffers in the order of the signature.
        grid: threads in x, y and z.
        threadgroup: threads of a threadgroup in x, y and z.
        count: whether the second run counts.

    Raises:
        EmulatorError: the kernel makes a mistake; the subclass says which.
    """
    name = kernel.signature.name
    grid, threadgroup = check_sizes(name, grid, threadgroup)
    if len(buffers) > runtime.MAX_BUFFERS:
        raise errors.LaunchError(f"{name}: more than {runtime.MAX_BUFFERS} buffers")
    with _one_at_a_time:
        first, _ = _run_once(kernel, buffers, grid, threadgroup, second=False, count=count)
        second, counts = _run_once(kernel, buffers, grid, threadgroup, second=True, count=count)
    facts = kernel.library(count)[1]
    for index, one in first.items():
        _compare(kernel, facts, index, buffers[index].item, one, second[index])
    return Outcome(first, counts)


def _run_once(
    kernel: CompiledKernel,
    buffers: Sequence[Buffer],
    grid: Size,
    threadgroup: Size,
    second: bool,
    count: bool,
) -> tuple[dict[int, np.ndarray], Counts | None]:
    path, facts = kernel.library(count)
    names = {p.buffer: p.name for p in kernel.signature.buffers}
    sizes = [(names.get(i, f"buffer {i}"), b.data.size) for i, b in enumerate(buffers)]
    first_array = len(sizes)
    arrays = max(facts.arrays, default=-1) + 1
    sizes += [(f"threadgroup array {i}", facts.arrays.get(i, 0)) for i in range(arrays)]
    counts = None
    with runtime.Arena(sizes, at_end=second, shadow=count) as arena:
        for index, buffer in enumerate(buffers):
            arena.bytes(index)[:] = buffer.data
            if not buffer.written:
                arena.make_read_only(index)
        bases = [r.base - b.before for r, b in zip(arena.regions, buffers, strict=False)]
        runtime.set_globals(arena, bases, check_alignment=not second)
        array_regions = arena.regions[first_array:]
        bases_of = (ctypes.c_void_p * max(arrays, 1))(*(r.base for r in array_regions))
        bytes_of = (ctypes.c_uint64 * max(arrays, 1))(*(r.bytes for r in array_regions))
        if count:
            counts = Counts(np.zeros(facts.blocks, np.uint64), np.zeros(facts.blocks, np.uint64))
        job = runtime.Job(
            entry=runtime.entry_point(path),
            grid=grid,
            group=threadgroup,
            second=second,
            fibers=facts.waits,
            blocks=facts.blocks if counts else 0,
            arrays=arrays,
            issued=counts.issued.ctypes.data if counts else None,
            executed=counts.executed.ctypes.data if counts else None,
            array_base=ctypes.addressof(bases_of),
            array_bytes=ctypes.addressof(bytes_of),
        )
        fault = runtime.Fault()
        if runtime.library().emu_run(ctypes.byref(job), ctypes.byref(fault)):
            raise _explain(kernel, facts, fault, arena)
        outputs = {i: arena.bytes(i).copy() for i, b in enumerate(buffers) if b.written}
        if counts:
            for index in range(len(buffers)):
                counts.read[index] = arena.touched(index, write=False)
                counts.written[index] = arena.touched(index, write=True)
    return outputs, counts


def _compare(
    kernel: CompiledKernel, facts: Facts, index: int, item: int, one: np.ndarray, two: np.ndarray
) -> None:
    if np.array_equal(one, two) or facts.float_atomics:
        return
    at = int(np.flatnonzero(one != two)[0]) // item
    name = next(p.name for p in kernel.signature.buffers if p.buffer == index)
    values = [x[at * item : (at + 1) * item].tobytes().hex() for x in (one, two)]
    raise errors.RaceError(
        f"{kernel.signature.name}: {name}[{at}] depends on the order of threads: "
        f"its bytes are {values[0]} in one order and {values[1]} in the other"
    )


def _explain(
    kernel: CompiledKernel, facts: Facts, fault: runtime.Fault, arena: runtime.Arena
) -> errors.EmulatorError:
    name = kernel.signature.name
    thread = f"thread {tuple(fault.thread)} of threadgroup {tuple(fault.threadgroup)}"
    if fault.code in (_MEMORY, _MISALIGNED, _FAR_AWAY):
        verb = ("read", "wrote", "accessed")[2 if fault.code == _FAR_AWAY else fault.write]
        region = next((r for r in arena.regions if fault.address in r), None)
        if region is None:
            nearest = min(arena.regions, key=lambda r: abs(fault.address - r.base))
            return errors.OutOfBounds(
                f"{name}: {thread} {verb} memory far from any buffer, at byte "
                f"{fault.address - nearest.base} of {nearest.name}"
                f"{_line(kernel, facts, fault.place)}"
            )
        offset = fault.address - region.base
        if fault.code == _MISALIGNED:
            return errors.Misaligned(
                f"{name}: {thread} accessed {region.name} at byte {offset}, which is not a "
                f"multiple of the type's alignment{_line(kernel, facts, fault.place)}"
            )
        if 0 <= offset < region.bytes:
            return errors.OutOfBounds(
                f"{name}: {thread} wrote the input {region.name} at byte {offset}"
            )
        return errors.OutOfBounds(
            f"{name}: {thread} {verb} {region.name} at byte {offset}; it has {region.bytes} bytes"
        )
    if fault.code == _STACK:
        return errors.OutOfBounds(
            f"{name}: {thread} uses more private memory than the emulator has"
        )
    if fault.code == _ARITHMETIC:
        return errors.ArithmeticFault(f"{name}: {thread} divided an integer by zero")
    if fault.code == _NO_LANE:
        return errors.Divergence(
            f"{name}: lane {fault.lane} ({thread}) reads the value of a lane that its "
            f"simdgroup of {fault.lanes} threads does not have{_line(kernel, facts, fault.place)}"
        )
    if fault.code == _SPINNING:
        return errors.EmulatorError(
            f"{name}: {thread} waits at an atomic for something that never happens"
            f"{_line(kernel, facts, fault.place)}"
        )
    if fault.code in (_DIVERGED, _BARRIER):
        what = "lanes of a simdgroup" if fault.code == _DIVERGED else "threads of a threadgroup"
        kind = errors.Divergence if fault.code == _DIVERGED else errors.BarrierError
        return kind(f"{name}: the {what} diverged at {thread}: {_groups(kernel, facts, fault)}")
    return errors.EmulatorError(f"{name}: the emulator is out of memory")


def _line(kernel: CompiledKernel, facts: Facts, place: int) -> str:
    line = facts.places[place] if place < len(facts.places) else None
    text = kernel.text.splitlines()
    if line is None or line > len(text):
        return ""
    return f" (line {line}: `{text[line - 1].strip()}`)"


def _groups(kernel: CompiledKernel, facts: Facts, fault: runtime.Fault) -> str:
    """Where threads are: `0-15 wait at a simd operation (line 7: ...); 16-31 have returned`."""
    where: dict[str, list[int]] = {}
    for i in range(fault.lanes):
        state = fault.state[i]
        what = {_AT_SIMD: "wait at a simd operation", _AT_BARRIER: "wait at a barrier"}.get(state)
        text = f"{what}{_line(kernel, facts, fault.where[i])}" if what else "have returned"
        where.setdefault(text, []).append(i)
    return "; ".join(f"{_ranges(numbers)} {text}" for text, numbers in where.items())


def _ranges(numbers: list[int]) -> str:
    parts, start = [], numbers[0]
    for i, n in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != n + 1:
            parts.append(f"{start}-{n}" if start != n else f"{n}")
            start = numbers[i + 1] if i + 1 < len(numbers) else 0
    return ", ".join(parts)
