"""Launchers of experts' kernels: check the arguments, then choose grid and template arguments.

Rows of trits have the layout `tq1_0_strided` (affine2.py). The text of each kernel in `kernels/`
describes its arguments.
"""

from dataclasses import replace

import mlx.core as mx

from .affine2 import padded_width, row_bytes
from .launching import (
    KERNEL_ARGUMENTS,
    built_kernel,
    check_matrix,
    check_size,
    described,
    is_supported,
)
from .variants import DECODES, Variant, saved_variant

# Bytes of a row that a thread converts to affine 2-bit codes.
BLOCK_BYTES = 16
# Default variants, used if the call has none and tuning has chosen none (variants.py), and those
# for blocks of 2, 4 or 8 pairs. docs/kernels.md has the reasons.
VARIANTS = {
    "tq1_0_swiglu": Variant(rows=4, pieces=2),
    "tq1_0_down": Variant(rows=8),
    "tq1_0_qmv": Variant(rows=8, pieces=2),
}
BLOCK_VARIANTS = {
    "tq1_0_swiglu": {
        2: Variant(rows=2, pieces=2),
        4: Variant(rows=2, pieces=2),
        8: Variant(rows=2),
    },
    "tq1_0_qmv": {2: Variant(rows=4, pieces=2), 4: Variant(rows=4, pieces=2), 8: Variant(rows=4)},
}


def can_decode(tokens: int, experts: int, k: int, *widths: int) -> bool:
    """Whether the decode kernels take these sizes.

    Args:
        tokens: number of tokens or vectors.
        experts: number of experts of the layer.
        k: experts that a token uses.
        widths: widths of inputs and outputs.
    """
    features = {"in features": widths, "out features": widths}
    sizes = {"tokens": (tokens,), "experts": (experts,), "experts per token": (k,), **features}
    sizes["elements"] = (tokens * k * max(widths, default=0),)
    return all(is_supported(what, size) for what, given in sizes.items() for size in given)


def can_convert(rows: mx.array, in_features: int) -> bool:
    """Whether `tq1_0_to_affine2` takes rows (..., row_bytes) of this many trits."""
    return is_supported("in features", in_features) and _conversion_threads(rows) < 1 << 31


def tq1_0_swiglu(
    x: mx.array,
    gate: mx.array,
    gate_scales: mx.array,
    up: mx.array,
    up_scales: mx.array,
    indices: mx.array,
    *,
    blocks: mx.array | None = None,
    variant: Variant | None = None,
) -> mx.array:
    """Compute silu(gate x) * (up x) for each token's experts in one launch.

    Args:
        x: (tokens, in) float32, float16 or bfloat16.
        gate: (experts, out, row_bytes) uint8.
        gate_scales: (experts, out) float32.
        up: like `gate`.
        up_scales: like `gate_scales`.
        indices: (tokens, k) uint32, each below `experts`.
        blocks: `tq1_0_sort` of the indices: pairs of one expert then share the decoding of its
            rows. Results do not depend on it.
        variant: variant of the kernel; default: the one that tuning has chosen, or `VARIANTS`. With
            blocks: `BLOCK_VARIANTS`.

    Returns:
        (tokens, k, out) float32.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_swiglu"
    tokens, in_features = check_matrix(name, "x", x)
    experts, out_features = _rows(name, "gate", gate, gate_scales, in_features)
    if _rows(name, "up", up, up_scales, in_features) != (experts, out_features):
        raise ValueError(f"{name}: gate {gate.shape} and up {up.shape} differ")
    k = _experts_per_token(name, indices, tokens)
    if tokens == 0:
        return mx.zeros((0, k, out_features))
    inputs = [x, gate, gate_scales, up, up_scales, indices]
    shape = tokens * k, out_features
    h = _launch(name, inputs, blocks, variant, x.dtype, in_features, shape, k)
    return h.reshape(tokens, k, out_features)


def tq1_0_down(
    h: mx.array,
    down: mx.array,
    scales: mx.array,
    indices: mx.array,
    weights: mx.array,
    shared: mx.array,
    *,
    blocks: mx.array | None = None,
    variant: Variant | None = None,
) -> mx.array:
    """Compute shared + the sum over each token's experts of weight * (down h), rounded once.

    Args:
        h: (tokens, k, in) float32.
        down: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32.
        indices: (tokens, k) uint32, each below `experts`.
        weights: (tokens, k) float32.
        shared: (tokens, out) float32, float16 or bfloat16.
        blocks: see `tq1_0_swiglu`. With them, `tq1_0_qmv` is launched, and then `tq1_0_mix`.
        variant: see `tq1_0_swiglu`; with blocks, a variant of `tq1_0_qmv`.

    Returns:
        (tokens, out) of the dtype of `shared`.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_down"
    if h.ndim != 3 or h.dtype != mx.float32:
        raise ValueError(f"{name}: h is {described(h)}; expected (tokens, k, in) float32")
    tokens, k, in_features = h.shape
    out_features = _rows(name, "down", down, scales, in_features)[1]
    if _experts_per_token(name, indices, tokens) != k or weights.shape != (tokens, k):
        raise ValueError(
            f"{name}: h {h.shape}, indices {indices.shape} and weights {weights.shape} "
            "differ in tokens or k"
        )
    if weights.dtype != mx.float32:
        raise ValueError(f"{name}: weights are {described(weights)}; expected float32")
    if check_matrix(name, "shared", shared) != (tokens, out_features):
        raise ValueError(
            f"{name}: shared is {described(shared)}; expected {(tokens, out_features)}"
        )
    if tokens == 0:
        return shared
    if blocks is not None:
        vectors = h.reshape(tokens * k, in_features)
        y = tq1_0_qmv(vectors, down, scales, indices.flatten(), blocks=blocks, variant=variant)
        return built_kernel("tq1_0_mix")(
            inputs=[y, weights, shared],
            template=[("T", shared.dtype), ("N", out_features)],
            grid=(out_features, tokens, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[shared.shape],
            output_dtypes=[shared.dtype],
        )[0]
    inputs = [h, down, scales, indices, weights, shared]
    dtype, shape = shared.dtype, shared.shape
    return _launch(name, inputs, None, variant, dtype, in_features, shape, k, dtype)


def tq1_0_qmv(
    x: mx.array,
    rows: mx.array,
    scales: mx.array,
    indices: mx.array,
    *,
    blocks: mx.array | None = None,
    variant: Variant | None = None,
) -> mx.array:
    """Multiply vectors by experts' matrices, for many (vector, expert) pairs.

    Args:
        x: (vectors, in) float32, float16 or bfloat16; each is used for `pairs / vectors` pairs.
        rows: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32.
        indices: (pairs,) uint32, each below `experts`; the pairs of the first vector come first.
        blocks: see `tq1_0_swiglu`.
        variant: see `tq1_0_swiglu`.

    Returns:
        (pairs, out) float32.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_qmv"
    vectors, in_features = check_matrix(name, "x", x)
    _, out_features = _rows(name, "rows", rows, scales, in_features)
    if indices.ndim != 1 or indices.dtype != mx.uint32:
        raise ValueError(f"{name}: indices are {described(indices)}; expected (pairs,) uint32")
    pairs = indices.size
    if pairs % max(vectors, 1) or (pairs > 0 and vectors == 0):
        raise ValueError(f"{name}: {pairs} pairs are not a multiple of {vectors} vectors")
    if pairs == 0:
        return mx.zeros((0, out_features))
    inputs = [x, rows, scales, indices]
    shape = (pairs, out_features)
    return _launch(name, inputs, blocks, variant, x.dtype, in_features, shape, pairs // vectors)


def tq1_0_to_affine2(rows: mx.array, in_features: int) -> mx.array:
    """Convert rows of trits to MLX affine 2-bit codes, like `rows_to_affine2`.

    Args:
        rows: (..., row_bytes) uint8.
        in_features: number of trits in a row, without padding.

    Returns:
        (..., padded / 16) uint32: `padded_width(in_features)` codes in a row.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_to_affine2"
    check_size(name, "in features", in_features)
    pitch, width = row_bytes(in_features), padded_width(in_features) // 16
    if rows.dtype != mx.uint8 or rows.ndim < 1 or rows.shape[-1] != pitch:
        raise ValueError(
            f"{name}: rows are {described(rows)}; expected uint8 rows of {pitch} bytes"
            f" for {in_features} trits"
        )
    shape = (*rows.shape[:-1], width)
    count = rows.size // pitch
    if count == 0:
        return mx.zeros(shape, mx.uint32)
    if not can_convert(rows, in_features):
        raise ValueError(f"{name}: {count} rows of {in_features} trits are too many for one grid")
    threads = _conversion_threads(rows)
    return built_kernel(name)(
        inputs=[rows],
        template=[("BLOCKS", pitch // BLOCK_BYTES), ("WIDTH", width)],
        grid=(threads, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint32],
    )[0]


def _conversion_threads(rows: mx.array) -> int:
    return rows.size // BLOCK_BYTES


def _launch(
    name: str,
    inputs: list[mx.array],
    blocks: mx.array | None,
    variant: Variant | None,
    dtype: mx.Dtype,
    in_features: int,
    shape: tuple[int, ...],
    share: int,
    output_dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Launch a decode kernel.

    Args:
        name: the kernel.
        inputs: its inputs but the blocks.
        blocks: see `tq1_0_swiglu`.
        variant: see `tq1_0_swiglu`.
        dtype: dtype of x or of the result.
        in_features: columns of the matrices.
        shape: shape of the output, (tokens or pairs, out).
        share: number of successive pairs that use one vector.
        output_dtype: dtype of the output.
    """
    columns, out_features = shape
    check_size(name, "elements", max(inputs[0].size, columns * out_features))
    template = [("T", dtype), ("K", in_features), ("N", out_features)]
    size = 1 if blocks is None else block_size(name, blocks)
    if blocks is not None:
        columns = blocks.shape[0]
        variant = variant or block_variant(name, size, dtype)
    variant = variant or saved_variant(name) or VARIANTS[name]
    variant = variant.fitted(in_features, out_features)
    if "blocks" in KERNEL_ARGUMENTS[name][0]:
        # Without blocks, an input takes their place.
        inputs = [*inputs, inputs[-1] if blocks is None else blocks]
        loaders = variant.simdgroups if _loads_together(size, dtype) else 1
        template += [("SHARE", share), ("M", size), ("LOADERS", loaders)]
    width = 32 * variant.simdgroups
    groups = -(-out_features // (variant.rows * variant.simdgroups))
    return built_kernel(name)(
        inputs=inputs,
        template=[
            *template,
            ("DECODE", DECODES.index(variant.decode)),
            ("ROWS", variant.rows),
            ("PIECES", variant.pieces),
            ("SIMDGROUPS", variant.simdgroups),
        ],
        grid=(width * groups, columns, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[shape],
        output_dtypes=[output_dtype],
    )[0]


def _rows(
    name: str, argument: str, rows: mx.array, scales: mx.array, in_features: int
) -> tuple[int, int]:
    check_size(name, "in features", in_features)
    pitch = row_bytes(in_features)
    if rows.ndim != 3 or rows.dtype != mx.uint8 or rows.shape[-1] != pitch:
        raise ValueError(
            f"{name}: {argument} is {described(rows)}; expected (experts, out, {pitch}) uint8"
            f" for rows of {in_features} trits"
        )
    experts, out_features, _ = rows.shape
    check_size(name, "stored experts", experts)
    check_size(name, "out features", out_features)
    if scales.shape != (experts, out_features) or scales.dtype != mx.float32:
        raise ValueError(
            f"{name}: scales of {argument} are {described(scales)};"
            f" expected {(experts, out_features)} float32"
        )
    return experts, out_features


def block_variant(name: str, size: int, dtype: mx.Dtype) -> Variant:
    """The default variant for blocks. If simdgroups load together, they are up to 4.

    With 8 of them, the registers of blocks of 8 leave room for a single threadgroup on a core.
    """
    variant = BLOCK_VARIANTS[name][size]
    return replace(variant, simdgroups=min(size, 4)) if _loads_together(size, dtype) else variant


def _loads_together(size: int, dtype: mx.Dtype) -> bool:
    """Whether the simdgroups of a threadgroup load a block's vectors for one another.

    They do if the vectors are more than a cache holds, or have to be converted.
    """
    return size == 8 or (size > 1 and dtype == mx.bfloat16)


def block_size(name: str, blocks: mx.array) -> int:
    """The most pairs of a block; raises a ValueError that names the kernel if it is unsupported."""
    sizes = BLOCK_VARIANTS["tq1_0_qmv"]
    if blocks.ndim != 2 or blocks.dtype != mx.uint32 or blocks.shape[1] - 1 not in sizes:
        raise ValueError(
            f"{name}: blocks are {described(blocks)}; expected (blocks, 1 + pairs) uint32 with"
            f" {', '.join(map(str, sizes))} pairs"
        )
    return blocks.shape[1] - 1


def _experts_per_token(name: str, indices: mx.array, tokens: int) -> int:
    if indices.ndim != 2 or indices.dtype != mx.uint32 or indices.shape[0] != tokens:
        raise ValueError(f"{name}: indices are {described(indices)}; expected ({tokens}, k) uint32")
    check_size(name, "experts per token", indices.shape[1])
    return indices.shape[1]
