"""What the machine gives: recorded outputs of macOS, files of Linux, and memory pressure."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from outlier_mlx.engine import machine
from outlier_mlx.engine.buffers import sysctl_int
from outlier_mlx.engine.machine import Budget, budget, free, read_vm_stat, under_pressure

# As vm_stat(1) prints it on Apple silicon.
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               61842.
Pages active:                            372106.
Pages inactive:                          356284.
Pages speculative:                        14874.
Pages throttled:                              0.
Pages wired down:                        146420.
Pages purgeable:                           9051.
"Translation faults":                 938104412.
Pages copy-on-write:                   41077325.
Pages zero filled:                    501244581.
Pages reactivated:                     52178031.
Pages purged:                          11003420.
File-backed pages:                       201345.
Anonymous pages:                         541919.
Pages stored in compressor:              210211.
Pages occupied by compressor:             70112.
Decompressions:                        20512331.
Compressions:                          31410225.
Pageins:                               22143019.
Pageouts:                                301255.
Swapins:                                      0.
Swapouts:                                     0.
"""
MEMINFO = """\
MemTotal:       16291212 kB
MemFree:          812340 kB
MemAvailable:    9402112 kB
Buffers:          310220 kB
HugePages_Total:       0
"""
KB = 1024


def test_free_purgeable_and_file_backed_pages_count() -> None:
    assert read_vm_stat(VM_STAT) == (61842 + 9051 + 201345) * 16384
    assert read_vm_stat(VM_STAT.replace("File-backed pages", "Pages of files")) is None
    assert read_vm_stat("") is None


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a Linux machine without cgroups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def put(folder: Path, **files: object) -> None:
    """Write the files of a cgroup, with dots for the first underscore of a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def test_linux_gives_what_is_available(linux: Path) -> None:
    assert budget() == Budget(9402112 * KB, "this machine") and budget().on_cpu
    assert not under_pressure()
    (linux / "proc/meminfo").write_text(MEMINFO.replace("9402112", "802112"))
    assert under_pressure()


def test_a_cgroup_of_version_2_and_those_above_it_limit(linux: Path) -> None:
    (linux / "proc/self/cgroup").write_text("0::/user/job\n")
    group = linux / "sys/fs/cgroup"
    put(group / "user/job", memory_max="max", memory_current=5000)
    assert free() == Budget(9402112 * KB, "this machine")
    stat = "anon 10\ninactive_file 300\nactive_file 200"
    put(group / "user", memory_max=10_000_000, memory_current=9_000_000, memory_stat=stat)
    found = budget()
    assert found == Budget(1_000_500, "this container") and found.on_cpu
    assert str(found) == "this container gives 1.0 MB" and not under_pressure()
    put(group / "user", memory_current=9_900_000)
    assert under_pressure()
    put(group / "user", memory_current=20_000_000)
    assert free() == Budget(0, "this container")


def test_a_cgroup_of_version_1_limits(linux: Path) -> None:
    (linux / "proc/self/cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/docker/abc\n")
    group = linux / "sys/fs/cgroup/memory"
    files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    group.mkdir(parents=True)
    # The group's own folder is not there: in a container, its root is the mount.
    for name, content in zip(files, (2**30, 2**29, "total_inactive_file 64"), strict=True):
        (group / name).write_text(f"{content}\n")
    assert free() == Budget(2**29 + 64, "this container")
    (group / files[0]).write_text("9223372036854771712\n")  # no limit
    assert free() == Budget(9402112 * KB, "this machine")


def test_a_mac_gives_the_gpu_s_limit_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    limit = {"max_recommended_working_set_size": 12 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: limit)
    monkeypatch.setattr(machine, "_vm_stat", lambda: VM_STAT)
    found = budget()
    assert found == Budget(272238 * 16384, "this Mac, as it is now,") and not found.on_cpu
    assert str(found) == "this Mac, as it is now, gives 4.46 GB"
    assert found.headroom == found.nbytes // 8
    plenty = VM_STAT.replace("61842", "961842")
    for text in (plenty, "vm_stat: command not found"):
        monkeypatch.setattr(machine, "_vm_stat", lambda said=text: said)
        assert budget() == Budget(12 << 30, "this Mac's GPU")
        assert budget().headroom == (12 << 30) // 32
    # Little more is free than the GPU may use: an eighth of that is better left.
    little = VM_STAT.replace("61842.", f"{(13 << 30) // 16384 - 9051 - 201345}.")
    monkeypatch.setattr(machine, "_vm_stat", lambda: little)
    found = budget()
    assert found.nbytes == 12 << 30
    assert found.nbytes - found.headroom == (13 << 30) - (13 << 30) // 8


class Library:
    """A C library with one number in `sysctlbyname`."""

    def __init__(self, level: int | None) -> None:
        self.level = level

    def sysctlbyname(self, name: bytes, value: Any, size: Any, *_: Any) -> int:
        """As sysctlbyname(3): 0, or -1 for a name that it does not know."""
        if self.level is None or name != b"kern.memorystatus_vm_pressure_level":
            return -1
        assert size._obj.value == 4
        value._obj.value = self.level
        return 0


@pytest.mark.parametrize(("level", "expected"), [(1, False), (2, True), (4, True), (None, False)])
def test_a_mac_says_that_memory_is_short(
    level: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(level))
    assert under_pressure() is expected
    library = SimpleNamespace(sysctlbyname=Library(level).sysctlbyname)
    assert sysctl_int(b"kern.memorystatus_vm_pressure_level", library) == level
    assert sysctl_int(b"kern.other", library) is None


def test_this_machine_says_something() -> None:
    found = free()
    if sys.platform == "linux":
        assert found is not None and found.nbytes > 2**20
