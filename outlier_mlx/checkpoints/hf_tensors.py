"""The tensors of a tier as stock transformers has them, read by rows: nothing is held in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from outlier_mlx.checkpoints.base_matrices import base_matrix
from outlier_mlx.checkpoints.hf_layout import HfClass
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.stored_model import StoredModel
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.modules import Module, tier_modules
from outlier_mlx.storage.rounding import narrowed
from outlier_mlx.storage.tensors import Derived, ExpertMatrix, FloatTensor


@dataclass(frozen=True)
class Times(Derived):
    """The numbers of another tensor times a factor, in float32."""

    factor: float

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`, times the factor."""
        return self.factor * self.tensor.read_float32(start, stop)


@dataclass(frozen=True)
class ExpertWeights:
    """An expert's matrix as floats: scale * factor * trit, (out, in)."""

    matrix: ExpertMatrix
    factor: float = 1.0
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.matrix.trits.shape)

    @property
    def where(self) -> str:
        """File and key of the trits, for messages."""
        return self.matrix.trits.where

    def scales(self) -> np.ndarray:
        """The scale of each row times the factor, rounded once: (out,) float32."""
        return folded_scales(self.matrix.row_scales(), self.factor, self.matrix.scale.where)

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`."""
        return self.matrix.trits.read(start, stop) * self.scales()[start:stop, None]


def folded_scales(scales: np.ndarray, factor: float, where: str) -> np.ndarray:
    """Scales times a factor, such as an alpha, rounded to float32 once.

    Raises:
        CheckpointError: a product is too large; `where` is the scales'.
    """
    return narrowed(scales.astype(np.float64) * factor, "float32", where)


@dataclass(frozen=True)
class Joined:
    """Two matrices as one, the second below the first (axis 0) or at its right (axis 1)."""

    first: FloatTensor
    second: FloatTensor
    axis: int
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        shape = list(self.first.shape)
        shape[self.axis] += self.second.shape[self.axis]
        return tuple(shape)

    @property
    def where(self) -> str:
        """File and key of the second, for messages."""
        return self.second.where

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`."""
        stop = self.shape[0] if stop is None else stop
        pair = (self.first, self.second)
        if self.axis == 1:
            return np.concatenate([each.read_float32(start, stop) for each in pair], axis=1)
        cut = self.first.shape[0]
        spans = [(min(start, cut), min(stop, cut)), (max(start, cut) - cut, max(stop, cut) - cut)]
        return np.concatenate(
            [each.read_float32(*span) for each, span in zip(pair, spans, strict=True)]
        )


@dataclass(frozen=True)
class Zeros:
    """A matrix of zeros."""

    shape: tuple[int, ...]
    where: str
    dtype: str = "F32"

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`."""
        return np.zeros(self.shape, np.float32)[start:stop]


def hf_shapes(config: ModelConfig, known: HfClass) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a tier in transformers, in the order of a forward pass."""
    return dict(pair for module in tier_modules(config) for pair in _shapes(module, config, known))


def _shapes(
    module: Module, config: ModelConfig, known: HfClass
) -> Iterator[tuple[str, tuple[int, ...]]]:
    path, shared = module.path, ".shared_expert." in module.path
    if module.leaf == "alpha" or (shared and known.folded):
        return
    if module.kind != "experts":
        yield from module.tensors().items()
    else:
        count, *shape = module.shape
        if known.folded:
            shape[path.endswith("down_proj")] += config.intermediate
        for expert in range(count):
            yield f"{expert_path(path, expert)}.weight", tuple(shape)
    if path.endswith(".mlp.gate") and not known.folded:
        yield f"{path.removesuffix('gate')}shared_expert_gate.weight", (1, config.hidden)


def expert_path(switch: str, expert: int) -> str:
    """The module of one expert's projection; `switch` is that of all experts in a tier."""
    return switch.replace(".switch_mlp.", f".experts.{expert}.")


def hf_tensors(
    stored: StoredModel, overlay: Overlay | None, known: HfClass
) -> Mapping[str, FloatTensor]:
    """The tensors of a tier in transformers, with the names of `hf_shapes` and in that order.

    Args:
        stored: the tier.
        overlay: its experts; None if it has none.
        known: its class in transformers.
    """
    config = stored.config
    assert config is not None  # a tier's is checked
    routed = _routed(stored, overlay, known) if overlay is not None else {}
    found: dict[str, FloatTensor] = {}
    for name in hf_shapes(config, known):
        path, _, leaf = name.rpartition(".")
        if name in routed:
            found[name] = routed[name]
        elif name.endswith(".shared_expert_gate.weight"):
            found[name] = Zeros((1, config.hidden), name)
        elif leaf == "bias":
            found[name] = stored.tensors[name]
        else:
            found[name] = base_matrix(stored.tensors, config, path)
            if ".shared_expert.down_proj" in path:
                found[name] = Times(found[name], 2.0)
    return found


def _routed(stored: StoredModel, overlay: Overlay, known: HfClass) -> dict[str, FloatTensor]:
    found: dict[str, FloatTensor] = {}
    for layer, alphas in overlay.alphas().items():
        prefix = f"model.layers.{layer}.mlp"
        for number, (expert, alpha) in enumerate(zip(overlay.experts[layer], alphas, strict=True)):
            for projection in PROJECTIONS:
                factor = float(alpha) if projection == "down" else 1.0
                weights: FloatTensor = ExpertWeights(getattr(expert, projection), factor)
                if known.folded:
                    path = f"{prefix}.shared_expert.{projection}_proj"
                    base = base_matrix(stored.tensors, overlay.config, path)
                    weights = Joined(base, weights, axis=int(projection == "down"))
                found[f"{prefix}.experts.{number}.{projection}_proj.weight"] = weights
    return found
