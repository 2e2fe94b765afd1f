"""Sorting tensors by their keys, and putting experts together: for every form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from outlier_mlx.checkpoints.keys import AlphaKey, BaseKey, ExpertKey, Key, RouterKey, parse_key
from outlier_mlx.checkpoints.overlay import Expert, Overlay
from outlier_mlx.checkpoints.weights import ternary_matrix
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import PROJECTIONS, ModelConfig
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import find_files
from outlier_mlx.storage.tensors import ExpertMatrix, FloatTensor, Trits

K = TypeVar("K")
T = TypeVar("T", TensorRef, Trits, FloatTensor)

#: Layer, expert and projection.
Place = tuple[int, int, str]


@dataclass
class Collected:
    """Tensors of an overlay by what they are.

    Attributes:
        base: tensors of the base, by mlx-lm's name.
        routers: routing matrices by layer.
        alphas: tensors of alphas by key.
        trits: trits of the experts' matrices.
        scales: scales of the experts' matrices.
        unused: unknown keys.
    """

    base: dict[str, TensorRef] = field(default_factory=dict)
    routers: dict[int, TensorRef] = field(default_factory=dict)
    alphas: dict[str, TensorRef] = field(default_factory=dict)
    trits: dict[Place, Trits] = field(default_factory=dict)
    scales: dict[Place, FloatTensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def add(self, key: Key | None, tensor: TensorRef) -> None:
        """Put a tensor where its key says.

        Raises:
            CheckpointError: there is one already: the same weight under two spellings.
        """
        match key:
            case BaseKey(name):
                _add(self.base, name, tensor)
            case RouterKey(layer):
                _add(self.routers, layer, tensor)
            case AlphaKey(name):
                _add(self.alphas, name, tensor)
            case ExpertKey(layer, expert, projection, "trits"):
                self.add_trits((layer, expert, projection), tensor)
            case ExpertKey(layer, expert, projection):
                self.add_scale((layer, expert, projection), tensor)
            case None:
                self.unused.append(tensor.name)

    def add_trits(self, place: Place, trits: Trits) -> None:
        """Put the trits of an expert's matrix in their place; see `add`."""
        _add(self.trits, place, trits)

    def add_scale(self, place: Place, scale: FloatTensor) -> None:
        """Put the scale of an expert's matrix in its place; see `add`."""
        _add(self.scales, place, scale)

    def overlay(self, folder: Path, form: str, config: ModelConfig) -> Overlay:
        """The overlay of these tensors, checked.

        Raises:
            CheckpointError: something is missing, unexpected, or of the wrong shape.
        """
        overlay = Overlay(
            path=folder,
            form=form,
            config=config,
            base=self.base,
            routers=self.routers,
            experts=assemble_experts(self.trits, self.scales, config, folder.name),
            alpha_files=list(find_files(folder, "alpha.json")),
            alpha_tensors=self.alphas,
            unused=tuple(self.unused),
        )
        overlay.check()
        return overlay


def _add(target: dict[K, T], key: K, tensor: T) -> None:
    if key in target:
        raise CheckpointError(f"{tensor.where}: the same weight as {target[key].where}")
    target[key] = tensor


def collect(tensors: Mapping[str, TensorRef]) -> Collected:
    """Sort the tensors of a folder's shards."""
    collected = Collected()
    for key, tensor in tensors.items():
        collected.add(parse_key(key), tensor)
    return collected


def assemble_experts(
    trits: Mapping[Place, Trits],
    scales: Mapping[Place, FloatTensor],
    config: ModelConfig,
    folder: str,
) -> dict[int, list[Expert]]:
    """Experts by layer from their six parts each.

    Raises:
        CheckpointError: a part is missing, a number is out of range, or a dtype cannot hold trits.
    """
    for part in (trits, scales):
        for (layer, expert, _), tensor in part.items():
            if layer >= config.layers or expert >= config.experts:
                raise CheckpointError(
                    f"{folder}: {tensor.where}: config.json has {config.layers} layers of"
                    f" {config.experts} experts, numbered from 0"
                )
            if layer not in config.moe_layers:
                raise CheckpointError(
                    f"{folder}: {tensor.where}: layers [{layer}] have experts but are not MoE"
                    f" layers; those are {list(config.moe_layers)}"
                )

    def matrix(layer: int, expert: int, projection: str) -> ExpertMatrix:
        place = (layer, expert, projection)
        if place not in trits:
            raise CheckpointError(
                f"{folder}: layer {layer}, expert {expert}: its {projection} trits are missing"
            )
        found = ternary_matrix(trits[place], scales.get(place))
        if found is None:
            raise CheckpointError(
                f"{folder}: layer {layer}, expert {expert}: its {projection} scale is missing"
            )
        return found

    layers = sorted({layer for layer, _, _ in [*trits, *scales]})
    return {
        layer: [Expert(*(matrix(layer, e, p) for p in PROJECTIONS)) for e in range(config.experts)]
        for layer in layers
    }
