"""The rotation that some ternary models apply to the inputs of their linear layers.

A rotated layer stores W H S in place of W, where S is a diagonal of signs and H the normalised
Walsh-Hadamard transform, in blocks along the input. Both are their own inverses, so the layer's
product is (W H S) (H S x). Layers that read the same input share one rotated input.
"""

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx

from .launching import ACTIVATIONS, LIMITS, built_kernel
from .ops import use_metal, with_gradient_of

# Blocks that `tq1_0_rotate` takes.
ROTATED_BLOCKS = (512, 1024, 2048, 4096, 8192)
# Elements of a block in each of its threads.
ELEMENTS = 32


def rotate(
    x: mx.array, signs: mx.array, block: int, *, inverse: bool = False, training: bool = False
) -> mx.array:
    """Rotate x: signs, then the transform of each block of the last axis.

    With H[i][j] = (-1)^popcount(i & j) / sqrt(block), this is H (signs * x). It is computed in
    float32 and rounded once.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        signs: (in,) float16, every value 1 or -1.
        block: elements in a block, a power of two that divides `in`.
        inverse: rotate back: the transform, then the signs.
        training: use plain MLX only.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a dtype, shape or block is not supported.
    """
    wide = x.shape[-1] if x.ndim else 0
    if x.dtype not in ACTIVATIONS or wide == 0 or block < 2 or block & (block - 1) or wide % block:
        raise ValueError(
            f"rotation: x is {x.shape} {x.dtype}, blocks are {block}; expected float32, float16 or"
            " bfloat16, and blocks of a power of two that divides the last dimension"
        )
    if signs.shape != (wide,) or signs.dtype != mx.float16:
        raise ValueError(
            f"rotation: signs are {signs.shape} {signs.dtype}; expected ({wide},) float16"
        )
    if training or not (use_metal() and can_rotate(x.size // wide, wide, block)):
        return _rotated(x, signs, block, inverse)
    return _rotation(block, inverse)(x.reshape(-1, wide), signs).reshape(x.shape)


def can_rotate(tokens: int, in_features: int, block: int) -> bool:
    """Whether `tq1_0_rotate` takes these sizes."""
    wide, most = LIMITS["in features"][1], LIMITS["tokens"][1]
    fits = 0 < tokens <= most and in_features <= wide
    return fits and block in ROTATED_BLOCKS and in_features % block == 0


def tq1_0_rotate(x: mx.array, signs: mx.array, *, block: int, inverse: bool = False) -> mx.array:
    """Rotate x (tokens, in) in one launch; see `rotate`.

    Raises:
        ValueError: a dtype, shape or block is not supported.
    """
    fits = x.ndim == 2 and x.dtype in ACTIVATIONS and can_rotate(x.shape[0], x.shape[1], block)
    if not fits or signs.shape != x.shape[1:] or signs.dtype != mx.float16:
        raise ValueError(
            f"tq1_0_rotate: x is {x.shape} {x.dtype}, signs are {signs.shape} {signs.dtype}, blocks"
            f" are {block}; expected (tokens, in) float32, float16 or bfloat16, (in,) float16,"
            f" and blocks of {', '.join(map(str, ROTATED_BLOCKS))}"
        )
    tokens, in_features = x.shape
    width = max(block // ELEMENTS, 32)
    groups = -(-in_features // (width * ELEMENTS))
    return built_kernel("tq1_0_rotate")(
        inputs=[x, signs],
        template=[("T", x.dtype), ("K", in_features), ("B", block), ("INVERSE", inverse)],
        grid=(width * groups, tokens, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


@cache
def _rotation(block: int, inverse: bool) -> Callable[[mx.array, mx.array], mx.array]:
    """`tq1_0_rotate` with the gradient of `_rotated`."""
    plain = partial(_rotated, block=block, inverse=inverse)
    return with_gradient_of(plain, partial(tq1_0_rotate, block=block, inverse=inverse), 1)


def _rotated(x: mx.array, signs: mx.array, block: int, inverse: bool) -> mx.array:
    """`rotate` in plain MLX, for any block that is a power of two."""
    values = x.astype(mx.float32)
    if not inverse:
        values = values * signs
    blocks = mx.unflatten(values, -1, (-1, block))
    values = mx.flatten(mx.hadamard_transform(blocks, scale=block**-0.5), -2)
    if inverse:
        values = values * signs
    return values.astype(x.dtype)
