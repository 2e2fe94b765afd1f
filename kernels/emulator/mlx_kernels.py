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
    _check_dtypes("qmv", x, scales, biases)
    if scales.shape != (out, wide // group_size):
        raise LaunchError(f"qmv: x {x.shape} and scales {scales.shape} do not match")
    kernel = compiled(
        _fast("affine_qmv", wide, out), f"<{_TYPES[x.dtype]}, {group_size}, {bits}, false>"
    )
    inputs, sizes = [weight, scales, biases, x], [_ints(wide), _ints(out)]
    unused = len(kernel.signature.buffers) - len(inputs) - 1 - len(sizes)
    sizes += [launch.Buffer(np.zeros(8, np.uint8))] * unused  # shapes and strides of a batch
    grid = (32 * tokens, -(-out // 8) * 2, 1)
    return _product(kernel, inputs, x, (tokens, out), sizes, grid, 2)


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
    _check_dtypes("gather_qmv", x, scales, biases)
    if x.shape != (tokens, wide) or scales.shape != (experts, out, wide // group_size):
        raise LaunchError(f"gather_qmv: x {x.shape} and scales {scales.shape} do not match")
    kernel = compiled(
        _fast("affine_gather_qmv", wide, out), f"<{_TYPES[x.dtype]}, {group_size}, {bits}>"
    )
    lhs = mx.broadcast_to(mx.arange(tokens, dtype=mx.uint32)[:, None], (tokens, k)).flatten()
    inputs = [weight, scales, biases, x, lhs, indices.flatten().astype(mx.uint32)]
    sizes = [_ints(wide), _ints(out)]
    sizes += [_ints(1), _ints(tokens, 1, wide), _strides(wide, wide, 1)]  # x, (tokens, 1, in)
    sizes += [_ints(1), _ints(*weight.shape)]  # one batch dimension, as of x
    for array in (weight, scales, biases):
        sizes.append(_strides(array.shape[1] * array.shape[2], array.shape[2], 1))
    sizes += [_ints(1), _ints(tokens * k), _strides(1), _strides(1)]  # the indices, flat
    grid = (32, -(-out // 8) * 2, tokens * k)
    return _product(kernel, inputs, x, (tokens, k, out), sizes, grid, 2)


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
    _check_dtypes("gather_qmm", x, scales, biases)
    if indices.shape != (pairs,) or scales.shape != (experts, out, wide // group_size):
        raise LaunchError(f"gather_qmm: x {x.shape} and scales {scales.shape} do not match")
    if wide % _TILE_DEPTH or out % _TILE_COLUMNS:  # function constants are true in the emulator
        raise LaunchError(f"gather_qmm: tiles do not divide {out} x {wide}")
    tile = f"{TILE_PAIRS}, {_TILE_COLUMNS}, {_TILE_DEPTH}, 1, {_TILE_SIMDGROUPS}, true"
    kernel = compiled("affine_gather_qmm_rhs", f"<{_TYPES[x.dtype]}, {group_size}, {bits}, {tile}>")
    found = np.array(indices)
    starts = np.searchsorted(found, np.arange(experts)).astype(np.int32)
    runs = np.diff(np.append(starts, pairs))
    inputs = [x, weight, scales, biases, mx.array(starts)]
    sizes = [_ints(size) for size in (pairs, out, wide, experts)]
    tiles = int((-(-runs // TILE_PAIRS)).sum())
    grid = (32 * (out // _TILE_COLUMNS), _TILE_SIMDGROUPS * tiles, 1)
    return _product(kernel, inputs, x, (pairs, out), sizes, grid, _TILE_SIMDGROUPS)


def _check_dtypes(name: str, x: mx.array, scales: mx.array, biases: mx.array) -> None:
    if x.dtype not in _TYPES or scales.dtype != x.dtype or biases.dtype != x.dtype:
        raise LaunchError(f"{name}: x, scales and biases must share one floating dtype")


def _ints(*values: int) -> launch.Buffer:
    return launch.Buffer(np.array(values, np.int32).view(np.uint8), item=4)


def _strides(*values: int) -> launch.Buffer:
    return launch.Buffer(np.array(values, np.int64).view(np.uint8), item=8)


def _product(
    kernel: CompiledKernel,
    inputs: list[mx.array],
    x: mx.array,
    shape: tuple[int, ...],
    sizes: list[launch.Buffer],
    grid: launch.Size,
    simdgroups: int,
) -> Product:
    """Launches a kernel whose buffers are inputs, the product of x (of a shape), and sizes."""
    buffers = [launch.Buffer(memory(mx.contiguous(a))[0], item=a.dtype.size) for a in inputs]
    buffers.append(launch.Buffer(filled(shape, x.dtype, None), written=True, item=x.dtype.size))
    outcome = launch.run(kernel, [*buffers, *sizes], grid, (32, simdgroups, 1), count=True)
    assert outcome.counts is not None
    y = as_array(outcome.outputs[len(inputs)], shape, x.dtype)
    return Product(y, price(kernel, outcome.counts), y.size * x.shape[-1])


def compiled(name: str, arguments: str) -> CompiledKernel:
    """Compiles a kernel of MLX's `quantized.h`.

    Args:
        name: name of the kernel.
        arguments: its template arguments in C++ syntax: "<float16_t, 128, 2>".
    """
    header = (mlx_headers() / _INCLUDES[-1]).read_text(encoding="utf-8")
    return compile_kernel("", parse(header, name, arguments), _INCLUDES, header, strict=False)
