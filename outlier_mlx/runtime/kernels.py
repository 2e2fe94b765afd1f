"""Launchers of the Metal kernels: grid, template arguments, and the checks that come before.

Rows of trits are in the layout `tq1_0_rows` (affine2.py). A kernel takes what its text in
`kernels/` says; what it cannot take is refused here.
"""

from typing import Any

import mlx.core as mx

from .affine2 import padded_width, row_bytes
from .kernel_text import kernel_text
from .variants import DECODES, Variant, saved_variant

ACTIVATIONS = (mx.float32, mx.float16, mx.bfloat16)
# What the kernels were tested with, smallest and largest.
LIMITS = {
    "tokens": (0, 1 << 14),
    "experts": (1, 1 << 10),
    "experts a token": (1, 64),
    "in features": (1, 1 << 17),
    "out features": (2, 1 << 18),
}
_INPUTS = {
    "tq1_0_swiglu": ("x", "gate", "gate_scales", "up", "up_scales", "indices"),
    "tq1_0_down": ("h", "down", "scales", "indices", "weights", "shared"),
    "tq1_0_qmv": ("x", "rows", "scales", "indices"),
    "tq1_0_to_affine2": ("rows",),
}
_OUTPUT = {
    "tq1_0_swiglu": "h",
    "tq1_0_down": "y",
    "tq1_0_qmv": "y",
    "tq1_0_to_affine2": "codes",
}


# What a kernel is launched in when the call names no variant and none was measured to be the
# fastest here (variants.py). docs/kernels.md has the reasons.
VARIANTS = {"tq1_0_swiglu": Variant(), "tq1_0_down": Variant(), "tq1_0_qmv": Variant()}

# What `mx.fast.metal_kernel` made, and the kernels made by it: tests put another in its place.
_built: tuple[Any, dict[str, Any]] = (None, {})


def tq1_0_swiglu(
    x: mx.array,
    gate: mx.array,
    gate_scales: mx.array,
    up: mx.array,
    up_scales: mx.array,
    indices: mx.array,
    *,
    variant: Variant | None = None,
) -> mx.array:
    """silu(gate x) * (up x) of each token's experts, in one launch.

    Args:
        x: (tokens, in) float32, float16 or bfloat16.
        gate: (experts, out, row_bytes) uint8.
        gate_scales: (experts, out) float32.
        up: as `gate`.
        up_scales: as `gate_scales`.
        indices: (tokens, k) uint32, each below `experts`.
        variant: how to compute it.

    Returns:
        (tokens, k, out) float32.

    Raises:
        ValueError: a dtype or shape that the kernel was not made for.
    """
    name = "tq1_0_swiglu"
    tokens, in_features = _matrix(name, "x", x)
    experts, out_features = _rows(name, "gate", gate, gate_scales, in_features)
    if _rows(name, "up", up, up_scales, in_features) != (experts, out_features):
        raise ValueError(f"{name}: gate {gate.shape} and up {up.shape} differ")
    k = _chosen(name, indices, tokens)
    if tokens == 0:
        return mx.zeros((0, k, out_features))
    inputs = [x, gate, gate_scales, up, up_scales, indices]
    h = _launch(name, inputs, variant, x.dtype, in_features, (tokens * k, out_features))
    return h.reshape(tokens, k, out_features)


def tq1_0_down(
    h: mx.array,
    down: mx.array,
    scales: mx.array,
    indices: mx.array,
    weights: mx.array,
    shared: mx.array,
    *,
    variant: Variant | None = None,
) -> mx.array:
    """shared + the sum over each token's experts of weight * (down h), rounded once.

    Args:
        h: (tokens, k, in) float32.
        down: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32.
        indices: (tokens, k) uint32, each below `experts`.
        weights: (tokens, k) float32.
        shared: (tokens, out) float32, float16 or bfloat16.
        variant: how to compute it.

    Returns:
        (tokens, out) of the dtype of `shared`.

    Raises:
        ValueError: a dtype or shape that the kernel was not made for.
    """
    name = "tq1_0_down"
    if h.ndim != 3 or h.dtype != mx.float32:
        raise ValueError(f"{name}: h is {_what(h)}; it takes (tokens, k, in) float32")
    tokens, k, in_features = h.shape
    out_features = _rows(name, "down", down, scales, in_features)[1]
    if _chosen(name, indices, tokens) != k or weights.shape != (tokens, k):
        raise ValueError(
            f"{name}: h {h.shape}, indices {indices.shape} and weights {weights.shape} "
            "differ in tokens or k"
        )
    if weights.dtype != mx.float32:
        raise ValueError(f"{name}: weights are {_what(weights)}; it takes float32")
    if _matrix(name, "shared", shared) != (tokens, out_features):
        raise ValueError(f"{name}: shared is {_what(shared)}, not {(tokens, out_features)}")
    if tokens == 0:
        return shared
    inputs = [h, down, scales, indices, weights, shared]
    return _launch(name, inputs, variant, shared.dtype, in_features, shared.shape, shared.dtype)


def tq1_0_qmv(
    x: mx.array,
    rows: mx.array,
    scales: mx.array,
    indices: mx.array,
    *,
    variant: Variant | None = None,
) -> mx.array:
    """The product of a vector with one expert's matrix, for many pairs of the two.

    Args:
        x: (vectors, in) float32, float16 or bfloat16; each meets `pairs / vectors` experts.
        rows: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32.
        indices: (pairs,) uint32, each below `experts`; the first vector's pairs come first.
        variant: how to compute it.

    Returns:
        (pairs, out) float32.

    Raises:
        ValueError: a dtype or shape that the kernel was not made for.
    """
    name = "tq1_0_qmv"
    vectors, in_features = _matrix(name, "x", x)
    _, out_features = _rows(name, "rows", rows, scales, in_features)
    if indices.ndim != 1 or indices.dtype != mx.uint32:
        raise ValueError(f"{name}: indices are {_what(indices)}; it takes (pairs,) uint32")
    pairs = indices.size
    if pairs % max(vectors, 1) or (pairs > 0 and vectors == 0):
        raise ValueError(f"{name}: {pairs} pairs are no multiple of {vectors} vectors")
    if pairs == 0:
        return mx.zeros((0, out_features))
    inputs = [x, rows, scales, indices]
    return _launch(name, inputs, variant, x.dtype, in_features, (pairs, out_features))


def tq1_0_to_affine2(rows: mx.array, in_features: int) -> mx.array:
    """MLX affine 2-bit codes of rows of trits, as `rows_to_affine2` has them.

    Args:
        rows: (..., row_bytes) uint8.
        in_features: trits in a row that count.

    Returns:
        (..., padded / 16) uint32, with `padded_width(in_features)` codes to a row.

    Raises:
        ValueError: a dtype or shape that the kernel was not made for.
    """
    name = "tq1_0_to_affine2"
    _within(name, "in features", in_features)
    pitch, width = row_bytes(in_features), padded_width(in_features) // 16
    if rows.dtype != mx.uint8 or rows.ndim < 1 or rows.shape[-1] != pitch:
        raise ValueError(
            f"{name}: rows are {_what(rows)}; {in_features} trits take uint8 rows of {pitch} bytes"
        )
    shape = (*rows.shape[:-1], width)
    count = rows.size // pitch
    if count == 0:
        return mx.zeros(shape, mx.uint32)
    threads = count * -(-width // 5)
    if threads >= 1 << 31:
        raise ValueError(f"{name}: {count} rows of {in_features} are more than a grid has threads")
    return _kernel(name)(
        inputs=[rows],
        template=[("PITCH", pitch), ("WIDTH", width)],
        grid=(threads, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint32],
    )[0]


def _launch(
    name: str,
    inputs: list[mx.array],
    variant: Variant | None,
    dtype: mx.Dtype,
    in_features: int,
    shape: tuple[int, ...],
    output_dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Launch a decode kernel for an output of `shape` (columns, out)."""
    columns, out_features = shape
    variant = variant or saved_variant(name) or VARIANTS[name]
    variant = variant.fitted(in_features, out_features)
    width = 32 * variant.simdgroups
    groups = -(-out_features // (variant.rows * variant.simdgroups))
    return _kernel(name)(
        inputs=inputs,
        template=[
            ("T", dtype),
            ("K", in_features),
            ("N", out_features),
            ("DECODE", DECODES.index(variant.decode)),
            ("ROWS", variant.rows),
            ("WORDS", variant.load_bits // 32),
            ("SIMDGROUPS", variant.simdgroups),
        ],
        grid=(width * groups, columns, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[shape],
        output_dtypes=[output_dtype],
    )[0]


def _kernel(name: str) -> Any:
    """The kernel, built by whatever `mx.fast.metal_kernel` is now."""
    global _built
    make = mx.fast.metal_kernel
    if _built[0] != make:
        _built = (make, {})
    kernels = _built[1]
    if name not in kernels:
        kernels[name] = make(
            name=name,
            input_names=list(_INPUTS[name]),
            output_names=[_OUTPUT[name]],
            source=kernel_text(name),
            header=kernel_text("tq1_0"),
        )
    return kernels[name]


def _what(array: mx.array) -> str:
    return f"{array.shape} {str(array.dtype).removeprefix('mlx.core.')}"


def _within(name: str, what: str, size: int) -> None:
    smallest, largest = LIMITS[what]
    if not smallest <= size <= largest:
        raise ValueError(f"{name}: {size} {what}; it takes {smallest} to {largest}")


def _matrix(name: str, argument: str, x: mx.array) -> tuple[int, int]:
    if x.ndim != 2 or x.dtype not in ACTIVATIONS:
        names = "float32, float16 or bfloat16"
        raise ValueError(f"{name}: {argument} is {_what(x)}; it takes two dimensions of {names}")
    _within(name, "tokens", x.shape[0])
    return x.shape[0], x.shape[1]


def _rows(
    name: str, argument: str, rows: mx.array, scales: mx.array, in_features: int
) -> tuple[int, int]:
    _within(name, "in features", in_features)
    pitch = row_bytes(in_features)
    if rows.ndim != 3 or rows.dtype != mx.uint8 or rows.shape[-1] != pitch:
        raise ValueError(
            f"{name}: {argument} is {_what(rows)}; "
            f"{in_features} trits a row take (experts, out, {pitch}) uint8"
        )
    experts, out_features, _ = rows.shape
    _within(name, "experts", experts)
    _within(name, "out features", out_features)
    if scales.shape != (experts, out_features) or scales.dtype != mx.float32:
        raise ValueError(
            f"{name}: scales of {argument} are {_what(scales)}, "
            f"not {(experts, out_features)} float32"
        )
    return experts, out_features


def _chosen(name: str, indices: mx.array, tokens: int) -> int:
    if indices.ndim != 2 or indices.dtype != mx.uint32 or indices.shape[0] != tokens:
        raise ValueError(f"{name}: indices are {_what(indices)}; it takes ({tokens}, k) uint32")
    _within(name, "experts a token", indices.shape[1])
    return indices.shape[1]
