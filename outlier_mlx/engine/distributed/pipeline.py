"""Pipeline: every rank has some of the layers, and hands what they compute to the next rank.

Rank 0 has the first layers. What the last layer computes goes to all ranks, which then have the
same logits. Embedding, last norm and head are on all of them.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.classes import extend, partial_classes
from outlier_mlx.engine.distributed.ranks import Ranks, gathered, ranks, summed, transport
from outlier_mlx.engine.distributed.tensor_parallel import FAMILIES, check_family
from outlier_mlx.engine.machine import budget
from outlier_mlx.engine.quantized import Classes
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.storage.shards import read_shards

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None: it is on all ranks."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


@cache
def stages(folder: Path) -> list[tuple[int, int]]:
    """The layers (start, stop) of each rank, by the memory that each has now.

    All ranks call it at the same time; later, it stays what it was.

    Raises:
        OutlierError: there are fewer layers than ranks, or the model's type cannot be divided.
    """
    check_family(describe(raw_config(folder)), (*FAMILIES, "bitnet"))
    sizes: dict[int, int] = {}
    everywhere = 0
    for name, tensor in read_shards(folder).items():
        layer = layer_of(name)
        if layer is None:
            everywhere += tensor.nbytes
        else:
            sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
    budgets = [int(text) for text in gathered(str(budget().nbytes))]
    return divided([sizes[layer] for layer in sorted(sizes)], budgets, everywhere)


def divided(
    layers: Sequence[int], budgets: Sequence[int], everywhere: int = 0
) -> list[tuple[int, int]]:
    """Divide layers between ranks.

    Args:
        layers: bytes of each layer.
        budgets: bytes that each rank may take.
        everywhere: bytes of what is on all ranks.

    Returns:
        The layers (start, stop) of each rank, at least one, in proportion to what is left of its
        budget.

    Raises:
        OutlierError: there are fewer layers than ranks.
    """
    ranks_left = len(budgets)
    if len(layers) < ranks_left:
        raise OutlierError(
            f"--pipeline: {len(layers)} layers cannot be divided between {ranks_left} ranks"
        )
    rooms = [max(1, nbytes - everywhere) for nbytes in budgets]
    before = [0, *accumulate(layers)]
    ends = [0]
    for rank, room in enumerate(accumulate(rooms), 1):
        wanted = before[-1] * room / sum(rooms)
        nearest = min(range(len(before)), key=lambda end: abs(before[end] - wanted))
        ends.append(min(max(nearest, ends[-1] + 1), len(layers) - (ranks_left - rank)))
    return list(pairwise(ends))


def pipeline_classes(get_model_classes: Classes, folder: Path, own: Ranks) -> Classes:
    """The same classes for `mlx_lm.utils.load_model`, whose models have this rank's layers.

    Args:
        get_model_classes: the classes of the whole model, which others can inherit from.
        folder: the model's.
        own: which rank this is.
    """
    start, stop = stages(folder)[own.rank]

    def choose(model: Any, weights: dict[str, mx.array]) -> None:
        # Layers keep their numbers while weights are loaded: the config names them by these.
        layers = model.model.layers
        layers[:] = [layer if start <= n < stop else nn.Module() for n, layer in enumerate(layers)]
        for name in list(weights):
            layer = layer_of(name)
            if layer is not None and not start <= layer < stop:
                del weights[name]

    return partial_classes(
        get_model_classes, choose, lambda model: _connect(model.model, start, stop, own)
    )


def _connect(inner: Any, start: int, stop: int, own: Ranks) -> None:
    """Let the first layer receive, the last one send, and the norm have what the last rank has."""
    inner.layers = inner.layers[start:stop]
    if hasattr(inner, "fa_idx"):  # the first layers with full attention, and with windows
        windows = [bool(layer.use_sliding) for layer in inner.layers]
        inner.fa_idx = windows.index(False) if False in windows else 0
        inner.swa_idx = windows.index(True) if True in windows else None
    if own.rank > 0:
        extend(inner.layers[0], _Receiving)
    if own.rank < own.size - 1:
        extend(inner.layers[-1], _Sending)
    extend(inner.norm, _Sharing)


class _Receiving:
    """A layer whose input comes from the rank before; the one given has only its shape."""

    def __call__(self, x: mx.array, *rest: Any, **more: Any) -> mx.array:
        own = ranks()
        layer: Any = super()
        x = mx.distributed.recv_like(x, own.rank - 1, group=own.group, stream=transport())
        y: mx.array = layer.__call__(x, *rest, **more)
        return y


class _Sending:
    """A layer whose output goes to the next rank."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, **more: Any) -> mx.array:
        own = ranks()
        layer: Any = super()
        y = layer.__call__(x, mask, cache=cache, **more)
        sent: mx.array = mx.distributed.send(y, own.rank + 1, group=own.group, stream=transport())
        if cache is not None:
            # A prompt is read for its KV cache alone: what waits for it waits for the sending, too.
            several = isinstance(cache.keys, tuple | list)
            keys = mx.depends(list(cache.keys) if several else [cache.keys], [sent])
            cache.keys = tuple(keys) if several else keys[0]
        return sent


class _Sharing:
    """The last norm, of what the last rank's last layer computes."""

    def __call__(self, x: mx.array) -> mx.array:
        own = ranks()
        norm: Any = super()
        mine = x if own.rank == own.size - 1 else mx.depends([mx.zeros_like(x)], [x])[0]
        y: mx.array = norm.__call__(summed(mine))
        return y
