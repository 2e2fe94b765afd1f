"""A tier read back as an `Overlay`: the same trits, scales and alphas that went into it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from shlex import quote

import numpy as np

from outlier_mlx.checkpoints.overlay import Expert, Overlay, check_base
from outlier_mlx.checkpoints.stored_model import StoredModel, open_stored
from outlier_mlx.checkpoints.ternary_model import RowTrits
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import (
    PROJECTIONS,
    ModelConfig,
    is_overlay,
    is_ternary_model,
    is_tier,
    raw_config,
)
from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix, Stored

_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)


@dataclass(frozen=True)
class AffineTrits(Stored):
    """A matrix in MLX's affine 2-bit format, whose codes are trit + 1: (out, in / 16) uint32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.tensor.shape[0], 16 * self.tensor.shape[1])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in).

        Raises:
            CheckpointError: code 3, which is not a trit.
        """
        packed = self.tensor.read(start, stop).view(np.uint8)
        codes = (packed[..., None] >> _SHIFTS & 3).reshape(len(packed), -1)
        if codes.size and codes.max() > 2:
            raise CheckpointError(f"{self.where}: from row {start}: code 3, which is not a trit")
        return codes.view(np.int8) - np.int8(1)


@dataclass(frozen=True)
class AffineScales(Stored):
    """The scales of `AffineTrits`, one a row: groups must agree, and biases be their negatives."""

    biases: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,)."""
        return self.tensor.shape[:1]

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Scales of rows `start` to `stop`, (rows,).

        Raises:
            CheckpointError: these are not the scales of ternary weights.
        """
        scales = self.tensor.read_float32(start, stop)
        ternary = (scales == scales[:, :1]) & (self.biases.read_float32(start, stop) == -scales)
        if not ternary.all():
            raise CheckpointError(f"{self.where}: not the scales of ternary weights")
        return scales[:, 0]


def open_tier(folder: Path) -> Overlay:
    """Open a tier as an overlay; only headers are read.

    Returns:
        The overlay. Its base is there if the tier stores all of it unquantized, else empty.

    Raises:
        CheckpointError: it is not a tier, has no experts, or is not valid.
    """
    stored = open_stored_tier(folder)
    if stored.config is None or not stored.config.moe_layers:
        raise CheckpointError(f"{folder}: has no experts to export")
    return as_overlay(stored, folder)


def open_stored_tier(folder: Path) -> StoredModel:
    """Open a tier as it is stored, with or without experts; only headers are read.

    Raises:
        CheckpointError: it is not a tier, or is not valid.
    """
    raw = raw_config(folder)
    if is_ternary_model(raw):
        raise CheckpointError(
            f"{folder}: not a tier, but a ternary model: --format mlx2 exports it"
        )
    if is_overlay(raw):
        raise CheckpointError(
            f"{folder}: an overlay, and a whole model is exported from a tier: first outlier-mlx"
            f" convert {quote(str(folder))} --base BASE --out TIER, then export TIER"
        )
    if not is_tier(raw):
        raise CheckpointError(f"{folder}: neither a tier nor an overlay: nothing to export")
    return open_stored(folder)


def as_overlay(stored: StoredModel, folder: Path) -> Overlay:
    """A tier as an overlay; see `open_tier`.

    Args:
        stored: what `open_stored_tier` returned.
        folder: the tier's.
    """
    config, tensors = stored.config, stored.tensors
    assert config is not None  # a tier's is checked
    prefixes = {layer: f"model.layers.{layer}.mlp" for layer in config.moe_layers}
    base = _base(tensors)
    overlay = Overlay(
        path=folder,
        form="tier",
        config=config,
        base=check_base(base, config, folder.name) if base else {},
        routers={n: tensors[f"{prefix}.gate.weight"] for n, prefix in prefixes.items()},
        experts={n: _experts(tensors, config, prefix) for n, prefix in prefixes.items()},
        alpha_tensors={f"{p}.alpha": tensors[f"{p}.alpha"] for p in prefixes.values()},
    )
    overlay.check()
    return overlay


def _base(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The base's tensors by their names in mlx-lm; none if any of them is quantized."""
    base = {
        name.replace(".mlp.shared_expert.", ".mlp."): tensor
        for name, tensor in tensors.items()
        if not any(sign in name for sign in (".mlp.switch_mlp.", ".mlp.gate.", ".mlp.alpha"))
    }
    return {} if any(name.endswith(".scales") for name in base) else base


def _experts(tensors: Mapping[str, TensorRef], config: ModelConfig, prefix: str) -> list[Expert]:
    def matrix(projection: str, expert: int) -> ExpertMatrix:
        width = config.expert_width if projection == "down" else config.hidden
        assert width is not None  # `open_stored` has seen to that
        return expert_matrix(tensors, f"{prefix}.switch_mlp.{projection}_proj", expert, width)

    return [Expert(*(matrix(p, e) for p in PROJECTIONS)) for e in range(config.experts)]


def expert_matrix(
    tensors: Mapping[str, TensorRef], path: str, expert: int, width: int
) -> ExpertMatrix:
    """One projection of an expert, as it is stored in a tier or in an imported model.

    Args:
        tensors: the model's.
        path: name of the projection's module, which has all experts.
        expert: number of the expert.
        width: width of its rows.
    """
    weight, scales = (_slice(tensors[f"{path}.{leaf}"], expert) for leaf in ("weight", "scales"))
    if weight.dtype == "U8":
        return ExpertMatrix(RowTrits(weight, width), scales)
    biases = _slice(tensors[f"{path}.biases"], expert)
    return ExpertMatrix(AffineTrits(weight), AffineScales(scales, biases))


def _slice(tensor: TensorRef, number: int) -> TensorRef:
    """One expert's part of a tensor (experts, ...)."""
    shape = tensor.shape[1:]
    offset = tensor.offset + number * prod(shape) * NUMPY_DTYPES[tensor.dtype].itemsize
    return TensorRef(f"{tensor.name}[{number}]", tensor.file, tensor.dtype, shape, offset)
