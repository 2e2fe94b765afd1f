"""What `bench --kernels` times: a table of kernels, each in some forms.

An entry says what a kernel computes, twice: by its launcher, and in plain MLX. That is all that
`bench_kernels` needs, which checks and times.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.measure.bench_inputs import (
    Affine,
    Layer,
    conversions,
    decode_layers,
    first_block,
    grouped_layers,
    linears,
    rotations,
)
from outlier_mlx.runtime.affine2 import rows_to_affine2
from outlier_mlx.runtime.blocks import block_count, tq1_0_sort
from outlier_mlx.runtime.groups import SCALE_GROUPS, tq1_0_linear, tq1_0_qmv_groups
from outlier_mlx.runtime.kernels import tq1_0_down, tq1_0_qmv, tq1_0_swiglu, tq1_0_to_affine2
from outlier_mlx.runtime.rotation import ROTATED_BLOCKS, can_rotate, rotate, tq1_0_rotate
from outlier_mlx.runtime.routing import can_route, route, tq1_0_route
from outlier_mlx.runtime.variants import Variant
from outlier_mlx.upstream import swiglu

# The result of a launch: an array, or several.
Outputs = mx.array | tuple[mx.array, ...]

# Numbers of tokens that use the same experts, beside one.
TOGETHER = (2, 4, 8)
# Tokens whose pairs are sorted, with random experts, and pairs of a block then.
SORTED_TOKENS, SORTED_BLOCK = (8, 32), 4
# MLX's formats that kernels are compared with, by bits of a weight.
MLX_BITS = (2, 4)


@dataclass(frozen=True)
class Kernel:
    """A kernel to time.

    Attributes:
        name: name of its launcher.
        reads: the matrices of its inputs that it reads.
        waits: name of the input that depends on the launch before, in a chain, a small array; None:
            the order of launches is that of the chain, but a launch may begin before the last ends.
        ours: launches it; takes inputs, and a variant if it is `tuned`.
        plain: the same in MLX; takes inputs, the matrices in a format of MLX, and a dtype to
            compute in.
        bits: MLX's formats that it is compared with, by bits of a weight; none: `plain` gets no
            matrices.
        rounds: whether the result has the activation dtype; otherwise it is float32.
        tuned: whether it has variants.
    """

    name: str
    reads: tuple[str, ...]
    waits: str | None
    ours: Callable[..., Outputs]
    plain: Callable[[Any, list[Affine], mx.Dtype], Outputs]
    bits: tuple[int, ...] = MLX_BITS
    rounds: bool = False
    tuned: bool = True


@dataclass(frozen=True)
class Case:
    """A kernel on inputs of one form.

    Attributes:
        kernel: the kernel.
        form: what is special about the inputs; "" if nothing.
        build: makes the inputs; launches use them in a cycle.
        together: pairs of one expert that are multiplied together.
    """

    kernel: Kernel
    form: str
    build: Callable[[], Sequence[Any]]
    together: int = 1

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"{self.kernel.name}, {self.form}" if self.form else self.kernel.name


def _ours_swiglu(layer: Layer, variant: Variant) -> mx.array:
    given = (layer.x, *layer.gate, *layer.up, layer.indices)
    return tq1_0_swiglu(*given, blocks=layer.blocks, variant=variant)


def _plain_swiglu(layer: Layer, affine: list[Affine], dtype: mx.Dtype) -> mx.array:
    x = mx.expand_dims(layer.x.astype(dtype), (-2, -3))
    gate, up = (one.product(x, layer.places) for one in affine)
    return swiglu(gate, up).squeeze(-2)


def _ours_down(layer: Layer, variant: Variant) -> mx.array:
    given = (layer.h, *layer.down, layer.indices, layer.weights, layer.shared)
    return tq1_0_down(*given, blocks=layer.blocks, variant=variant)


def _plain_down(layer: Layer, affine: list[Affine], dtype: mx.Dtype) -> mx.array:
    y = affine[0].product(layer.h.astype(dtype)[..., None, :], layer.places).squeeze(-2)
    weights = layer.weights.astype(dtype)[..., None]
    return layer.shared.astype(dtype) + (y * weights).sum(axis=-2)


def _ours_qmv(layer: Layer, variant: Variant) -> mx.array:
    given = (layer.x, *layer.gate, layer.indices.flatten())
    return tq1_0_qmv(*given, blocks=layer.blocks, variant=variant)


def _plain_qmv(layer: Layer, affine: list[Affine], dtype: mx.Dtype) -> mx.array:
    x = mx.expand_dims(layer.x.astype(dtype), (-2, -3))
    return affine[0].product(x, layer.places).reshape(layer.pairs, -1)


DECODING = (
    Kernel("tq1_0_swiglu", ("gate", "up"), "x", _ours_swiglu, _plain_swiglu),
    Kernel("tq1_0_down", ("down",), "weights", _ours_down, _plain_down, rounds=True),
    Kernel("tq1_0_qmv", ("gate",), "x", _ours_qmv, _plain_qmv),
)


def _ours_sort(layer: Layer) -> mx.array:
    return tq1_0_sort(layer.indices, layer.gate[0].shape[0], SORTED_BLOCK)


def _plain_sort(layer: Layer, _: list[Affine], dtype: mx.Dtype) -> mx.array:
    experts, pairs = layer.gate[0].shape[0], layer.indices.flatten()
    order = mx.argsort(pairs * pairs.size + mx.arange(pairs.size, dtype=mx.uint32))
    of = pairs[order]
    counts = (of[:, None] == mx.arange(experts)).sum(axis=0)
    before = mx.cumsum(counts, inclusive=False)
    blocks = -(-counts // SORTED_BLOCK)
    at = mx.arange(pairs.size) - before[of]
    block = mx.cumsum(blocks, inclusive=False)[of] + at // SORTED_BLOCK
    found = mx.zeros((block_count(pairs.size, experts, SORTED_BLOCK), 1 + SORTED_BLOCK), mx.uint32)
    found[block, 1 + at % SORTED_BLOCK] = order.astype(mx.uint32)
    return found.at[block, mx.zeros_like(block)].add(mx.ones_like(block).astype(mx.uint32))


SORTING = Kernel(
    "tq1_0_sort", ("indices",), "indices", _ours_sort, _plain_sort, bits=(), tuned=False
)


def _ours_route(layer: Layer) -> tuple[mx.array, mx.array]:
    k = layer.indices.shape[1]
    return tq1_0_route(layer.x, layer.router.weight, layer.alpha, k=k)


def _plain_route(layer: Layer, _: list[Affine], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    x, k = layer.x.astype(dtype), layer.indices.shape[1]
    return route(x, layer.router, k, layer.alpha, training=True)


ROUTING = Kernel("tq1_0_route", ("router",), "x", _ours_route, _plain_route, bits=(), tuned=False)


def _ours_grouped(layer: Layer) -> mx.array:
    return tq1_0_qmv_groups(layer.x, *layer.gate, layer.indices.flatten())


GROUPED = Kernel(
    "tq1_0_qmv_groups",
    ("gate",),
    "x",
    _ours_grouped,
    _plain_qmv,
    tuned=False,
)
LINEAR = Kernel(
    "tq1_0_linear",
    ("rows",),
    "x",
    lambda given: tq1_0_linear(given.x, given.rows, given.scales),
    lambda given, affine, dtype: affine[0].product(given.x.astype(dtype)),
    rounds=True,
    tuned=False,
)
CONVERSION = Kernel(
    "tq1_0_to_affine2",
    ("rows",),
    None,
    lambda given: tq1_0_to_affine2(given.rows, given.in_features),
    lambda given, _, dtype: rows_to_affine2(
        given.rows, mx.ones(given.rows.shape[:-1]), given.in_features
    )[0],
    bits=(),
    tuned=False,
)
ROTATION = Kernel(
    "tq1_0_rotate",
    ("x",),
    "x",
    lambda given: tq1_0_rotate(given.x, given.signs, block=given.block),
    lambda given, _, dtype: rotate(given.x.astype(dtype), given.signs, given.block, training=True),
    bits=(),
    rounds=True,
    tuned=False,
)


def cases(model: nn.Module, tokens: int, dtype: mx.Dtype) -> list[Case]:
    """Everything to time on a tier.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokens: number of tokens decoded at a time, with random experts. For one token, there are
            also tokens that share experts, and vectors that share a matrix, `TOGETHER` at a time.
        dtype: activation dtype.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    given = model, tokens, dtype
    makers = (_decoding, _routing, _sorting, _grouped, _linear, _others)
    return [case for make in makers for case in make(*given)]


def _decoding(model: nn.Module, tokens: int, dtype: mx.Dtype) -> Iterator[Case]:
    for kernel in DECODING:
        yield Case(kernel, "", partial(decode_layers, model, tokens, dtype))
        for together in TOGETHER if tokens == 1 else ():
            form = f"{together} tokens for the same experts"
            build = partial(decode_layers, model, together, dtype, alike=True)
            yield Case(kernel, form, build, together)


def _routing(model: nn.Module, tokens: int, dtype: mx.Dtype) -> Iterator[Case]:
    block = first_block(model)
    experts, columns = block.gate.weight.shape
    if can_route(tokens, columns, experts, block.top_k):
        yield Case(ROUTING, "", partial(decode_layers, model, tokens, dtype))


def _sorting(model: nn.Module, _: int, dtype: mx.Dtype) -> Iterator[Case]:
    for many in SORTED_TOKENS:
        yield Case(SORTING, f"{many} tokens", partial(decode_layers, model, many, dtype))


def _grouped(model: nn.Module, tokens: int, dtype: mx.Dtype) -> Iterator[Case]:
    for group in _groups(model):
        build = partial(grouped_layers, model, tokens, group, dtype)
        yield Case(GROUPED, f"groups of {group}", build)


def _linear(model: nn.Module, tokens: int, dtype: mx.Dtype) -> Iterator[Case]:
    for group in (0, *_groups(model)):
        scales = f"scales of groups of {group}" if group else "scales of rows"
        for vectors in (1, *TOGETHER) if tokens == 1 else (tokens,):
            form = f"{scales}, {vectors} vector{'s' if vectors > 1 else ''}"
            yield Case(LINEAR, form, partial(linears, model, vectors, group, dtype))


def _others(model: nn.Module, tokens: int, dtype: mx.Dtype) -> Iterator[Case]:
    yield Case(CONVERSION, "", partial(conversions, model))
    columns = first_block(model).gate.weight.shape[1]
    for block in ROTATED_BLOCKS:
        if can_rotate(tokens, columns, block):
            build = partial(rotations, tokens, columns, block, dtype)
            yield Case(ROTATION, f"blocks of {block}", build)


def _groups(model: nn.Module) -> list[int]:
    """The groups that divide the hidden size."""
    columns = first_block(model).gate.weight.shape[1]
    return [size for size in SCALE_GROUPS if columns % size == 0]
