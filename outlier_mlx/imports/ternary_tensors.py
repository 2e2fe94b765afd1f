"""The tensors of a module that stay as they are when a ternary model is imported."""

from collections.abc import Mapping
from math import prod

from outlier_mlx.models.quantization import Quantization
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.writing.parts import Part
from outlier_mlx.writing.ternary_parts import Verbatim


def kept_parts(
    path: str, tensors: Mapping[str, TensorRef], said: Quantization | None
) -> list[Part]:
    """The tensors of a module as they are."""
    parts: list[Part] = []
    for leaf, tensor in tensors.items():
        name = f"{path}.{leaf}" if path else leaf
        weights = prod(tensor.shape)
        if tensor.dtype == "U32" and leaf == "weight":
            how = said.of(path) if said else None
            weights = weights * 32 // how.bits if how else weights
        elif leaf in ("scales", "biases"):
            weights = 0
        parts.append(Verbatim(path, kind_of(name), tensor, name, weights))
    return parts
