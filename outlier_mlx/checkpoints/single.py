"""Overlays in one folder of shards: the forms "real" (V1, V2) and "v3.2".

They differ in spelling alone: `base.model.layers.N.mlp.shared_expert.gate_W` is
`model.layers.N.mlp.gate_proj.weight`. A folder that was repacked may mix the two.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from outlier_mlx.checkpoints.config import read_config
from outlier_mlx.checkpoints.keys import (
    PROJECTIONS,
    AlphaKey,
    BaseKey,
    ExpertKey,
    RouterKey,
    parse_key,
)
from outlier_mlx.checkpoints.overlay import Expert, ExpertMatrix, Overlay
from outlier_mlx.checkpoints.shards import find_files, read_shards
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import TensorRef

K = TypeVar("K")


def matches(keys: Iterable[str]) -> str | None:
    """The form that these tensor keys are spelt in: "real", "v3.2" or None."""
    parsed = {key: parse_key(key) for key in keys}
    if not any(isinstance(key, ExpertKey | RouterKey) for key in parsed.values()):
        return None
    return "real" if any(key.startswith("base.") for key in parsed) else "v3.2"


def open_single(folder: Path) -> Overlay | None:
    """Open a folder of shards as an overlay, or return None if it has no expert and no router.

    Raises:
        CheckpointError: it is an overlay, but not a sound one.
    """
    tensors = read_shards(folder)
    form = matches(tensors)
    if form is None:
        return None
    base: dict[str, TensorRef] = {}
    routers: dict[int, TensorRef] = {}
    alphas: dict[str, TensorRef] = {}
    parts: dict[ExpertKey, TensorRef] = {}
    unused = []
    for key, tensor in tensors.items():
        match parse_key(key):
            case BaseKey(name):
                _add(base, name, tensor)
            case RouterKey(layer):
                _add(routers, layer, tensor)
            case AlphaKey(name):
                _add(alphas, name, tensor)
            case ExpertKey() as part:
                _add(parts, part, tensor)
            case None:
                unused.append(key)
    overlay = Overlay(
        path=folder,
        form=form,
        config=read_config(folder),
        base=base,
        routers=routers,
        experts=assemble_experts(parts, folder.name),
        alpha_files=list(find_files(folder, "alpha.json")),
        alpha_tensors=alphas,
        unused=tuple(unused),
    )
    overlay.check()
    return overlay


def _add(place: dict[K, TensorRef], key: K, tensor: TensorRef) -> None:
    if key in place:
        raise CheckpointError(f"{tensor.where}: the same weight as {place[key].where}")
    place[key] = tensor


def assemble_experts(parts: dict[ExpertKey, TensorRef], place: str) -> dict[int, list[Expert]]:
    """Experts by layer from their six tensors each.

    Raises:
        CheckpointError: a part is missing, numbers leave a gap, or trits are not int8.
    """
    counts: dict[int, int] = {}
    for key in parts:
        counts[key.layer] = max(counts.get(key.layer, 0), key.expert + 1)

    def matrix(layer: int, expert: int, projection: str) -> ExpertMatrix:
        found = []
        for part in ("trits", "scale"):
            tensor = parts.get(ExpertKey(layer, expert, projection, part))
            if tensor is None:
                raise CheckpointError(
                    f"{place}: layer {layer}, expert {expert}: its {projection} {part} is missing"
                )
            found.append(tensor)
        trits, scale = found
        if trits.dtype != "I8":
            raise CheckpointError(f"{trits.where}: dtype {trits.dtype}, trits are I8")
        return ExpertMatrix(trits, scale)

    return {
        layer: [Expert(*(matrix(layer, e, p) for p in PROJECTIONS)) for e in range(count)]
        for layer, count in sorted(counts.items())
    }
