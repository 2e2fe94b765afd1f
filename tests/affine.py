"""MLX's affine quantization in NumPy, as mx.quantize and mx.dequantize of MLX 0.32 do it on a CPU.

Bit for bit the same on x86-64, which tests/test_reference.py checks; nothing here imports MLX.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.reference import Array, ReferenceModel
from tests.tensor_file import rounded


def affine_quantize(
    w: Array, group_size: int, bits: int, dtype: str = "F32"
) -> tuple[Array, Array, Array]:
    """Codes (out, in) uint8, scales and biases (out, in / group_size) float32 of w (out, in).

    The group's end of larger magnitude becomes the bias, exactly; the scale is then adjusted so
    that 0 is (almost) hit by a code, and is negative when that end is the maximum. `dtype` is the
    storage type of w: scales and biases are rounded to it after the codes are found.
    """
    groups = rounded(w, dtype).reshape(*w.shape[:-1], -1, group_size)
    top = np.float32(2**bits - 1)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(np.abs(low) > np.abs(high), scale, -scale)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    steps = np.rint(edge / scale)  # of the code for 0
    bias = np.where(steps == 0, np.float32(0), edge)
    scale = np.where(steps == 0, scale, edge / np.where(steps == 0, np.float32(1), steps))
    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, top)
    return codes.astype(np.uint8).reshape(w.shape), rounded(scale, dtype), rounded(bias, dtype)


def affine_dequantize(codes: Array, scales: Array, biases: Array, dtype: str = "F32") -> Array:
    """scale · code + bias, (out, in) float32, with product and sum each rounded to `dtype`."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    product = rounded(groups * scales[..., None], dtype)
    return rounded(product + biases[..., None], dtype).reshape(codes.shape)


def affine_codes(packed: Array, bits: int) -> Array:
    """The codes (out, in) uint8 in MLX's packed uint32 (out, in · bits / 32), bits 2, 4 or 8."""
    codes = packed[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
    return codes.astype(np.uint8).reshape(*packed.shape[:-1], -1)


def with_quantized_base(
    model: ReferenceModel, group_size: int, bits: int, dtype: str = "F32"
) -> ReferenceModel:
    """The model whose base matrices are dequantize(quantize(w)): what a tier computes with.

    Embedding, head, attention and dense or shared FFN are quantized where group_size divides
    their `in`; norms, biases, router, alphas and experts are not.
    """

    def convert(w: Array) -> Array:
        if w.ndim != 2 or w.shape[1] % group_size:
            return w
        return affine_dequantize(*affine_quantize(w, group_size, bits, dtype), dtype)

    return replace(
        model,
        embedding=convert(model.embedding),
        lm_head=None if model.lm_head is None else convert(model.lm_head),
        layers=[
            replace(layer, weights={key: convert(w) for key, w in layer.weights.items()})
            for layer in model.layers
        ],
    )
