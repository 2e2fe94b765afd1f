"""Inputs for timing the kernels: a tier's own experts, and random activations."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.errors import OutlierError
from outlier_mlx.runtime.affine2 import affine_group, padded_width, rows_to_affine2
from outlier_mlx.runtime.blocks import tq1_0_sort
from outlier_mlx.runtime.groups import TILE_ROWS
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.runtime.routing import Router
from outlier_mlx.runtime.switch import TernarySwitchGLU

# Layers are taken until what they read is larger than any cache.
ENOUGH_BYTES = 1 << 29
NO_EXPERTS = "this model has no ternary experts to time kernels on"

Packed = tuple[mx.array, mx.array]  # rows (experts, out, row_bytes) and scales (experts, out)


@dataclass(frozen=True)
class Affine:
    """Matrices in a format of MLX: `weight` (..., out, words), `scales` and `biases` by group.

    Attributes:
        arrays: weight, scales and biases, as `mx.quantize` returns them.
        bits: bits of a weight.
        group_size: weights of a group.
    """

    arrays: tuple[mx.array, mx.array, mx.array]
    bits: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def product(self, x: mx.array, indices: mx.array | None = None) -> mx.array:
        """Multiply x (..., 1, in) by the matrices `indices` (...): (..., 1, out).

        Without indices, x (..., in) by a matrix (out, in): (..., out).
        """
        width = self.arrays[1].shape[-1] * self.group_size
        spare = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
        x = mx.pad(x, spare) if spare[-1][1] else x
        settings: Any = {"group_size": self.group_size, "bits": self.bits}
        if indices is None:
            return mx.quantized_matmul(x, *self.arrays, **settings)
        return mx.gather_qmm(x, *self.arrays, rhs_indices=indices, transpose=True, **settings)


def in_mlx_format(
    rows: mx.array, scales: mx.array, in_features: int, bits: int, dtype: mx.Dtype
) -> Affine:
    """The same weights in MLX's 2-bit or 4-bit format, exactly.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: of rows or of groups, as `rows_to_affine2` takes them.
        in_features: trits in a row, without padding.
        bits: 2 or 4.
        dtype: dtype of scales and biases.
    """
    weight, spread, biases = rows_to_affine2(rows, scales.astype(dtype), in_features)
    group_size = weight.shape[-1] * 16 // spread.shape[-1]
    return Affine((weight if bits == 2 else four_bits(weight), spread, biases), bits, group_size)


def bytes_in_mlx_format(in_features: int, bits: int, dtype: mx.Dtype, group: int = 0) -> int:
    """Bytes of a row in a format of MLX; `group`: weights that share a scale, 0 for a whole row."""
    width = padded_width(in_features)
    return width * bits // 8 + 2 * dtype.size * (width // (group or affine_group(in_features)))


def four_bits(weight: mx.array) -> mx.array:
    """Codes of 2 bits (..., words) uint32 as the same codes of 4 bits (..., 2 words)."""
    # The lower and the upper eight codes, each then moved apart in three steps.
    halves = mx.stack([weight & 0xFFFF, weight >> 16], axis=-1)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        halves = (halves | (halves << shift)) & mask
    return halves.reshape(*weight.shape[:-1], -1)


@dataclass(frozen=True)
class Layer:
    """Arguments of a launch: the experts of a MoE layer, and inputs as in decoding.

    Attributes:
        gate: rows and scales, (experts, width, ...); scales may be those of groups, in tiles.
        up: like `gate`.
        down: rows and scales, (experts, hidden, ...).
        router: the layer's own.
        alpha: (experts,) float32.
        indices: (tokens, k) uint32, the experts that are used.
        chosen: the experts in `indices`, ascending, each once.
        places: where in `chosen` the experts of `indices` are; same shape, uint32.
        x: (tokens, hidden), activation dtype.
        h: (tokens, k, width) float32.
        weights: (tokens, k) float32.
        shared: (tokens, hidden), activation dtype.
        blocks: `tq1_0_sort` of the indices, if pairs of one expert are multiplied together.
    """

    gate: Packed
    up: Packed
    down: Packed
    router: Router
    alpha: mx.array
    indices: mx.array
    chosen: list[int]
    places: mx.array
    x: mx.array
    h: mx.array
    weights: mx.array
    shared: mx.array
    blocks: mx.array | None = None

    @property
    def pairs(self) -> int:
        """(token, expert) pairs."""
        return self.indices.size

    def sizes(self, matrix: str) -> tuple[int, int]:
        """Rows and columns of "gate", "up", "down", "router" or "indices"."""
        if matrix == "indices":
            return self.indices.shape[0], self.indices.shape[1]
        if matrix == "router":
            return self.router.weight.shape[0], self.router.weight.shape[1]
        columns = self.h.shape[-1] if matrix == "down" else self.x.shape[-1]
        return getattr(self, matrix)[0].shape[1], columns

    def nbytes(self, matrix: str) -> int:
        """Bytes of a matrix; of experts, rows and scales of the chosen ones, each counted once."""
        if matrix == "indices":
            return self.indices.nbytes
        if matrix == "router":
            return int(self.router.weight.nbytes)
        packed: Packed = getattr(self, matrix)
        return sum(array.nbytes for array in packed) // len(packed[0]) * len(self.chosen)

    def affine(self, matrix: str, bits: int, dtype: mx.Dtype) -> Affine:
        """The chosen experts' matrices in a format of MLX."""
        rows, scales = (array[mx.array(self.chosen)] for array in getattr(self, matrix))
        return in_mlx_format(rows, scales, self.sizes(matrix)[1], bits, dtype)

    def copied(self, matrix: str, bits: int, dtype: mx.Dtype) -> int:
        """Bytes of the arrays that `affine` makes."""
        rows, columns = self.sizes(matrix)
        return len(self.chosen) * rows * bytes_in_mlx_format(columns, bits, dtype)


@dataclass(frozen=True)
class Linear:
    """A matrix of an expert as an ordinary linear layer, and vectors.

    Attributes:
        x: (vectors, in), activation dtype.
        rows: (out, row_bytes) uint8.
        scales: (out,) float32, or float16 of groups, in tiles (ceil(out / 8), groups, 8).
        group: weights that share a scale, 0 for a whole row.
        pairs: 0: there are no experts.
    """

    x: mx.array
    rows: mx.array
    scales: mx.array
    group: int
    pairs: int = 0

    def sizes(self, _: str) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.shape[0], self.x.shape[1]

    def nbytes(self, _: str) -> int:
        """Bytes of rows and scales."""
        return self.rows.nbytes + self.scales.nbytes

    def affine(self, _: str, bits: int, dtype: mx.Dtype) -> Affine:
        """The matrix in a format of MLX, with the same groups if there are any."""
        return in_mlx_format(self.rows, self.scales, self.x.shape[1], bits, dtype)

    def copied(self, _: str, bits: int, dtype: mx.Dtype) -> int:
        """Bytes of the arrays that `affine` makes."""
        rows, columns = self.sizes("rows")
        return rows * bytes_in_mlx_format(columns, bits, dtype, self.group)


@dataclass(frozen=True)
class Conversion:
    """The matrices of all experts of a layer, to convert.

    Attributes:
        rows: (experts, out, row_bytes) uint8.
        in_features: trits in a row, without padding.
        pairs: 0: no tokens take part.
    """

    rows: mx.array
    in_features: int
    pairs: int = 0

    def sizes(self, _: str) -> tuple[int, int]:
        """Rows of all experts, and columns."""
        return self.rows.shape[0] * self.rows.shape[1], self.in_features

    def nbytes(self, _: str) -> int:
        """Bytes that are read and written."""
        return self.rows.nbytes + self.sizes("rows")[0] * padded_width(self.in_features) // 4


@dataclass(frozen=True)
class Rotation:
    """Activations to rotate.

    Attributes:
        x: (tokens, in), activation dtype.
        signs: (in,) float16, each 1 or -1.
        block: elements of a block.
        pairs: 0: no experts take part.
    """

    x: mx.array
    signs: mx.array
    block: int
    pairs: int = 0

    def sizes(self, _: str) -> tuple[int, int]:
        """Tokens and columns."""
        return self.x.shape[0], self.x.shape[1]

    def nbytes(self, _: str) -> int:
        """Bytes that are read and written."""
        return 2 * self.x.nbytes + self.signs.nbytes


def conversions(model: nn.Module) -> list[Conversion]:
    """The gate matrices of a tier's MoE layers, until their rows have `ENOUGH_BYTES`."""
    found: list[Conversion] = []
    for block in routed_blocks(model):
        if sum(one.rows.nbytes for one in found) >= ENOUGH_BYTES:
            break
        found.append(Conversion(block.switch_mlp.gate_proj.weight, block.gate.weight.shape[1]))
    return found


def linears(model: nn.Module, vectors: int, group: int, dtype: mx.Dtype) -> list[Linear]:
    """The experts' gate matrices, until they have half of `ENOUGH_BYTES`.

    Args:
        model: the model that `outlier_mlx.load` returns.
        vectors: number of vectors.
        group: weights that share a scale, which then is random; 0: the experts' own scales of rows.
        dtype: activation dtype.
    """
    mx.random.seed(0)
    found: list[Linear] = []
    for block in routed_blocks(model):
        gate, columns = block.switch_mlp.gate_proj, block.gate.weight.shape[1]
        for rows, scales in zip(gate.weight, gate.scales, strict=True):
            if sum(one.rows.nbytes for one in found) >= ENOUGH_BYTES // 2:
                return found
            if group:
                scales = group_scales(rows, columns // group)
            found.append(Linear(random_vectors(vectors, columns, dtype), rows, scales, group))
            mx.eval(found[-1].x)
    return found


def grouped_layers(model: nn.Module, tokens: int, group: int, dtype: mx.Dtype) -> list[Layer]:
    """`decode_layers` with random scales of groups of the gate matrices."""
    found = []
    for layer in decode_layers(model, tokens, dtype):
        rows = layer.gate[0]
        found.append(replace(layer, gate=(rows, group_scales(rows, layer.x.shape[1] // group))))
    return found


def group_scales(rows: mx.array, groups: int) -> mx.array:
    """Random scales for rows (..., out, row_bytes): (..., ceil(out / 8), groups, 8) float16."""
    *leading, out, _ = rows.shape
    tiles = (*leading, -(-out // TILE_ROWS), groups, TILE_ROWS)
    scales = mx.random.uniform(0.01, 0.02, tiles).astype(mx.float16)
    mx.eval(scales)
    return scales


def random_vectors(vectors: int, columns: int, dtype: mx.Dtype) -> mx.array:
    """Normal values (vectors, columns)."""
    return mx.random.normal((vectors, columns)).astype(dtype)


def rotations(tokens: int, columns: int, block: int, dtype: mx.Dtype) -> list[Rotation]:
    """Random activations and signs."""
    mx.random.seed(0)
    x = random_vectors(tokens, columns, dtype)
    signs = mx.where(mx.random.bernoulli(shape=(columns,)), 1, -1).astype(mx.float16)
    mx.eval(x, signs)
    return [Rotation(x, signs, block)]


def decode_layers(
    model: nn.Module, tokens: int, dtype: mx.Dtype, alike: bool = False
) -> list[Layer]:
    """MoE layers of a tier until they read `ENOUGH_BYTES`, with random experts and inputs.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokens: number of tokens decoded at a time.
        dtype: activation dtype.
        alike: whether all tokens use the same experts; on a GPU, their pairs are then in blocks.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    mx.random.seed(0)
    choose = random.Random(0)
    layers: list[Layer] = []
    read = 0
    for block in routed_blocks(model):
        if read >= ENOUGH_BYTES:
            break
        layers.append(_decode_layer(block, tokens, dtype, choose, alike))
        read += sum(layers[-1].nbytes(matrix) for matrix in ("gate", "up", "down"))
    if not layers:
        raise OutlierError(NO_EXPERTS)
    return layers


def first_block(model: nn.Module) -> OutlierMoE:
    """A MoE block whose experts are ternary.

    Raises:
        OutlierError: the model has none.
    """
    for block in routed_blocks(model):
        return block
    raise OutlierError(NO_EXPERTS)


def routed_blocks(model: nn.Module) -> Iterator[OutlierMoE]:
    """The MoE blocks of a model whose experts are ternary."""
    for block in model.modules():
        if isinstance(block, OutlierMoE) and isinstance(block.switch_mlp, TernarySwitchGLU):
            yield block


def _decode_layer(
    block: OutlierMoE, tokens: int, dtype: mx.Dtype, choose: random.Random, alike: bool
) -> Layer:
    glu, k = block.switch_mlp, block.top_k
    router, alpha = block.gate, block.alpha.astype(mx.float32)
    gate, up, down = ((p.weight, p.scales) for p in (glu.gate_proj, glu.up_proj, glu.down_proj))
    (experts, width, _), hidden = gate[0].shape, down[0].shape[1]
    drawn = [choose.sample(range(experts), k) for _ in range(1 if alike else tokens)]
    drawn = drawn * tokens if alike else drawn
    chosen = sorted({expert for token in drawn for expert in token})
    indices = mx.array(drawn, mx.uint32)
    places = mx.array([[chosen.index(expert) for expert in token] for token in drawn], mx.uint32)
    x, shared = (random_vectors(tokens, hidden, dtype) for _ in range(2))
    h, weights = mx.random.normal((tokens, k, width)), mx.random.uniform(0.5, 1.5, (tokens, k))
    used = (indices, chosen, places, x, h, weights, shared)
    layer = Layer(gate, up, down, router, alpha, *used)
    # Weights that bring the routed sum to the size of the shared path, whatever the scales are.
    y = layer.affine("down", 2, mx.float32).product(h[..., None, :], layer.places)
    weights = weights / mx.maximum(mx.sqrt(k * mx.mean(mx.square(y))), 1e-20)
    blocks = tq1_0_sort(indices, experts, tokens) if alike and use_metal() else None
    mx.eval(alpha, indices, places, x, h, weights, shared, blocks)
    return replace(layer, weights=weights, blocks=blocks)
