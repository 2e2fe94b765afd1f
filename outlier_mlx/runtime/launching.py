"""How kernels are built, and checks of the arguments that several launchers share."""

from typing import Any

import mlx.core as mx

from .kernel_text import kernel_text

ACTIVATIONS = (mx.float32, mx.float16, mx.bfloat16)
# Smallest and largest sizes that the kernels are tested with.
LIMITS = {
    "tokens": (0, 1 << 14),
    "experts": (1, 1 << 10),
    "stored experts": (1, 1 << 16),  # those of several layers may be in one array
    "experts per token": (1, 64),
    "in features": (1, 1 << 17),
    "out features": (2, 1 << 18),
    "elements": (0, (1 << 32) - 1),  # of vectors and of results
}
HEADERS = ("tq1_0",)  # of kernels without others
# Names of each kernel's inputs and outputs.
KERNEL_ARGUMENTS = {
    "tq1_0_swiglu": (["x", "gate", "gate_scales", "up", "up_scales", "indices", "blocks"], ["h"]),
    "tq1_0_down": (["h", "down", "scales", "indices", "weights", "shared"], ["y"]),
    "tq1_0_qmv": (["x", "rows", "scales", "indices", "blocks"], ["y"]),
    "tq1_0_mix": (["products", "weights", "shared"], ["y"]),
    "tq1_0_sort": (["indices"], ["blocks"]),
    "tq1_0_to_affine2": (["rows"], ["codes"]),
    "tq1_0_logits": (["x", "router"], ["logits"]),
    "tq1_0_qmv_groups": (["x", "rows", "scales", "indices", "blocks"], ["y"]),
    "tq1_0_linear": (["x", "rows", "scales"], ["y"]),
    "tq1_0_rotate": (["x", "signs"], ["y"]),
    "tq1_0_route": (["x", "router", "alpha"], ["indices", "weights"]),
}

# The function `mx.fast.metal_kernel` and the kernels that it built. Tests replace the function.
_built: tuple[Any, dict[str, Any]] = (None, {})


def built_kernel(name: str, *headers: str) -> Any:
    """Build a kernel with the current `mx.fast.metal_kernel`, or return it if already built.

    Args:
        name: name of the kernel and of its file.
        headers: files that come before it; default: `HEADERS`.
    """
    global _built
    make = mx.fast.metal_kernel
    if _built[0] != make:
        _built = (make, {})
    kernels = _built[1]
    if name not in kernels:
        inputs, outputs = KERNEL_ARGUMENTS[name]
        kernels[name] = make(
            name=name,
            input_names=inputs,
            output_names=outputs,
            source=kernel_text(name),
            header="".join(map(kernel_text, headers or HEADERS)),
        )
    return kernels[name]


def described(array: mx.array) -> str:
    """Shape and dtype of an array, for messages."""
    return f"{array.shape} {str(array.dtype).removeprefix('mlx.core.')}"


def is_supported(what: str, size: int) -> bool:
    """Whether a size is within `LIMITS`."""
    smallest, largest = LIMITS[what]
    return smallest <= size <= largest


def check_size(name: str, what: str, size: int) -> None:
    """Raise a ValueError that names the kernel if a size is not within `LIMITS`."""
    if not is_supported(what, size):
        smallest, largest = LIMITS[what]
        raise ValueError(f"{name}: {size} {what}; supported: {smallest} to {largest}")


def check_matrix(name: str, argument: str, x: mx.array) -> tuple[int, int]:
    """Check that x is (tokens, width) of an activation dtype; returns its shape.

    Raises:
        ValueError: it is not; the message names the kernel and the argument.
    """
    if x.ndim != 2 or x.dtype not in ACTIVATIONS:
        names = "float32, float16 or bfloat16"
        raise ValueError(
            f"{name}: {argument} is {described(x)}; expected two dimensions of {names}"
        )
    check_size(name, "tokens", x.shape[0])
    return x.shape[0], x.shape[1]
