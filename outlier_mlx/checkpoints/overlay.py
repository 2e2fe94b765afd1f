"""`Overlay`: what every form of overlay on disk becomes. Nothing here knows the forms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.alpha import Alphas, alphas_from_tensors, read_alpha_file
from outlier_mlx.checkpoints.alpha_overlay import read_alpha_overlay, read_any_alphas
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import BASE_TYPE, ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix

# In place of a file of alphas: those that `alpha_overlay.pt` replaced.
ORIGINAL = "original"


@dataclass(frozen=True)
class Expert:
    """The three projections of an expert."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    def __iter__(self) -> Iterator[tuple[str, ExpertMatrix]]:
        return iter([("gate", self.gate), ("up", self.up), ("down", self.down)])


@dataclass(frozen=True)
class Overlay:
    """A lazy view of an overlay: dimensions and places of tensors, no data.

    Attributes:
        path: the folder it was opened from.
        form: the name of its form on disk.
        config: its dimensions.
        base: tensors of the base model that it contains, by mlx-lm's names; may be empty.
        routers: for each MoE layer, the routing matrix (experts, hidden).
        experts: for each MoE layer, its experts in order.
        alpha_files: alpha.json files; where two name an expert, the later wins.
        alpha_tensors: tensors of alphas by key; they win over the files.
        alpha_overlay: V3.3's `alpha_overlay.pt`, which wins over both.
        unused: keys that are not loaded.
    """

    path: Path
    form: str
    config: ModelConfig
    base: Mapping[str, TensorRef]
    routers: Mapping[int, TensorRef]
    experts: Mapping[int, list[Expert]]
    alpha_files: list[Path] = field(default_factory=list)
    alpha_tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    alpha_overlay: Path | None = None
    unused: tuple[str, ...] = ()

    @property
    def expert_intermediate(self) -> int:
        """Width of an expert; 0 without experts."""
        return next((layer[0].gate.trits.shape[0] for layer in self.experts.values()), 0)

    def alphas(self, override: Path | str | None = None) -> dict[int, np.ndarray]:
        """The alphas that are used: for each MoE layer (experts,) float32.

        An expert that no source names has alpha 0 if there is any alpha.json, else 1.

        Args:
            override: a file of alphas (JSON, or V3.3's `.pt`) that wins over the overlay's own, or
                "original" for those that `alpha_overlay.pt` replaced.

        Raises:
            CheckpointError: a source is not valid, two tensors disagree, or nothing was replaced.
        """
        layers, experts = self.config.layers, self.config.experts
        found: Alphas = {}
        for file in self.alpha_files:
            found.update(read_alpha_file(file, layers, experts))
        found.update(alphas_from_tensors(self.alpha_tensors, layers, experts))
        if self.alpha_overlay is not None:
            newer = read_alpha_overlay(self.alpha_overlay, layers, experts)
            newer.compare(found, self.alpha_overlay.name)
            found.update(newer.originals if override == ORIGINAL else newer.alphas)
        elif override == ORIGINAL:
            raise CheckpointError("--alpha original: there is no alpha_overlay.pt")
        if override not in (None, ORIGINAL):
            found.update(read_any_alphas(Path(override), layers, experts))
        # Checkpoints with a partial alpha.json rely on 0, those without any on 1.
        default = 0.0 if self.alpha_files else 1.0
        return {
            layer: np.array([found.get((layer, e), default) for e in range(experts)], np.float32)
            for layer in self.config.moe_layers
        }

    def check(self) -> None:
        """Check that layers, experts and shapes fit together, from headers alone.

        Raises:
            CheckpointError: names the tensor and what was expected.
        """
        config = self.config
        check_layers(self.base, config, self.path.name)
        if not config.experts and (self.routers or self.experts):
            raise CheckpointError(f"{self.path}: config.json names no experts: not an overlay")
        if set(self.routers) != set(config.moe_layers):
            raise CheckpointError(
                f"{self.path.name}: config.json makes layers {list(config.moe_layers)} MoE, but"
                f" routers were found for {sorted(self.routers)}"
            )
        width = self.expert_intermediate
        for layer, router in self.routers.items():
            _check_float(router, (config.experts, config.hidden))
            experts = self.experts.get(layer, [])
            if len(experts) != config.experts:
                raise CheckpointError(
                    f"{self.path.name}: layer {layer} has {len(experts)} experts,"
                    f" expected {config.experts}"
                )
            for expert in experts:
                _check_expert(expert, config.hidden, width)


def _check_expert(expert: Expert, hidden: int, width: int) -> None:
    for name, matrix in expert:
        shape = (hidden, width) if name == "down" else (width, hidden)
        if tuple(matrix.trits.shape) != shape:
            raise CheckpointError(
                f"{matrix.trits.where}: shape {tuple(matrix.trits.shape)}, expected {shape}"
            )
        allowed = [(), (1,), (shape[0], 1), (shape[0],)]
        if matrix.scale.dtype not in FLOAT_DTYPES or matrix.scale.shape not in allowed:
            raise CheckpointError(
                f"{matrix.scale.where}: {matrix.scale.dtype} {matrix.scale.shape}, expected a"
                f" float scale of shape (), (1,) or ({shape[0]}, 1)"
            )


def _check_float(tensor: TensorRef, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOAT_DTYPES or tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected a float tensor {shape}"
        )


def check_layers(base: Mapping[str, TensorRef], config: ModelConfig, place: str) -> None:
    """Refuse base tensors of layers that the model does not have."""
    for name, tensor in base.items():
        words = name.split(".")
        if words[1] == "layers" and int(words[2]) >= config.layers:
            raise CheckpointError(
                f"{place}: {tensor.where}: config.json has {config.layers} layers, numbered from 0"
            )


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the base has, by mlx-lm's name, in the order of a forward pass."""
    modules = family(config.family).modules(config)
    return {name: shape for module in modules for name, shape in module.tensors().items()}


def check_base(
    tensors: Mapping[str, TensorRef], config: ModelConfig, place: str
) -> dict[str, TensorRef]:
    """Check that `tensors` are a whole base of its family and dimensions.

    Returns:
        The tensors that the model uses, in the order of `base_shapes`.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is another family's; `place`
            names the source.
    """
    used = {}
    # Where the family has biases, not the config, a layer may leave them out in threes.
    optional = family(config.family).qkv_bias is True
    shapes = base_shapes(config)
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            biases = [name.replace(f".{p}_proj.", f".{q}_proj.") for p in "qkv" for q in "qkv"]
            if optional and name.endswith(".bias") and not any(b in tensors for b in biases):
                continue
            raise CheckpointError(f"{place}: the tensor {name} {shape} is missing")
        _check_float(tensor, shape)
        used[name] = tensor
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(
                f"{place}: {tensor.where}: a {config.family} model has no such tensor; if the base"
                f" is of another family, {BASE_TYPE} in config.json can say so"
            )
    return used
