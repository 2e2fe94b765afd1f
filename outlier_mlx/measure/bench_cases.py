"""Inputs for timing the decode kernels: a tier's own experts, random activations."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from outlier_mlx.errors import OutlierError
from outlier_mlx.runtime.affine2 import affine_product, rows_to_affine2
from outlier_mlx.runtime.kernels import tq1_0_down, tq1_0_qmv, tq1_0_swiglu
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.switch import TernarySwitchGLU
from outlier_mlx.runtime.variants import Variant

# Layers are taken until what they read is larger than any cache.
ENOUGH_BYTES = 1 << 29

Packed = tuple[mx.array, mx.array]  # rows (experts, out, row_bytes) and scales (experts, out)
Affine = tuple[mx.array, mx.array, mx.array]  # weight, scales and biases


@dataclass(frozen=True)
class Layer:
    """Arguments of a launch: the experts of a MoE layer, and inputs as in decoding.

    Attributes:
        gate: rows and scales, (experts, width, ...).
        up: like `gate`.
        down: rows and scales, (experts, hidden, ...).
        indices: (tokens, k) uint32, the experts that are used.
        x: (tokens, hidden), activation dtype.
        h: (tokens, k, width) float32.
        weights: (tokens, k) float32.
        shared: (tokens, hidden), activation dtype.
    """

    gate: Packed
    up: Packed
    down: Packed
    indices: mx.array
    x: mx.array
    h: mx.array
    weights: mx.array
    shared: mx.array

    def in_features(self, matrix: str) -> int:
        """Columns of "gate", "up" or "down"."""
        return self.h.shape[-1] if matrix == "down" else self.x.shape[-1]

    def nbytes(self, matrix: str) -> int:
        """Bytes of the rows and scales of a matrix, summed over the chosen experts."""
        packed = getattr(self, matrix)
        return sum(array.nbytes for array in packed) // len(packed[0]) * self.indices.size

    def transcoded(self, matrix: str, dtype: mx.Dtype) -> Affine:
        """The chosen experts in MLX's 2-bit format, in the order of `indices`."""
        rows, scales = (array[self.indices.flatten()] for array in getattr(self, matrix))
        return rows_to_affine2(rows, scales.astype(dtype), self.in_features(matrix))

    @property
    def places(self) -> mx.array:
        """Indices of the chosen experts in `transcoded`, in the shape of `indices`."""
        return mx.arange(self.indices.size, dtype=mx.uint32).reshape(self.indices.shape)


@dataclass(frozen=True)
class Kernel:
    """A kernel to time.

    Attributes:
        name: name of its launcher.
        reads: the matrices of a layer that it reads.
        ours: launches it; takes layer, indices (tokens, k) and variant.
        plain: the same in MLX; takes layer, transcoded matrices, their indices (tokens, k), dtype.
        rounds: whether the result has the activation dtype; otherwise it is float32.
    """

    name: str
    reads: tuple[str, ...]
    ours: Callable[[Layer, mx.array, Variant], mx.array]
    plain: Callable[[Layer, list[Affine], mx.array, mx.Dtype], mx.array]
    rounds: bool = False


def _ours_swiglu(layer: Layer, indices: mx.array, variant: Variant) -> mx.array:
    return tq1_0_swiglu(layer.x, *layer.gate, *layer.up, indices, variant=variant)


def _plain_swiglu(
    layer: Layer, affine: list[Affine], indices: mx.array, dtype: mx.Dtype
) -> mx.array:
    x = mx.expand_dims(layer.x.astype(dtype), (-2, -3))
    gate, up = (affine_product(x, one, indices) for one in affine)
    return swiglu(gate, up).squeeze(-2)


def _ours_down(layer: Layer, indices: mx.array, variant: Variant) -> mx.array:
    weights, shared = layer.weights, layer.shared
    return tq1_0_down(layer.h, *layer.down, indices, weights, shared, variant=variant)


def _plain_down(layer: Layer, affine: list[Affine], indices: mx.array, dtype: mx.Dtype) -> mx.array:
    y = affine_product(layer.h.astype(dtype)[..., None, :], affine[0], indices).squeeze(-2)
    weights = layer.weights.astype(dtype)[..., None]
    return layer.shared.astype(dtype) + (y * weights).sum(axis=-2)


def _ours_qmv(layer: Layer, indices: mx.array, variant: Variant) -> mx.array:
    return tq1_0_qmv(layer.x, *layer.gate, indices.flatten(), variant=variant)


def _plain_qmv(layer: Layer, affine: list[Affine], indices: mx.array, dtype: mx.Dtype) -> mx.array:
    x = mx.expand_dims(layer.x.astype(dtype), (-2, -3))
    return affine_product(x, affine[0], indices).reshape(indices.size, -1)


KERNELS = (
    Kernel("tq1_0_swiglu", ("gate", "up"), _ours_swiglu, _plain_swiglu),
    Kernel("tq1_0_down", ("down",), _ours_down, _plain_down, rounds=True),
    Kernel("tq1_0_qmv", ("gate",), _ours_qmv, _plain_qmv),
)


def decode_layers(model: nn.Module, tokens: int, dtype: mx.Dtype) -> list[Layer]:
    """MoE layers of a tier until they read `ENOUGH_BYTES`, with random experts and inputs.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokens: number of tokens decoded at a time.
        dtype: activation dtype.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    mx.random.seed(0)
    choose = random.Random(0)
    layers: list[Layer] = []
    read = 0
    for block in model.modules():
        if read >= ENOUGH_BYTES:
            break
        if isinstance(block, OutlierMoE) and isinstance(block.switch_mlp, TernarySwitchGLU):
            layers.append(_decode_layer(block, tokens, dtype, choose))
            read += sum(layers[-1].nbytes(matrix) for matrix in ("gate", "up", "down"))
    if not layers:
        raise OutlierError("this model has no ternary experts to time kernels on")
    return layers


def _decode_layer(block: OutlierMoE, tokens: int, dtype: mx.Dtype, choose: random.Random) -> Layer:
    glu, k = block.switch_mlp, block.top_k
    gate, up, down = ((p.weight, p.scales) for p in (glu.gate_proj, glu.up_proj, glu.down_proj))
    (experts, width, _), hidden = gate[0].shape, down[0].shape[1]
    indices = mx.array([choose.sample(range(experts), k) for _ in range(tokens)], mx.uint32)
    x, shared = (mx.random.normal((tokens, hidden)).astype(dtype) for _ in range(2))
    h, weights = mx.random.normal((tokens, k, width)), mx.random.uniform(0.5, 1.5, (tokens, k))
    layer = Layer(gate, up, down, indices, x, h, weights, shared)
    # Weights that bring the routed sum to the size of the shared path, whatever the scales are.
    affine = layer.transcoded("down", mx.float32)
    y = affine_product(h[..., None, :], affine, layer.places)
    weights = weights / mx.maximum(mx.sqrt(k * mx.mean(mx.square(y))), 1e-20)
    mx.eval(indices, x, h, weights, shared)
    return replace(layer, weights=weights)
