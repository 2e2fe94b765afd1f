"""Rows of weights as trits and one scale each, and the gradient that passes by the rounding."""

from typing import Literal

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.gradients import custom
from outlier_mlx.ternary.two_bits import pack_twos

Method = Literal["lloyd", "absmean"]
# The least and the largest scale that float16 holds well.
_LEAST, _MOST = 2.0**-20, 65504.0


def ternarise(latent: mx.array, method: Method = "lloyd") -> tuple[mx.array, mx.array]:
    """Round each row of weights to trits times a scale.

    Args:
        latent: (..., out, in) float32.
        method: how a row's scale is chosen; see `row_scales`.

    Returns:
        Trits of the shape of `latent`, float32, each the nearest to weight / scale; and scales
        (..., out, 1) float32, numbers that float16 holds. Neither has a gradient.
    """
    latent = mx.stop_gradient(latent)
    scales = as_stored(row_scales(latent, method))
    return mx.where(mx.abs(latent) > scales / 2, mx.sign(latent), 0.0), scales


def row_scales(latent: mx.array, method: Method) -> mx.array:
    """The scale of each row, before it is rounded.

    With "lloyd", the squared error of the row is the least of all scales and trits. If the n
    largest magnitudes, whose sum is S, get a trit other than 0, the best scale is S / n, and the
    squared error is that of zeros less S^2 / n; so n is where that is largest. (It is the fixed
    point of Lloyd and Max for three levels, one of them 0.) With "absmean", it is the mean
    magnitude, as in BitNet b1.58.

    Args:
        latent: (..., out, in) float32.
        method: "lloyd" or "absmean".

    Returns:
        (..., out, 1) float32.
    """
    magnitudes = mx.abs(latent)
    if method == "absmean":
        return magnitudes.mean(axis=-1, keepdims=True)
    sums = mx.cumsum(mx.sort(magnitudes, axis=-1)[..., ::-1], axis=-1)
    counts = mx.arange(1, latent.shape[-1] + 1).astype(mx.float32)
    best = mx.argmax(mx.square(sums) / counts, axis=-1, keepdims=True)
    return mx.take_along_axis(sums, best, axis=-1) / (best + 1).astype(mx.float32)


def as_stored(scales: mx.array) -> mx.array:
    """Scales as float16 holds them, float32; the gradient is that of `scales`."""
    held = mx.clip(mx.stop_gradient(scales), _LEAST, _MOST)
    rounded = held.astype(mx.float16).astype(mx.float32)
    return _passed(scales, rounded)


def relative_error(latent: mx.array, trits: mx.array, scales: mx.array) -> float:
    """Root of the squared error of trits times scales, relative to that of zeros."""
    left = mx.square(latent - trits * scales).sum() / mx.maximum(mx.square(latent).sum(), 1e-30)
    return float(mx.sqrt(left))


def latent_product(x: mx.array, latent: mx.array, method: Method) -> mx.array:
    """x times the rounded rows; the gradient of `latent` is that of unrounded ones.

    Straight-through estimation (Bengio et al., arXiv 1308.3432). The trits are multiplied first,
    and are exact in every dtype of x.

    Args:
        x: (..., in), any activation dtype.
        latent: (out, in) float32.
        method: see `row_scales`.

    Returns:
        (..., out) float32.
    """
    trits, scales = ternarise(latent, method)
    return _straight(x, latent, trits.astype(x.dtype), scales[:, 0])


def packed(trits: np.ndarray) -> mx.array:
    """Trits (..., in) int8 in two bits each: (..., in / 4) uint8. `in` is a multiple of 4."""
    return mx.array(pack_twos(trits))


def unpacked(codes: mx.array, dtype: mx.Dtype) -> mx.array:
    """The trits (..., 4 n) of `packed` codes (..., n) uint8, in a float dtype."""
    digits = (codes[..., None] >> mx.array([0, 2, 4, 6], mx.uint8)) & 3
    return digits.flatten(-2).astype(dtype) - 1


@custom
def _passed(exact: mx.array, rounded: mx.array) -> mx.array:
    """`rounded`, with the gradient of `exact`; a sum of differences would not be exact."""
    return rounded


@_passed.vjp
def _passed_vjp(
    given: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    return cotangent, mx.zeros_like(given[1])


@custom
def _straight(x: mx.array, latent: mx.array, trits: mx.array, scales: mx.array) -> mx.array:
    return (x @ trits.T).astype(mx.float32) * scales


@_straight.vjp
def _straight_vjp(
    given: tuple[mx.array, ...], cotangent: mx.array, out: mx.array
) -> tuple[mx.array, ...]:
    x, _, trits, scales = given
    of_x = (cotangent * scales).astype(x.dtype) @ trits
    rows = cotangent.astype(x.dtype).flatten(0, -2)
    of_latent = (rows.T @ x.flatten(0, -2)).astype(mx.float32)
    # Before the gradient goes on to what is below, so that rows and x of no other layer wait.
    (of_x,) = mx.depends([of_x], [of_latent])
    return of_x, of_latent, mx.zeros_like(trits), mx.zeros_like(scales)
