"""Products with quantized matrices whose scales and biases are trained, in little memory.

MLX's own gradient of a scale needs that of all weights of the matrix in float32, and does not say
when it lets go of it. Here some rows of one matrix are worked on at a time.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.calls import replace_method
from outlier_mlx.engine.gradients import custom

#: Weights that are worked on at a time.
WEIGHTS = 1 << 22
#: Arrays of so many numbers that are there then, at most.
ARRAYS = 4


@contextmanager
def row_by_row(model: nn.Module, *, scales: bool) -> Iterator[None]:
    """Until the block ends, quantized matrices multiply by `quantized_product`.

    Args:
        model: its `nn.QuantizedLinear` layers and the head of an `nn.QuantizedEmbedding` do.
        scales: whether gradients of scales and biases are taken.
    """

    def linear(module: nn.QuantizedLinear, x: mx.array) -> mx.array:
        y = quantized_product(x, module, scales=scales)
        return y + module.bias if "bias" in module else y

    def head(module: nn.QuantizedEmbedding, x: mx.array) -> mx.array:
        return quantized_product(x, module, scales=scales)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.QuantizedLinear):
                stack.callback(replace_method(module, "__call__", linear))
            elif isinstance(module, nn.QuantizedEmbedding):
                stack.callback(replace_method(module, "as_linear", head))
        yield


def quantized_product(
    x: mx.array, module: nn.QuantizedLinear | nn.QuantizedEmbedding, *, scales: bool
) -> mx.array:
    """x times the transposed matrix.

    The gradient of a scale is the sum over its group of the weights' gradients times their codes,
    that of a bias their sum. Rows of the matrix are independent, so cutting it changes no sum. What
    is below the product waits for these gradients, so those of other matrices are not begun.

    Args:
        x: (..., in).
        module: has `weight` (out, packed), `scales` and `biases` (out, groups).
        scales: whether the gradients of both are wanted; they are 0 otherwise.

    Returns:
        (..., out), of the dtype of x.
    """
    how = {"group_size": module.group_size, "bits": module.bits}
    codes, on_cpu = module.weight, mx.default_device() == mx.cpu
    count = max(1, WEIGHTS // x.shape[-1])
    blocks = [slice(at, at + count) for at in range(0, len(codes), count)]

    @custom
    def product(x: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        if not on_cpu:
            return mx.quantized_matmul(x, codes, scale, bias, transpose=True, **how)
        # There, MLX multiplies floats many times faster than codes.
        found: list[mx.array] = []
        for rows in blocks:
            before = found[-1:] or [x]
            dense = mx.dequantize(
                *mx.depends([codes[rows], scale[rows], bias[rows]], before), **how
            )
            found.append(x @ dense.T)
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    @product.vjp
    def product_vjp(
        given: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        x, scale, bias = given
        flat = x.reshape(-1, x.shape[-1])
        rows_of = cotangent.reshape(-1, cotangent.shape[-1])
        of_x, of_scale, of_bias = mx.zeros_like(flat), [], []
        if not on_cpu:
            of_x = mx.quantized_matmul(rows_of, codes, scale, bias, transpose=False, **how)
        before: list[mx.array] = [of_x]
        for rows in blocks if on_cpu or scales else []:
            wanted = rows_of[:, rows], codes[rows], scale[rows], bias[rows]
            part, code, step, low = mx.depends(list(wanted), before)
            if on_cpu:
                of_x = of_x + part @ mx.dequantize(code, step, low, **how)
                before = [of_x]
            if scales:
                digits = mx.dequantize(code, mx.ones_like(step), mx.zeros_like(low), **how)
                of_weights = (part.T @ flat).astype(mx.float32)
                groups = (*step.shape, module.group_size)
                of_bias.append(of_weights.reshape(groups).sum(axis=-1))
                of_scale.append((of_weights * digits).reshape(groups).sum(axis=-1))
                before = [of_x, of_scale[-1], of_bias[-1]]
        (of_x,) = mx.depends([of_x], before)
        if not scales:
            return of_x.reshape(x.shape), mx.zeros_like(scale), mx.zeros_like(bias)
        both = (mx.concatenate(found).astype(scale.dtype) for found in (of_scale, of_bias))
        return of_x.reshape(x.shape), *both

    found: mx.array = product(x, module.scales, module.biases)
    return found
