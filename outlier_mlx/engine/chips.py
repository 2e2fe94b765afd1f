"""This machine's chip: its name, and the memory bandwidth that Apple publishes for it."""

import re
import subprocess
import sys
from dataclasses import dataclass

from outlier_mlx.engine.machine import physical_memory
from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.runtime.variants import chip_name
from outlier_mlx.storage.texts import decode_json


@dataclass(frozen=True)
class Bandwidth:
    """Published memory bandwidth of a chip or of some of its configurations.

    Sources: docs/bench.md.

    Attributes:
        name: the chip's name in MLX and macOS.
        gb_s: GB/s, decimal.
        gpu_cores: GPU cores of these configurations; 0: any number.
        memory: memory sizes of these configurations in GB; empty: any size.
    """

    name: str
    gb_s: float
    gpu_cores: int = 0
    memory: tuple[int, ...] = ()


BANDWIDTHS = (
    Bandwidth("Apple M1", 68.25),
    Bandwidth("Apple M1 Pro", 200),
    Bandwidth("Apple M1 Max", 400),
    Bandwidth("Apple M1 Ultra", 800),
    Bandwidth("Apple M2", 100),
    Bandwidth("Apple M2 Pro", 200),
    Bandwidth("Apple M2 Max", 400),
    Bandwidth("Apple M2 Ultra", 800),
    Bandwidth("Apple M3", 100),
    Bandwidth("Apple M3 Pro", 150),
    Bandwidth("Apple M3 Max", 300, gpu_cores=30),
    Bandwidth("Apple M3 Max", 400, gpu_cores=40),
    Bandwidth("Apple M3 Ultra", 819),
    Bandwidth("Apple M4", 120),
    Bandwidth("Apple M4 Pro", 273),
    Bandwidth("Apple M4 Max", 410, gpu_cores=32),
    Bandwidth("Apple M4 Max", 546, gpu_cores=40),
    Bandwidth("Apple M5", 153),
    Bandwidth("Apple M5 Pro", 307),
    Bandwidth("Apple M5 Max", 460, gpu_cores=32),
    Bandwidth("Apple M5 Max", 614, gpu_cores=40),
    Bandwidth("Apple M5 Ultra", 1200),
    Bandwidth("Apple M6", 153, memory=(16,)),
    Bandwidth("Apple M6", 170, memory=(24, 32)),
)


@dataclass(frozen=True)
class Chip:
    """The chip that computes.

    Attributes:
        name: the chip's name in MLX.
        device: "gpu" or "cpu".
        gpu_cores: number of GPU cores, or None if not known.
        memory_gb: the machine's memory in units of 2**30 bytes, or None if not known.
        bandwidth_gb_s: published memory bandwidth; None if not known, and on the CPU.
        note: why there is no bandwidth, or None.
    """

    name: str
    device: str
    gpu_cores: int | None = None
    memory_gb: int | None = None
    bandwidth_gb_s: float | None = None
    note: str | None = None


def this_chip() -> Chip:
    """The chip of MLX's default device."""
    name = chip_name()
    physical = physical_memory()
    memory = None if physical is None else round(physical / 2**30)
    if not use_metal():
        note = "on the CPU: no published bandwidth for comparison"
        return Chip(name, "cpu", memory_gb=memory, note=note)
    cores = _gpu_cores() if sys.platform == "darwin" else None
    gb_s, why = published_bandwidth(name, cores, memory)
    return Chip(name, "gpu", cores, memory, gb_s, why)


def named_chip(text: str, memory_gb: int | None = None) -> Chip:
    """The Apple chip that someone names.

    Args:
        text: "M2 Pro" or "Apple M2 Pro"; where a chip has several bandwidths also the number of GPU
            cores or the memory that tell which: "M3 Max 40", "M6 16GB".
        memory_gb: memory in units of 2**30 bytes, if it is known otherwise.

    Raises:
        OutlierError: no such chip, or one with several bandwidths.
    """
    text, cores = " ".join(text.split()), None
    kept = []
    for word in text.casefold().removeprefix("apple").split():
        number = re.fullmatch(r"(\d{1,4})(gb|-?cores?|)", word)
        if number is None:
            kept.append(word)
        elif number[2] == "gb":
            memory_gb = int(number[1])
        else:
            cores = int(number[1])
    names = {row.name.casefold(): row.name for row in BANDWIDTHS}
    name = names.get(" ".join(["apple", *kept]))
    if name is None:
        shown = [known.removeprefix("Apple ") for known in names.values()]
        raise OutlierError(f"no chip {text[:40]!r} is known; known: {listed(shown)}")
    gb_s, why = published_bandwidth(name, cores, memory_gb)
    if gb_s is None:
        rows = [row for row in BANDWIDTHS if row.name == name]
        some = [f"{m}GB" for row in rows for m in row.memory] or [
            str(row.gpu_cores) for row in rows
        ]
        named = f"{name.removeprefix('Apple ')} {some[-1]}"
        raise OutlierError(f"{why}: name that, too, such as {named!r}")
    return Chip(name, "gpu", cores, memory_gb, gb_s)


def published_bandwidth(
    name: str, gpu_cores: int | None, memory_gb: int | None
) -> tuple[float | None, str | None]:
    """Look up a chip's memory bandwidth.

    Args:
        name: the chip's name in MLX.
        gpu_cores: number of GPU cores, or None if not known.
        memory_gb: memory in units of 2**30 bytes, or None if not known.

    Returns:
        GB/s and None, or None and the reason.
    """
    known = [row for row in BANDWIDTHS if row.name == name]
    if not known:
        return None, f"no published bandwidth for {name}"
    fitting = [
        row
        for row in known
        if row.gpu_cores in (0, gpu_cores) and (not row.memory or memory_gb in row.memory)
    ]
    if len(fitting) == 1:
        return fitting[0].gb_s, None
    figures = listed((f"{row.gb_s:g}" for row in known), last="or")
    return None, f"{name} has {figures} GB/s, depending on its configuration (not known)"


def _gpu_cores() -> int | None:
    """The number of GPU cores on macOS, or None."""
    command = ["/usr/sbin/system_profiler", "SPDisplaysDataType", "-json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_cores(done.stdout)


def parse_gpu_cores(report: str) -> int | None:
    """The number of GPU cores in the output of `system_profiler SPDisplaysDataType -json`.

    It is the text in `sppci_cores`; None if there is none.
    """
    try:
        cards = decode_json(report)["SPDisplaysDataType"]
        return next(int(card["sppci_cores"]) for card in cards if "sppci_cores" in card)
    except (KeyError, StopIteration, TypeError, ValueError):
        return None
