"""What can be trained in a tier without changing codes and trits, and where it is in the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx.engine.experts import moe_blocks
from outlier_mlx.errors import OutlierError
from outlier_mlx.runtime.affine2 import affine_product
from outlier_mlx.runtime.packed import PackedModule
from outlier_mlx.upstream import set_training

#: What can be trained, and the size of a first step in learning rates, relative to the numbers.
PARTS = {"alphas": 1.0, "rows": 1.0, "routers": 0.1, "base": 1.0}
#: The same for the base and more towards a teacher, which mostly differs by the base's codes.
NEARER = {"alphas": 0.03, "rows": 1.0, "routers": 0.03, "base": 1.0}


def part_of(name: str, dims: int) -> str | None:
    """The part of `PARTS` that a tier's tensor belongs to; None for codes, trits and matrices.

    Args:
        name: the tensor's name in the tier.
        dims: number of its axes.
    """
    leaf = name.rpartition(".")[2]
    if name.endswith(".mlp.alpha"):
        return "alphas"
    if name.endswith(".mlp.gate.weight"):
        return "routers"
    if ".mlp.switch_mlp." in name:
        return "rows" if leaf == "scales" else None
    return "base" if dims == 1 or leaf in ("scales", "biases") else None


class Trained:
    """A tensor that is trained, and its place in the model.

    Adam sees it in units of its size, so that one learning rate suits all tensors. Instead of the
    biases of quantized weights it sees the middles of the groups, in units of the scales: a code c
    is the weight (c - 7.5) * scale + middle in 4 bits. So a scale can change, and the mean of its
    group stays.

    Attributes:
        name: its name in the tier.
        part: the part it belongs to.
    """

    def __init__(
        self, name: str, part: str, module: nn.Module, dtype: mx.Dtype | None, rate: float
    ) -> None:
        """Args: see the class; `module` has the tensor, `dtype` is that of the file.

        `rate` is the size of a first step in learning rates.
        """
        self.name, self.part, self._module = name, part, module
        self._leaf = name.rpartition(".")[2]
        self._dtype = dtype or self.value.dtype
        self._middle = 0.0  # code in the middle of a group
        if self._leaf == "biases":
            self._middle = (2**module.bits - 1) / 2
        size = module.scales if self._leaf == "biases" else self.value
        self._unit = rate * (1.0 if part == "alphas" else _rms(size))

    @property
    def value(self) -> mx.array:
        """What the model has now."""
        found: mx.array = self._module[self._leaf]
        return found

    def put(self, value: mx.array) -> None:
        """Give the model another value."""
        self._module[self._leaf] = value

    @property
    def number(self) -> mx.array:
        """What Adam sees, float32."""
        value = self.value.astype(mx.float32)
        if self._middle:
            value = value + self._middle * self._module.scales
        return value / self._unit

    def of_number(self, number: mx.array) -> mx.array:
        """The value for the model; scales of rows are never negative.

        That of biases is for the scales that the model has.
        """
        value = number * self._unit
        if self._middle:
            value = value - self._middle * self._module.scales
        if self.part == "rows":
            value = mx.maximum(value, 0)
        return value.astype(self.value.dtype)

    def rounded(self, number: mx.array) -> mx.array:
        """The value for the model, rounded as it will be stored."""
        value = self.of_number(number).astype(self._dtype).astype(self.value.dtype)
        mx.eval(value)
        return value

    def tensors(self) -> dict[str, mx.array]:
        """The tensors of the tier that hold the value, by name, as they are stored."""
        if isinstance(self._module, RowScales):
            found = self._module.stored()
            return {f"{self.name.rpartition('.')[0]}.{k}": v for k, v in found.items()}
        return {self.name: self.value.astype(self._dtype)}


class RowScales(nn.Module):
    """Ternary experts whose scales have a gradient: y = scale of the row * (trits times x).

    `scales` is (experts, out) float32.
    """

    def __init__(self, experts: Any) -> None:
        """Take the place of `experts`, packed or in MLX's 2-bit format."""
        super().__init__()
        self._experts = [experts]  # in a list, so that it is no child
        if isinstance(experts, PackedModule):
            codes, grid, _ = experts.affine()
            self.scales = experts.scales
        else:
            codes, grid = experts.weight, experts.scales
            self.scales = grid[..., 0]
        ones = mx.ones(grid.shape, mx.float32)
        self._unit = (codes, ones, -ones)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply x (..., 1, in) by the experts in `indices` (...): (..., 1, out) float32."""
        y = affine_product(x.astype(mx.float32), self._unit, indices, sorted_indices)
        return y * self.scales[indices][..., None, :]

    def stored(self) -> dict[str, mx.array]:
        """The tensors that a tier stores, by their leaves."""
        (experts,) = self._experts
        if isinstance(experts, PackedModule):
            return {"scales": self.scales}
        grid = mx.broadcast_to(self.scales[..., None], experts.scales.shape)
        return {"scales": grid, "biases": -grid}

    def restored(self) -> nn.Module:
        """The experts, with the scales as they are now."""
        (experts,) = self._experts
        for leaf, value in self.stored().items():
            experts[leaf] = value
        if isinstance(experts, PackedModule):
            experts.prepare()
        return experts


@contextmanager
def trained_tensors(
    model: nn.Module,
    parts: Sequence[str],
    dtypes: Mapping[str, mx.Dtype],
    rates: Mapping[str, float] = PARTS,
) -> Iterator[list[Trained]]:
    """The tensors of `parts` in a loaded tier, which computes with gradients until the block ends.

    Args:
        model: a tier.
        parts: of `PARTS`.
        dtypes: those of the tier's files, by tensor.
        rates: of the parts, in learning rates.

    Yields:
        The tensors; biases come after the scales of their module.

    Raises:
        OutlierError: the model has no experts, or nothing of a part.
    """
    blocks = moe_blocks(model)
    if not blocks:
        raise OutlierError("the model has no layer with routed experts")
    switches = [block.switch_mlp for block in blocks.values()] if "rows" in parts else []
    wrapped = [(s, name) for s in switches for name in ("gate_proj", "up_proj", "down_proj")]
    training = [module for module in model.modules() if module.training]
    try:
        for switch, name in wrapped:
            switch[name] = RowScales(switch[name])
        model.train()
        modules = dict(model.named_modules())
        found = []
        parameters: Any = tree_flatten(model.parameters(), destination={})
        for name, value in parameters.items():
            part = part_of(name, value.ndim)
            if part is not None and part in parts:
                module = modules[name.rpartition(".")[0]]
                found.append(Trained(name, part, module, dtypes.get(name), rates[part]))
        yield sorted(found, key=lambda each: each.name.endswith(".biases"))
    finally:
        for switch, name in wrapped:
            if isinstance(switch[name], RowScales):
                switch[name] = switch[name].restored()
        model.eval()
        for module in training:
            set_training(module)


def _rms(value: mx.array) -> float:
    """Root of the mean square; 1 for an array of zeros."""
    return math.sqrt(float(mx.square(value.astype(mx.float32)).mean())) or 1.0
