"""mlx-lm's model of which a rank has a part: what is loaded, and where results are put together."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.classes import partial_classes
from outlier_mlx.engine.distributed.ranks import Ranks, ranks, summed
from outlier_mlx.engine.distributed.tensor_parallel import (
    ATTENTION,
    SWITCH,
    Columns,
    TensorParallel,
)
from outlier_mlx.engine.quantized import Classes
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.ops import weighted_sum
from outlier_mlx.runtime.switch import TernarySwitchGLU
from outlier_mlx.storage.shards import read_shards


class PartialLinear(nn.Module):
    """A linear layer of which this rank has some columns.

    Args:
        part: the layer, with these columns.
        columns: which they are.
        sums: whether the result is the sum over all ranks; else it is this rank's part of it.
    """

    def __init__(self, part: Any, columns: Columns, *, sums: bool) -> None:
        super().__init__()
        bias = part.pop("bias", None)
        if bias is not None and (sums or ranks().leads):
            self.bias = bias
        self.part = part
        self._columns, self._sums = columns, sums

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x (..., columns of this rank): (..., out)."""
        before, after = self._columns.before, self._columns.after
        if before or after:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])
        y: mx.array = self.part(x)
        if self._sums:
            y = summed(y)
        return y + self.bias if "bias" in self else y


class PartialMoE(OutlierMoE):
    """A MoE block whose shared expert and routed experts are parts; their sum is in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype; the sum is rounded once."""
        indices, weights = self.route(x, self.alpha)
        shared = self.shared_expert(x).astype(mx.float32)
        if isinstance(self.switch_mlp, TernarySwitchGLU):
            y = self.switch_mlp.mix(x, indices, weights, shared)
        else:
            y = weighted_sum(shared, self.switch_mlp(x.astype(mx.float32), indices), weights)
        return summed(y).astype(x.dtype)


def split_classes(
    get_model_classes: Classes, folder: Path, own: Ranks, *, paged: bool = False
) -> Classes:
    """The same classes for `mlx_lm.utils.load_model`, whose models are this rank's part.

    Args:
        get_model_classes: the classes of the whole model, which others can inherit from.
        folder: the model's, from whose files a rank's parts are read.
        own: which rank this is.
        paged: whether experts are paged; then nothing of them is read here.
    """
    config = describe(raw_config(folder))
    split = TensorParallel(read_shards(folder), config, own.rank, own.size)

    def choose(model: Any, weights: dict[str, mx.array]) -> None:
        _resize(model, split)
        for name, cut in split.cuts.items():
            lazily = paged and f".{SWITCH}." in name
            weights[name] = cut.of(weights[name]) if lazily else cut.read(split.stored[name])

    return partial_classes(get_model_classes, choose, lambda model: _connect(model, split))


def _resize(model: nn.Module, split: TensorParallel) -> None:
    """Give modules the shapes of this rank, before mlx-lm quantizes them."""
    for path, module in model.named_modules():
        for leaf in ("weight", "scales", "bias"):
            cut = split.cuts.get(f"{path}.{leaf}")
            if cut is None or leaf not in module:
                continue
            columns = split.columns.get(path)
            shape = list(module[leaf].shape)
            shape[cut.axis] = cut.length if columns is None else columns.width
            module[leaf] = mx.zeros(shape, module[leaf].dtype)
        if path.endswith(f".{ATTENTION}"):
            attention: Any = module
            attention.n_heads, attention.n_kv_heads = split.heads.counts
        if isinstance(module, TernarySwitchGLU):
            assert split.expert_width is not None
            module.hidden_dims = module.down_proj.input_dims = split.expert_width


def _connect(model: nn.Module, split: TensorParallel) -> None:
    """Add the parts of all ranks up."""
    modules = dict(model.named_modules())
    for path, columns in split.columns.items():
        if path in modules and f".{SWITCH}." not in path:
            parent, _, name = path.rpartition(".")
            sums = ".shared_expert." not in path
            setattr(modules[parent], name, PartialLinear(modules[path], columns, sums=sums))
    for module in modules.values():
        if isinstance(module, OutlierMoE):
            module.__class__ = PartialMoE
