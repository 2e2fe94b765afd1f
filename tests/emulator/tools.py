"""Small launches for the emulator's tests."""

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.emulator import VirtualMetal


def launch(
    metal: VirtualMetal,
    source: str,
    inputs: dict[str, Any] | None = None,
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]] | None = None,
    *,
    grid: tuple[int, int, int] = (32, 1, 1),
    threadgroup: tuple[int, int, int] = (32, 1, 1),
    header: str = "",
    call: dict[str, Any] | None = None,
    **kernel: Any,
) -> list[mx.array]:
    """Makes a kernel of `source` and launches it; the outputs, by default `o`: 32 floats."""
    inputs = inputs or {}
    outputs = outputs or {"o": ((32,), mx.float32)}
    made = metal.metal_kernel(
        name="tried",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        **kernel,
    )
    return made(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=grid,
        threadgroup=threadgroup,
        **(call or {}),
    )


def numbers(array: mx.array) -> np.ndarray:
    """An MLX array as NumPy's float64, also from bfloat16."""
    exact = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return np.array(exact).astype(np.float64)


def fresh(name: str) -> ModuleType:
    """A module imported again, so that kernels it makes on import are made by the emulator.

    For all others, the module that was there before stays.
    """
    before = _taken_out(name)
    try:
        return importlib.import_module(name)
    finally:
        _taken_out(name)
        sys.modules.update(before)
        parent, _, leaf = name.rpartition(".")
        if name in before and parent in sys.modules:
            setattr(sys.modules[parent], leaf, before[name])


def _taken_out(name: str) -> dict[str, ModuleType]:
    """The modules of this name and below, which are not known to Python afterwards."""
    names = [n for n in sys.modules if n == name or n.startswith(name + ".")]
    return {n: sys.modules.pop(n) for n in names}
