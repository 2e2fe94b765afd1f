"""What a rank has of a model's files, so that the plan of its memory counts just that."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from outlier_mlx.engine.distributed.pipeline import layer_of, stages
from outlier_mlx.engine.distributed.ranks import ranks
from outlier_mlx.engine.distributed.tensor_parallel import TensorParallel
from outlier_mlx.models.description import Description
from outlier_mlx.storage.safetensors import TensorRef


def share_of(
    folder: Path, tensors: Mapping[str, TensorRef], config: Description
) -> tuple[Mapping[str, TensorRef], Description]:
    """The tensors that this rank has, in its shapes, and what its part of the model looks like.

    Args:
        folder: the model's.
        tensors: all of its tensors.
        config: what its config says.

    Raises:
        OutlierError: the model cannot be split over the ranks.
    """
    own = ranks()
    if own.size == 1:
        return tensors, config
    if not own.pipeline:
        split = TensorParallel(tensors, config, own.rank, own.size)
        return split.shapes(), split.config(config)
    start, stop = stages(folder)[own.rank]
    mine = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        if layer is None or start <= layer < stop:
            mine[name] = tensor
    moe = config.moe_layers
    return mine, replace(
        config,
        layers=stop - start,
        moe_layers=None if moe is None else tuple(n for n in moe if start <= n < stop),
        attention=None if config.attention is None else config.attention[start:stop],
    )


def replicated(tensors: Mapping[str, TensorRef], mine: Mapping[str, TensorRef]) -> int:
    """Bytes of the weights that a rank has as a whole, though all ranks have them.

    Args:
        tensors: all of a model's tensors.
        mine: those that a rank has, in its shapes.
    """
    own = ranks()
    if own.size == 1:
        return 0
    whole = (name for name in mine if mine[name].shape == tensors[name].shape)
    names = whole if not own.pipeline else (name for name in mine if layer_of(name) is None)
    return sum(tensors[name].nbytes for name in names)
