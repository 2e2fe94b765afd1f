"""Calls the compiled runtime: memory between guard pages, and a kernel run over a grid."""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .compiler import runtime_library

PAGE = mmap.PAGESIZE
GUARD = max(1 << 20, PAGE)  # bytes on each side of a buffer at which an access faults
MAX_THREADS = 1024
MAX_BUFFERS = 64

_NONE, _READ, _WRITE = 0, 1, 2
_PRIVATE, _ANONYMOUS, _NORESERVE = 2, mmap.MAP_ANONYMOUS, getattr(mmap, "MAP_NORESERVE", 0)


class Job(ctypes.Structure):
    """Describes a run; has the same fields as in runtime.cpp."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("second", ctypes.c_uint32),
        ("fibers", ctypes.c_uint32),
        ("blocks", ctypes.c_uint32),
        ("arrays", ctypes.c_uint32),
        ("issued", ctypes.c_void_p),
        ("executed", ctypes.c_void_p),
        ("array_base", ctypes.c_void_p),
        ("array_bytes", ctypes.c_void_p),
    )


class Fault(ctypes.Structure):
    """Describes an error; has the same fields as in runtime.cpp."""

    _fields_ = (
        ("code", ctypes.c_uint32),
        ("write", ctypes.c_uint32),
        ("place", ctypes.c_uint32),
        ("lane", ctypes.c_uint32),
        ("thread", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("lanes", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("state", ctypes.c_uint32 * MAX_THREADS),
        ("where", ctypes.c_uint32 * MAX_THREADS),
    )


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


@cache
def library() -> ctypes.CDLL:
    """Loads the runtime, compiling it at first use."""
    import ctypes.util

    name = ctypes.util.find_library("m")
    if name:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # kernels call its functions
    return ctypes.CDLL(str(runtime_library()))


@cache
def entry_point(path: Path) -> int:
    """The address of a compiled kernel's entry."""
    library()
    loaded = ctypes.CDLL(str(path))
    return ctypes.cast(loaded.emu_entry, ctypes.c_void_p).value or 0


def _map(size: int, protection: int) -> int:
    address = _libc().mmap(None, size, protection, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"cannot reserve {size} bytes")
    return address


@dataclass
class Region:
    """The memory of one buffer."""

    name: str
    bytes: int
    base: int = 0  # address of its first byte

    def __contains__(self, address: int) -> bool:
        return self.base - GUARD <= address < self.base + self.bytes + GUARD


class Arena:
    """Buffers between guard pages, each at the start or at the end of its own pages.

    At the start of its pages, an access to the byte before the buffer faults; at the end, to the
    byte after it. So two runs check both ends to the byte.
    """

    def __init__(self, sizes: Sequence[tuple[str, int]], at_end: bool, shadow: bool) -> None:
        self.regions = [Region(name, size) for name, size in sizes]
        pages = [-(-max(size, 1) // PAGE) * PAGE for _, size in sizes]
        self.size = sum(pages) + GUARD * (len(pages) + 1)
        self.address = _map(self.size, _NONE)
        self._spans: list[tuple[int, int]] = []
        at = self.address + GUARD
        for region, span in zip(self.regions, pages, strict=True):
            region.base = at + span - region.bytes if at_end else at
            self._spans.append((at, span))
            if region.bytes:
                self._protect(at, span, _READ | _WRITE)
            at += span + GUARD
        self.shadow = _map(2 * self.size, _READ | _WRITE) if shadow else 0

    def _protect(self, at: int, span: int, how: int) -> None:
        if _libc().mprotect(at, span, how):
            raise MemoryError(f"mprotect failed: errno {ctypes.get_errno()}")

    def make_read_only(self, index: int) -> None:
        """Makes writes to a buffer fault."""
        if self.regions[index].bytes:
            self._protect(*self._spans[index], _READ)

    def bytes(self, index: int) -> np.ndarray:
        """A buffer's memory, uint8; valid until the arena is closed."""
        return self._view(self.regions[index].base, self.regions[index].bytes)

    def touched(self, index: int, write: bool) -> int:
        """The number of different bytes of a buffer that were read, or written."""
        region = self.regions[index]
        offset = self.shadow - self.address + (self.size if write else 0)
        return int(np.count_nonzero(self._view(region.base + offset, region.bytes)))

    def _view(self, address: int, size: int) -> np.ndarray:
        if size == 0:
            return np.empty(0, np.uint8)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def close(self) -> None:
        """Frees the memory."""
        _libc().munmap(self.address, self.size)
        if self.shadow:
            _libc().munmap(self.shadow, 2 * self.size)

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def set_globals(arena: Arena, bases: Sequence[int], check_alignment: bool) -> None:
    """Tells the runtime where the buffers are."""
    runtime = library()
    buffers = (ctypes.c_uint64 * MAX_BUFFERS).in_dll(runtime, "emu_buffers")
    for index, base in enumerate(bases):
        buffers[index] = base & (2**64 - 1)
    mask = ctypes.c_uint64.in_dll(runtime, "emu_alignment_mask")
    mask.value = 2**64 - 1 if check_alignment else 0
    ctypes.c_uint64.in_dll(runtime, "emu_arena").value = arena.address
    ctypes.c_uint64.in_dll(runtime, "emu_arena_bytes").value = arena.size
    offset = arena.shadow - arena.address if arena.shadow else 0
    ctypes.c_int64.in_dll(runtime, "emu_read_shadow").value = offset
    ctypes.c_int64.in_dll(runtime, "emu_write_shadow").value = offset + arena.size
