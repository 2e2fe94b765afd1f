"""What exported forms share: config.json, alpha.json, exact scales, and tensors that are copied."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import PROJECTIONS, ModelConfig
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.rounding import is_rounded, narrowed
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix, Trits, row_ranges
from outlier_mlx.storage.texts import read_json
from outlier_mlx.writing.parts import Chunk, Part
from outlier_mlx.writing.writer import TensorSpec


def tier_manifest(folder: Path) -> dict:
    """A tier's manifest; empty if it has none."""
    return read_json(inside(folder, "tier.json")) if (folder / "tier.json").exists() else {}


@dataclass(frozen=True)
class Origin:
    """Where a tier came from.

    Attributes:
        model: the name of the overlay.
        base: the name of the base that readers need; None if the export contains it.
    """

    model: str
    base: str | None


# Fields of a tier's config that an overlay has under other names, or does not have.
_OF_TIERS = frozenset(
    ["model_file", "ternary", "quantization", "quantization_config", "num_experts"]
    + ["num_experts_per_tok", "moe_intermediate_size", "moe_layers", "dtype"]
)


def overlay_config(config: ModelConfig, origin: Origin) -> dict:
    """The config.json of an overlay, from that of a tier or base; it names the base it needs."""
    kept = {key: value for key, value in config.raw.items() if key not in _OF_TIERS}
    kept |= {
        "model_type": "outlier_moe",
        "architectures": ["OutlierMoEForCausalLM"],
        "n_experts": config.experts,
        "top_k": config.top_k,
        "moe_layer_indices": list(config.moe_layers),
    }
    if origin.base is not None:
        kept["base_model_name_or_path"] = origin.base
    if config.rope_scaling is not None:
        # Published configs call the field so, and so do older tools.
        kept["rope_scaling"] = {"type": config.rope_scaling["rope_type"], **config.rope_scaling}
    return kept


def write_alphas(values: Mapping[int, np.ndarray], folder: Path) -> None:
    """Write alpha.json; its decimal numbers read back as the same float32.

    Args:
        values: for each MoE layer (experts,) float32.
        folder: where it is written.
    """
    table = {
        str(layer): {str(expert): float(alpha) for expert, alpha in enumerate(alphas)}
        for layer, alphas in values.items()
    }
    write_json(folder / "alpha.json", table)


@dataclass(frozen=True)
class ScaleForms:
    """What all scales of a model have in common.

    Attributes:
        whole: projections whose matrices all have one scale for the whole matrix.
        wide: the first scale that is not exact in float16, for messages; None if there is none.
    """

    whole: frozenset[str]
    wide: str | None

    def shape(self, projection: str, matrix: ExpertMatrix) -> tuple[int, ...]:
        """The shape of a matrix' stored scale: (1,) or (out, 1)."""
        return (1,) if projection in self.whole else (matrix.trits.shape[0], 1)

    def values(self, projection: str, matrix: ExpertMatrix, dtype: str) -> np.ndarray:
        """The scale in that shape, "float16" or "float32"."""
        values = narrowed(matrix.row_scales(), dtype, matrix.scale.where)
        return values[:1] if projection in self.whole else values[:, None]

    def require_float16(self, what: str) -> None:
        """Refuse to write what float16 would round: `what` have float16 scales.

        Raises:
            OutlierError: names the scale, and what to do instead.
        """
        if self.wide is not None:
            raise OutlierError(
                f"{self.wide}, which no float16 holds; {what} hold float16 scales. --format overlay"
                " keeps them in float32."
            )


def find_scale_forms(overlay: Overlay) -> ScaleForms:
    """Read all scales of an overlay, one matrix at a time, and find how to write them."""
    whole = set(PROJECTIONS)
    wide = None
    for experts in overlay.experts.values():
        for expert in experts:
            for projection, matrix in expert:
                values = matrix.row_scales()
                if (values != values[:1]).any():
                    whole.discard(projection)
                rounded = is_rounded(values, "float16")
                if wide is None and rounded.any():
                    wide = f"{matrix.scale.where}: a scale of {float(values[rounded][0])!r}"
    return ScaleForms(frozenset(whole), wide)


@dataclass(frozen=True)
class FromSlabs(Part):
    """One tensor whose bytes a function yields, a few rows at a time."""

    spec: TensorSpec
    make: Callable[[], Iterator[np.ndarray]]

    @property
    def params(self) -> int:
        """Elements of the tensor."""
        return prod(self.spec.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read: as many as are written."""
        return self.spec.nbytes

    def specs(self) -> list[TensorSpec]:
        """The name, dtype and shape of its only tensor."""
        return [self.spec]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the tensor, slab by slab."""
        for slab in self.make():
            yield self.spec.name, slab.data, slab.nbytes


def copied(name: str, tensor: TensorRef) -> FromSlabs:
    """A tensor that is copied as it is stored, under another name."""
    spec = TensorSpec(name, tensor.dtype, tensor.shape)
    return FromSlabs(name, kind_of(name), spec, partial(slabs, tensor))


def matrices(overlay: Overlay) -> Iterator[tuple[str, str, ExpertMatrix]]:
    """The experts' matrices with their names in V3.2 and their projections."""
    for layer, experts in overlay.experts.items():
        for number, expert in enumerate(experts):
            for projection, matrix in expert:
                yield expert_key(layer, number, projection), projection, matrix


def expert_key(layer: int, expert: int, projection: str) -> str:
    """The name of an expert's matrix in V3.2, which its trits and its scale add to."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


def slabs(tensor: TensorRef) -> Iterator[np.ndarray]:
    """A tensor's rows as stored, a few at a time.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    row_size = tensor.nbytes // max(1, tensor.shape[0])
    for start, stop in row_ranges(tensor.shape[0], row_size):
        yield np.ascontiguousarray(tensor.read_finite(start, stop))


def trit_slabs(trits: Trits) -> Iterator[np.ndarray]:
    """Rows of trits, int8 (rows, in), a few at a time."""
    for start, stop in row_ranges(trits.shape[0], trits.shape[1]):
        yield trits.read(start, stop)
