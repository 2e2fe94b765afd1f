"""An emulator that runs, checks and counts Metal kernels on a CPU, for tests and benchmarks."""

from .errors import (
    ArithmeticFault,
    BarrierError,
    CompilerMissing,
    Divergence,
    EmulatorError,
    LaunchError,
    LintError,
    Misaligned,
    OutOfBounds,
    RaceError,
)
from .virtual import Launch, VirtualMetal, virtual_metal

__all__ = [
    "ArithmeticFault",
    "BarrierError",
    "CompilerMissing",
    "Divergence",
    "EmulatorError",
    "Launch",
    "LaunchError",
    "LintError",
    "Misaligned",
    "OutOfBounds",
    "RaceError",
    "VirtualMetal",
    "virtual_metal",
]
