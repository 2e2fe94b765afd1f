"""Tiers as checkpoints of stock transformers; what they lose there is kept in a folder beside.

In float32, nothing is rounded but the products of scales and alphas. The folder `outlier/` has the
tier's config.json, where it came from, and its scales, biases and alphas: with them, `import` finds
every code and trit again in the weights (`imports/transformers_folder.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.export_shared import copied, tier_manifest
from outlier_mlx.checkpoints.hf_layout import hf_class, hf_config
from outlier_mlx.checkpoints.hf_tensors import ExpertWeights, hf_tensors
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.stored_model import StoredModel
from outlier_mlx.checkpoints.tier import as_overlay, open_stored_tier
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.float_parts import SAFETENSORS_NAMES, Plain
from outlier_mlx.writing.parts import Part, Parts, Tally
from outlier_mlx.writing.writer import WrittenFile

#: What the manifest of such an export calls it.
TRANSFORMERS = "transformers"
#: The folder of what `import` needs to make the tier again.
KEPT = "outlier"
#: Its files besides tensors: the tier's config.json, what its manifest says of its sources, and its
#: tokenizer's config, which names another class.
CONFIG, ORIGIN, TOKENIZER = "config.json", "origin.json", "tokenizer_config.json"
# What a manifest has in every folder that this project writes.
_OF_MANIFESTS = ("producer", "format_version", "files")


@dataclass(frozen=True, kw_only=True)
class HfTensors(Parts):
    """The tensors of a checkpoint, and what is kept of the tier's own."""

    kept: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes + sum(part.nbytes for part in self.kept)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return super().source_bytes + sum(part.source_bytes for part in self.kept)

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write the shards of both, with one progress."""
        tally = Tally(self.source_bytes, progress)
        files = self.write_shards(folder, tally)
        (folder / KEPT).mkdir(exist_ok=True)
        kept = Parts(self.kept).write_shards(folder / KEPT, tally)
        return files + [
            WrittenFile(f"{KEPT}/{file.name}", file.sha256, file.nbytes) for file in kept
        ]


@dataclass(frozen=True)
class HfExport:
    """A tier as it is written for transformers.

    Attributes:
        tensors: of the checkpoint, and what is kept beside.
        config: its config.json.
        beside: the JSON files in `KEPT`; none if the tier cannot be made again.
    """

    tensors: HfTensors
    config: dict
    beside: Mapping[str, dict]

    def write_beside(self, folder: Path) -> None:
        """Write the JSON files beside the checkpoint in `folder`."""
        for name, content in self.beside.items():
            (folder / KEPT).mkdir(exist_ok=True)
            write_json(folder / KEPT / name, content)


def hf_export(folder: Path, name: str, dtype: str = "float32") -> HfExport:
    """Decide how a tier is written for transformers; only headers and scales are read.

    Args:
        folder: the tier's.
        name: what messages call it.
        dtype: the dtype of the weights; the router stays float32. Other than in float32, weights
            are rounded, and the tier cannot be made from them again.

    Raises:
        CheckpointError: no tier, or one that no class of transformers computes.
    """
    stored = open_stored_tier(folder)
    config = stored.config
    assert config is not None  # a tier's is checked
    known = hf_class(config, name)
    overlay = as_overlay(stored, folder) if config.moe_layers else None
    parts = [
        _part(tensor_name, tensor, dtype)
        for tensor_name, tensor in hf_tensors(stored, overlay, known).items()
    ]
    exact = dtype == "float32"
    kept = tuple(_kept(stored, overlay)) if exact else ()
    tensors = HfTensors(parts, "the export", kept=kept)
    beside = {CONFIG: stored.raw, ORIGIN: _origin(folder)} if exact else {}
    if exact and (folder / TOKENIZER).exists():
        beside[TOKENIZER] = read_json(inside(folder, TOKENIZER))
    return HfExport(tensors, hf_config(config, known, dtype), beside)


def _part(name: str, tensor: FloatTensor, dtype: str) -> Plain:
    router = name.endswith(".mlp.gate.weight")
    stored = "float32" if router else dtype
    return Plain(name.rpartition(".")[0], kind_of(name), tensor, name, stored)


def _kept(stored: StoredModel, overlay: Overlay | None) -> list[Part]:
    """The tensors of the tier that cannot be found in the checkpoint's weights."""
    whole = _lost_trits(overlay) if overlay is not None else set()
    return [
        copied(name, tensor)
        for name, tensor in stored.tensors.items()
        if name.rpartition(".")[2] in ("scales", "biases", "alpha")
        or name in whole
        or tensor.dtype != _usual_dtype(name, tensor, stored.raw)
    ]


def _usual_dtype(name: str, tensor: TensorRef, raw: dict) -> str:
    """The dtype in which `import` writes a tensor: the tier's, but for routers and packed ones."""
    if tensor.dtype not in FLOAT_DTYPES:
        return tensor.dtype
    return SAFETENSORS_NAMES["float32" if name.endswith(".mlp.gate.weight") else raw["dtype"]]


def _lost_trits(overlay: Overlay) -> set[str]:
    """The packed trits of which some are multiplied by 0."""
    found = set()
    for layer, alphas in overlay.alphas().items():
        for expert, alpha in zip(overlay.experts[layer], alphas, strict=True):
            for projection in PROJECTIONS:
                factor = float(alpha) if projection == "down" else 1.0
                if not ExpertWeights(getattr(expert, projection), factor).scales().all():
                    found.add(f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj.weight")
    return found


def _origin(folder: Path) -> dict:
    """What the tier's manifest says of its sources and its recipe."""
    return {key: value for key, value in tier_manifest(folder).items() if key not in _OF_MANIFESTS}
