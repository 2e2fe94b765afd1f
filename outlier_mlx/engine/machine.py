"""What this machine gives a model: memory of the GPU, memory that is free now, and its pressure.

macOS: free, purgeable and file-backed pages, as `vm_stat` prints them; the GPU's limit is MLX's
`max_recommended_working_set_size`. Linux: MemAvailable of /proc/meminfo, or less, if a cgroup of
this process (version 1 or 2) leaves less. What the page cache holds counts as free: the system
drops it when memory is needed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from outlier_mlx.terminal import size

#: Bytes of a budget that is not known: everything fits, and swapping is the user's to notice.
UNLIMITED = sys.maxsize
# The share of its memory that macOS lets the GPU use by default; docs/sizes.md has the source.
GPU_SHARE = 0.75
# Parts of free memory, and of the GPU's limit, that are better left free.
_FREE_KEPT, _GPU_KEPT = 8, 32
# Where less than this share of memory is available, Linux is taken to be under pressure.
LITTLE = 0.05
# Levels of kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical.
_MAC_WARNING = 2
THIS_GPU, THIS_MACHINE = "this Mac's GPU", "this machine"
FREE_ON_MAC, THIS_CONTAINER = "this Mac, as it is now,", "this container"
_ROOT = Path("/")
_VM_STAT = "/usr/bin/vm_stat"


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take.

    Attributes:
        nbytes: how much; `UNLIMITED` where that is not known.
        whose: what sets the limit, for messages.
        kept: what `headroom` is; None: its usual share.
    """

    nbytes: int
    whose: str
    kept: int | None = field(default=None, compare=False)

    @property
    def headroom(self) -> int:
        """Bytes that are better left free, if there is a choice.

        An eighth of what is free: the page cache keeps experts that were read, and other programs
        grow. Of the GPU's limit it is a 32nd, because macOS keeps a quarter of its memory for
        others anyway. Nobody measured which shares are best.
        """
        if self.kept is not None:
            return self.kept
        free = self.on_cpu or self.whose == FREE_ON_MAC
        return self.nbytes // (_FREE_KEPT if free else _GPU_KEPT)

    @property
    def on_cpu(self) -> bool:
        """Whether a model runs without a GPU there, in float32."""
        return self.whose in (THIS_MACHINE, THIS_CONTAINER)

    def __str__(self) -> str:
        """What gives how much."""
        if self.nbytes == UNLIMITED:
            return f"it is not known how much {self.whose} gives"
        return f"{self.whose} gives {size(self.nbytes)}"


def budget(ram_gb: float | None = None) -> Budget:
    """What this machine gives a model now, or what a Mac with `ram_gb` gigabytes (2^30) would."""
    if ram_gb is not None:
        return Budget(int(ram_gb * 2**30 * GPU_SHARE), f"a Mac with {ram_gb:g} GB")
    limit, found = gpu_limit(), free()
    if limit is not None:
        if found is None:
            return Budget(limit, THIS_GPU)
        if found.nbytes < limit:
            return Budget(found.nbytes, FREE_ON_MAC)
        kept = max(limit // _GPU_KEPT, limit - (found.nbytes - found.nbytes // _FREE_KEPT))
        return Budget(limit, THIS_GPU, kept)
    if found is not None:
        return found
    physical = physical_memory()
    return Budget(UNLIMITED if physical is None else int(physical * GPU_SHARE), THIS_MACHINE)


def gpu_limit() -> int | None:
    """Bytes that macOS lets the GPU use; None without a GPU."""
    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size")
    return int(limit) if mx.metal.is_available() and limit else None


def physical_memory() -> int | None:
    """Bytes of memory that the machine has; None where the system does not say."""
    try:
        pages, nbytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return pages * nbytes if pages > 0 and nbytes > 0 else None


def free() -> Budget | None:
    """Memory that programs can have now, with what the page cache holds; None if not known."""
    if sys.platform == "darwin":
        nbytes = read_vm_stat(_vm_stat())
        return None if nbytes is None else Budget(nbytes, FREE_ON_MAC)
    rooms = list(_rooms(_ROOT))
    if not rooms:
        return None
    room = min(rooms, key=lambda found: found.nbytes)
    return Budget(max(0, room.nbytes), room.whose)


def under_pressure() -> bool:
    """Whether the system is short of memory: macOS says so; on Linux, less than 5 % is left."""
    if sys.platform == "darwin":
        from ctypes import CDLL

        from outlier_mlx.engine.buffers import sysctl_int

        level = sysctl_int(b"kern.memorystatus_vm_pressure_level", CDLL(None))
        return level is not None and level >= _MAC_WARNING
    return any(room.nbytes < LITTLE * room.total for room in _rooms(_ROOT))


def read_vm_stat(text: str) -> int | None:
    """Bytes that programs can have, from what `vm_stat` prints; None if it does not say.

    "Pages free" is without the speculative pages, which are file-backed ones.
    """
    page = re.search(r"page size of (\d+) bytes", text)
    names = ("Pages free", "Pages purgeable", "File-backed pages")
    counts = [re.search(rf"^{name}:\s+(\d+)\.", text, re.MULTILINE) for name in names]
    if page is None or None in counts:
        return None
    return int(page[1]) * sum(int(found[1]) for found in counts if found)


def _vm_stat() -> str:
    try:
        done = subprocess.run([_VM_STAT], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@dataclass(frozen=True)
class _Room:
    """Bytes that are left of `total`, and who has them."""

    nbytes: int
    total: int
    whose: str


def _rooms(root: Path) -> Iterator[_Room]:
    """What Linux and each cgroup above this process leave; nothing on other systems."""
    known = _numbers(root / "proc/meminfo")
    if {"MemTotal:", "MemAvailable:"} <= known.keys():
        total, left = known["MemTotal:"], known["MemAvailable:"]
        yield _Room(left * 1024, total * 1024, THIS_MACHINE)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            yield from _limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield from _limits(root / "sys/fs/cgroup/memory", path, *files, "total_")


def _limits(mount: Path, path: str, most: str, used: str, prefix: str) -> Iterator[_Room]:
    """The limits of a cgroup and of those above it, as far as they are limits."""
    names = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(names), -1, -1):
        folder = mount.joinpath(*names[:depth])
        limit, taken = _read(folder / most).strip(), _read(folder / used).strip()
        # Without a limit, version 1 says a number of 63 bits.
        if not (limit.isdecimal() and taken.isdecimal()) or int(limit) >= 2**62:
            continue
        known = _numbers(folder / "memory.stat")
        cached = sum(known.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        yield _Room(int(limit) - int(taken) + cached, int(limit), THIS_CONTAINER)


def _numbers(path: Path) -> dict[str, int]:
    """The lines "NAME NUMBER ..." of a file of the system."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
