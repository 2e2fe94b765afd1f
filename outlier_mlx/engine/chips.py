"""What runs here: the chip's name, and the memory bandwidth that Apple publishes for it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import mlx.core as mx

from outlier_mlx.errors import listed
from outlier_mlx.runtime.ops import use_metal


@dataclass(frozen=True)
class Published:
    """A chip's memory bandwidth, and which configurations have it; docs/bench.md has the sources.

    Attributes:
        name: as MLX and macOS say it.
        gb_s: GB/s, decimal.
        gpu_cores: of the configurations that have it; 0: any.
        memory: sizes in GB of the configurations that have it; empty: any.
    """

    name: str
    gb_s: float
    gpu_cores: int = 0
    memory: tuple[int, ...] = ()


BANDWIDTHS = (
    Published("Apple M1", 68.25),
    Published("Apple M1 Pro", 200),
    Published("Apple M1 Max", 400),
    Published("Apple M1 Ultra", 800),
    Published("Apple M2", 100),
    Published("Apple M2 Pro", 200),
    Published("Apple M2 Max", 400),
    Published("Apple M2 Ultra", 800),
    Published("Apple M3", 100),
    Published("Apple M3 Pro", 150),
    Published("Apple M3 Max", 300, gpu_cores=30),
    Published("Apple M3 Max", 400, gpu_cores=40),
    Published("Apple M3 Ultra", 819),
    Published("Apple M4", 120),
    Published("Apple M4 Pro", 273),
    Published("Apple M4 Max", 410, gpu_cores=32),
    Published("Apple M4 Max", 546, gpu_cores=40),
    Published("Apple M5", 153),
    Published("Apple M5 Pro", 307),
    Published("Apple M5 Max", 460, gpu_cores=32),
    Published("Apple M5 Max", 614, gpu_cores=40),
    Published("Apple M5 Ultra", 1200),
    Published("Apple M6", 153, memory=(16,)),
    Published("Apple M6", 170, memory=(24, 32)),
)


@dataclass(frozen=True)
class Chip:
    """What computes.

    Attributes:
        name: of the chip, as MLX says it.
        device: "gpu" or "cpu".
        gpu_cores: where macOS says how many.
        memory_gb: of the machine, in units of 2**30 bytes, where it is known.
        bandwidth_gb_s: published; None where it is not known, or not what limits.
        note: why there is no bandwidth.
    """

    name: str
    device: str
    gpu_cores: int | None = None
    memory_gb: int | None = None
    bandwidth_gb_s: float | None = None
    note: str | None = None


def this_chip() -> Chip:
    """The chip that MLX's default device is on."""
    name = str(mx.device_info().get("device_name", "unknown chip"))
    memory = _memory_gb()
    if not use_metal():
        note = "on the CPU: no published bandwidth to compare with"
        return Chip(name, "cpu", memory_gb=memory, note=note)
    cores = _gpu_cores() if sys.platform == "darwin" else None
    gb_s, why = published_bandwidth(name, cores, memory)
    return Chip(name, "gpu", cores, memory, gb_s, why)


def published_bandwidth(
    name: str, gpu_cores: int | None, memory_gb: int | None
) -> tuple[float | None, str | None]:
    """A chip's memory bandwidth in GB/s, or None and why.

    Args:
        name: the chip, as MLX says it.
        gpu_cores: None where they are not known.
        memory_gb: likewise.
    """
    known = [row for row in BANDWIDTHS if row.name == name]
    if not known:
        return None, f"no bandwidth is known for {name}"
    fitting = [
        row
        for row in known
        if row.gpu_cores in (0, gpu_cores) and (not row.memory or memory_gb in row.memory)
    ]
    if len(fitting) == 1:
        return fitting[0].gb_s, None
    figures = listed((f"{row.gb_s:g}" for row in known), last="or")
    return None, f"{name} has {figures} GB/s, depending on its configuration, which is not known"


def _memory_gb() -> int | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    return round(pages / 2**30)


def _gpu_cores() -> int | None:
    """GPU cores as macOS tells them; its report names them `sppci_cores`, as text."""
    command = ["/usr/sbin/system_profiler", "SPDisplaysDataType", "-json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_cores(done.stdout)


def parse_gpu_cores(report: str) -> int | None:
    """GPU cores in the JSON of `system_profiler SPDisplaysDataType -json`, or None."""
    try:
        cards = json.loads(report)["SPDisplaysDataType"]
        return next(int(card["sppci_cores"]) for card in cards if "sppci_cores" in card)
    except (KeyError, StopIteration, TypeError, ValueError):
        return None
