"""The base's tensors in a tier, as numbers: matrices in MLX's affine format, and floats."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.storage.safetensors import TensorRef


@dataclass(frozen=True)
class AffineMatrix:
    """A matrix in MLX's affine format: weight = scale * code + bias, a pair for each group.

    Attributes:
        weight: (out, in * bits / 32) uint32: the codes of a row as a stream of bits, lowest first.
        scales: (out, in / group) float.
        biases: of the same shape and dtype.
        bits: bits of a code.
        group: weights along a row that share a scale and a bias.
    """

    weight: TensorRef
    scales: TensorRef
    biases: TensorRef
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1] * 32 // self.bits)

    @property
    def dtype(self) -> str:
        """The safetensors dtype of scales and biases."""
        return self.scales.dtype

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return self.weight.where

    def read_codes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The codes of some rows, (rows, in) uint8."""
        packed = self.weight.read(start, stop).view(np.uint8)
        if self.bits in (1, 2, 4, 8):
            shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
            codes = packed[..., None] >> shifts & np.uint8(2**self.bits - 1)
        else:
            bits = np.unpackbits(packed, axis=-1, bitorder="little")
            bits = bits.reshape(len(packed), -1, self.bits)
            codes = np.packbits(bits, axis=-1, bitorder="little")
        return codes.reshape(len(packed), -1)

    def read_groups(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scales and biases of some rows, (rows, in / group) float32 each.

        Raises:
            CheckpointError: one is NaN or infinite.
        """
        found = []
        for tensor in (self.scales, self.biases):
            values = tensor.read_float32(start, stop)
            if not np.isfinite(values).all():
                raise CheckpointError(f"{tensor.where}: holds NaN or infinity")
            found.append(values)
        return found[0], found[1]

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The weights of some rows, (rows, in) float32, as MLX computes them in float32."""
        scales, biases = self.read_groups(start, stop)
        weights = self.read_codes(start, stop).reshape(*scales.shape, self.group)
        result: np.ndarray = weights * scales[..., None] + biases[..., None]
        return result.reshape(len(scales), -1)


def base_matrix(
    tensors: Mapping[str, TensorRef], config: ModelConfig, path: str
) -> AffineMatrix | TensorRef:
    """The weight of a module of the base in a checked model (`open_stored`).

    Args:
        tensors: the model's.
        config: the model's.
        path: name of the module, such as "model.layers.0.self_attn.q_proj".
    """
    weight = tensors[f"{path}.weight"]
    if f"{path}.scales" not in tensors:
        return weight
    how = config.quantization.of(path) if config.quantization is not None else None
    assert how is not None  # `open_stored` has seen to that
    scales, biases = tensors[f"{path}.scales"], tensors[f"{path}.biases"]
    return AffineMatrix(weight, scales, biases, how.bits, how.group_size)
