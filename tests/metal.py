"""The Metal device that kernel tests run on: the GPU that is here, or else the emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from kernels.emulator import VirtualMetal, virtual_metal

# "real" insists on the GPU, "emulated" on the emulator.
VARIABLE = "OUTLIER_MLX_METAL"


def on_real_metal() -> bool:
    """Whether kernel tests run on a GPU: where there is one, unless the variable says otherwise.

    Raises:
        ValueError: the variable asks for something else, or for a GPU that is not there.
    """
    here, wanted = mx.metal.is_available(), os.environ.get(VARIABLE)
    if wanted not in (None, "real", "emulated"):
        raise ValueError(f"{VARIABLE} is {wanted!r}, not 'real' or 'emulated'")
    if wanted == "real" and not here:
        raise ValueError(f"{VARIABLE} is 'real', and MLX finds no Metal device")
    return here if wanted is None else wanted == "real"


needs_emulator = pytest.mark.skipif(on_real_metal(), reason="needs the emulator")


@dataclass(frozen=True)
class RealLaunch:
    """A launch of a kernel on the GPU."""

    name: str
    template: dict[str, Any]


class RealMetal:
    """The GPU that is here, its launches recorded as the emulator records them."""

    def __init__(self) -> None:
        self.launches: list[RealLaunch] = []

    @property
    def names(self) -> list[str]:
        """The names of the kernels launched, in order."""
        return [launch.name for launch in self.launches]

    def clear(self) -> None:
        """Forgets the launches so far."""
        self.launches.clear()

    def recording(self, make: Any) -> Any:
        """`mx.fast.metal_kernel`, whose kernels record their launches."""

        def metal_kernel(name: str, *args: Any, **options: Any) -> Any:
            kernel = make(name, *args, **options)

            def launch(**call: Any) -> list[mx.array]:
                self.launches.append(RealLaunch(name, dict(call.get("template") or ())))
                return kernel(**call)

            return launch

        return metal_kernel


Metal = VirtualMetal | RealMetal


@contextmanager
def any_metal() -> Iterator[Metal]:
    """A device that runs the kernels, and records which."""
    if not on_real_metal():
        with virtual_metal(count=False) as device:
            yield device
        return
    real, make = RealMetal(), mx.fast.metal_kernel
    mx.fast.metal_kernel = real.recording(make)
    try:
        yield real
    finally:
        mx.fast.metal_kernel = make
