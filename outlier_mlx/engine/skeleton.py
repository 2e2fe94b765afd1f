"""What mlx-lm's model of a config is made of: names, kinds and shapes, without any weights."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx.errors import CheckpointError, one_line
from outlier_mlx.models.spelling import lifted
from outlier_mlx.upstream import BitLinear, _get_classes

# Every layer has a tensor; mlx-lm would build any number of layers.
_LAYERS = "num_hidden_layers"


@dataclass(frozen=True)
class Matrix:
    """A linear layer or an embedding of mlx-lm's model.

    Attributes:
        shape: (out, in) of its weight, unpacked.
        embedding: whether it is an embedding.
        bias: whether it adds a bias.
    """

    shape: tuple[int, ...]
    embedding: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        matrices: its linear layers and embeddings, by path.
        shapes: shapes of all parameters by name, those of matrices unpacked.
    """

    matrices: dict[str, Matrix]
    shapes: dict[str, tuple[int, ...]]


def skeleton(config: dict[str, Any], tensors: int) -> Skeleton:
    """Build mlx-lm's model of a config; MLX computes nothing, so it takes no memory.

    Args:
        config: a config.json in the field names that mlx-lm reads. No code that it names is run.
        tensors: number of tensors of the model, which bounds the number of layers.

    Raises:
        CheckpointError: mlx-lm has no such model, or cannot make one of the config.
    """
    layers = lifted(config).get(_LAYERS)
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(f"config.json: {layers} layers, but only {tensors} tensors")
    try:
        model_class, args_class = _get_classes({"model_type": config["model_type"]})
        model = model_class(
            args_class.from_dict(deepcopy(config))
        )  # it may change what it is given
    except Exception as error:
        # mlx-lm raises many types of errors for a bad config.
        reason = f"{type(error).__name__}: {one_line(str(error))}"[:300]
        raise CheckpointError(f"config.json: mlx-lm cannot make a model of it: {reason}") from error
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    shapes = {name: tuple(value.shape) for name, value in parameters}
    matrices: dict[str, Matrix] = {}
    for path, module in model.named_modules():
        if isinstance(module, BitLinear):  # its weight is packed, and it has a scale
            shape = (module.out_features, module.in_features)
            matrices[path] = Matrix(shape, bias=f"{path}.bias" in shapes)
            del shapes[f"{path}.weight_scale"]
        elif isinstance(module, nn.Linear | nn.Embedding):
            kind = isinstance(module, nn.Embedding)
            matrices[path] = Matrix(tuple(module.weight.shape), kind, "bias" in module)
        else:
            continue
        shapes[f"{path}.weight"] = matrices[path].shape
    return Skeleton(matrices, shapes)
