"""MLX's own quantized kernels, from the Metal headers in its wheel, for comparison with ours."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import launch
from .arrays import as_array, filled, memory
from .compiler import mlx_headers
from .cost import Cost, price
from .errors import LaunchError
from .kernel import UTILS, CompiledKernel, compile_kernel
from .signature import parse

_FOLDER = "mlx/backend/metal/kernels/"
_INCLUDES = (
    UTILS,
    _FOLDER + "steel/gemm/gemm.h",
    _FOLDER + "quantized_utils.h",
    _FOLDER + "quantized.h",
)
_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}

# Pairs, columns and depth of a tile of `gather_qmm`, and its simdgroups.
TILE_PAIRS, _TILE_COLUMNS, _TILE_DEPTH, _TILE_SIMDGROUPS = 16, 32, 32, 2


@dataclass(frozen=True)
class Product:
    """The result of a product, and what it cost.

    Attributes:
        y: (tokens, out), (tokens, k, out) or (pairs, out), dtype of x.
        cost: cost of the launch.
        weights: number of multiplied weights: pairs · out · in.
    """

    y: mx.array
    cost: Cost
    weights: int


def qmv(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> Product:
    """The quantized matrix-vector product, by the kernel that MLX launches for it.

    For few tokens `mx.quantized_matmul` launches `affine_qmv_fast` when `in` is a multiple of 512
    and `out` of 8, else `affine_qmv`. Two simdgroups of a threadgroup make 8 rows for one token
    (mlx/backend/metal/quantized.cpp).

    Args:
        x: (tokens, in), float32, float16 or bfloat16.
        weight: (out, in · bits / 32), uint32, as `mx.quantize` packs it.
        scales: (out, in / group_size), dtype of x.
        biases: (out, in / group_size), dtype of x.
        group_size: number of weights in a group.
        bits: bits of a weight.

    Raises:
        LaunchError: shapes or dtypes do not match.
    """
    tokens, wide = x.shape
    out = weight.shape[0]
    if x.dtype not in _TYPES or scales.dtype != x.dtype or biases.dtype != x.dtype:
        raise LaunchError("qmv: x, scales and biases must share one floating dtype")
    if scales.shape != (out, wide // group_size):
        raise LaunchError(f"qmv: x {x.shape} and scales {scales.shape} do not match")
    kernel = compiled(
        _fast("affine_qmv", wide, out), f"<{_TYPES[x.dtype]}, {group_size}, {bits}, false>"
    )
    arrays = [memory(mx.contiguous(a))[0] for a in (weight, scales, biases, x)]
    buffers = [launch.Buffer(data) for data in arrays]
    buffers.append(
        launch.Buffer(filled((tokens, out), x.dtype, None), written=True, item=x.dtype.size)
    )
    for size in (wide, out):
        buffers.append(launch.Buffer(np.array([size], np.int32).view(np.uint8), item=4))
    unused = len(kernel.signature.buffers) - len(buffers)  # shapes and strides of a batch
    buffers += [launch.Buffer(np.zeros(8, np.uint8))] * unused
    grid = (32 * tokens, -(-out // 8) * 2, 1)
    outcome = launch.run(kernel, buffers, grid, (32, 2, 1), count=True)
    assert outcome.counts is not None
    return Product(
        as_array(outcome.outputs[4], (tokens, out), x.dtype),
        price(kernel, outcome.counts),
        tokens * out * wide,
    )


def _fast(name: str, wide: int, out: int) -> str:
    """The kernel that MLX chooses for a matrix of `out` rows of `wide` elements."""
    return f"{name}_fast" if wide % 512 == 0 and out % 8 == 0 else name


def gather_qmv(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    indices: mx.array,
    *,
    group_size: int,
    bits: int,
) -> Product:
    """The gathered quantized matrix-vector product, by the kernel that MLX launches for it.

    For few tokens `mx.gather_qmm` launches `affine_gather_qmv_fast` when `in` is a multiple of
    512 and `out` of 8, else `affine_gather_qmv`; two simdgroups of a threadgroup make 8 rows
    (mlx/backend/metal/quantized.cpp).

    Args:
        x: (tokens, in), float32, float16 or bfloat16.
        weight: (experts, out, in · bits / 32), uint32, as `mx.quantize` packs it.
        scales: (experts, out, in / group_size), dtype of x.
        biases: (experts, out, in / group_size), dtype of x.
        indices: (tokens, k), uint32: the experts of each token.
        group_size: number of weights in a group.
        bits: bits of a weight.

    Raises:
        LaunchError: shapes or dtypes do not match.
    """
    tokens, k = indices.shape
    wide = x.shape[-1]
    experts, out = weight.shape[:2]
    if x.dtype not in _TYPES or scales.dtype != x.dtype or biases.dtype != x.dtype:
        raise LaunchError("gather_qmv: x, scales and biases must share one floating dtype")
    if x.shape != (tokens, wide) or scales.shape != (experts, out, wide // group_size):
        raise LaunchError(f"gather_qmv: x {x.shape} and scales {scales.shape} do not match")
    kernel = compiled(
        _fast("affine_gather_qmv", wide, out), f"<{_TYPES[x.dtype]}, {group_size}, {bits}>"
    )
    lhs = mx.broadcast_to(mx.arange(tokens, dtype=mx.uint32)[:, None], (tokens, k)).flatten()
    arrays = [weight, scales, biases, x, mx.contiguous(lhs), indices.flatten().astype(mx.uint32)]
    buffers = [launch.Buffer(memory(mx.contiguous(a))[0], item=a.dtype.size) for a in arrays]
    buffers.append(
        launch.Buffer(filled((tokens, k, out), x.dtype, None), written=True, item=x.dtype.size)
    )

    def ints(*values: int) -> None:
        buffers.append(launch.Buffer(np.array(values, np.int32).view(np.uint8), item=4))

    def strides(*values: int) -> None:
        buffers.append(launch.Buffer(np.array(values, np.int64).view(np.uint8), item=8))

    ints(wide)
    ints(out)
    ints(1)  # batch dimensions of x, (tokens, 1, in)
    ints(tokens, 1, wide)
    strides(wide, wide, 1)
    ints(1)  # batch dimensions of the weight
    ints(*weight.shape)
    for array in (weight, scales, biases):
        strides(array.shape[1] * array.shape[2], array.shape[2], 1)
    ints(1)  # dimensions of the indices, as one
    ints(tokens * k)
    strides(1)
    strides(1)
    grid = (32, -(-out // 8) * 2, tokens * k)
    outcome = launch.run(kernel, buffers, grid, (32, 2, 1), count=True)
    assert outcome.counts is not None
    return Product(
        as_array(outcome.outputs[6], (tokens, k, out), x.dtype),
        price(kernel, outcome.counts),
        tokens * k * out * wide,
    )


def gather_qmm(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    indices: mx.array,
    *,
    group_size: int,
    bits: int,
) -> Product:
    """The gathered quantized matrix product for sorted pairs, by the kernel that MLX launches.

    `mx.gather_qmm` launches `affine_gather_qmm_rhs_nt` for at least 16 sorted pairs and 4 pairs an
    expert, unless the chip has matrix units of the M5 generation (mlx/backend/metal/quantized.cpp).
    A tile has up to 16 pairs of one expert. Before, another launch finds where each expert's pairs
    begin; here this is done on the host, and not counted.

    Args:
        x: (pairs, in), float32, float16 or bfloat16.
        weight: (experts, out, in · bits / 32), uint32, as `mx.quantize` packs it.
        scales: (experts, out, in / group_size), dtype of x.
        biases: (experts, out, in / group_size), dtype of x.
        indices: (pairs,), uint32 in ascending order: the expert of each pair.
        group_size: number of weights in a group.
        bits: bits of a weight.

    Raises:
        LaunchError: shapes or dtypes do not match, or sizes that no tile divides.
    """
    pairs, wide = x.shape
    experts, out = weight.shape[:2]
    if x.dtype not in _TYPES or scales.dtype != x.dtype or biases.dtype != x.dtype:
        raise LaunchError("gather_qmm: x, scales and biases must share one floating dtype")
    if indices.shape != (pairs,) or scales.shape != (experts, out, wide // group_size):
        raise LaunchError(f"gather_qmm: x {x.shape} and scales {scales.shape} do not match")
    if wide % _TILE_DEPTH or out % _TILE_COLUMNS:  # function constants are true in the emulator
        raise LaunchError(f"gather_qmm: tiles do not divide {out} x {wide}")
    sizes = f"{TILE_PAIRS}, {_TILE_COLUMNS}, {_TILE_DEPTH}, 1, {_TILE_SIMDGROUPS}, true"
    kernel = compiled(
        "affine_gather_qmm_rhs", f"<{_TYPES[x.dtype]}, {group_size}, {bits}, {sizes}>"
    )
    found = np.array(indices)
    starts = np.searchsorted(found, np.arange(experts)).astype(np.int32)
    runs = np.diff(np.append(starts, pairs))
    arrays = [x, weight, scales, biases, mx.array(starts)]
    buffers = [launch.Buffer(memory(mx.contiguous(a))[0], item=a.dtype.size) for a in arrays]
    buffers.append(
        launch.Buffer(filled((pairs, out), x.dtype, None), written=True, item=x.dtype.size)
    )
    for size in (pairs, out, wide, experts):
        buffers.append(launch.Buffer(np.array([size], np.int32).view(np.uint8), item=4))
    tiles = int((-(-runs // TILE_PAIRS)).sum())
    grid = (32 * (out // _TILE_COLUMNS), _TILE_SIMDGROUPS * tiles, 1)
    outcome = launch.run(kernel, buffers, grid, (32, _TILE_SIMDGROUPS, 1), count=True)
    assert outcome.counts is not None
    return Product(
        as_array(outcome.outputs[5], (pairs, out), x.dtype),
        price(kernel, outcome.counts),
        pairs * out * wide,
    )


def compiled(name: str, arguments: str) -> CompiledKernel:
    """Compiles a kernel of MLX's `quantized.h`.

    Args:
        name: name of the kernel.
        arguments: its template arguments in C++ syntax: "<float16_t, 128, 2>".
    """
    header = (mlx_headers() / _INCLUDES[-1]).read_text(encoding="utf-8")
    return compile_kernel("", parse(header, name, arguments), _INCLUDES, header, strict=False)
