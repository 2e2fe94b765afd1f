"""A tier with some of its tensors replaced: what `tune` writes."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from outlier_mlx.checkpoints.stored_model import open_stored
from outlier_mlx.engine.loading import check_loads
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import raw_config
from outlier_mlx.models.stored import stored_params
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.storage.texts import read_json
from outlier_mlx.tiers.card import model_card
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.float_parts import SLAB_BYTES, as_bytes
from outlier_mlx.writing.folders import Sources
from outlier_mlx.writing.model_folder import Written, write_model
from outlier_mlx.writing.parts import Chunk, Part, Parts
from outlier_mlx.writing.writer import TensorSpec

_MADE_ANEW = ("files", "producer", "format_version")


@dataclass(frozen=True)
class Copied(Part):
    """A tensor of another tier, as it is there or with other values."""

    tensor: TensorRef
    count: int
    value: mx.array | None

    @property
    def params(self) -> int:
        """Parameters of the model in it."""
        return self.count

    @property
    def source_bytes(self) -> int:
        """Its size on disk."""
        return self.tensor.nbytes

    def specs(self) -> list[TensorSpec]:
        """Its name, dtype and shape, which stay."""
        return [TensorSpec(self.tensor.name, self.tensor.dtype, self.tensor.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The new value, or the bytes of the file slab by slab."""
        name, nbytes = self.tensor.name, self.tensor.nbytes
        if self.value is not None:
            yield name, as_bytes(self.value), nbytes
            return
        rows = self.tensor.shape[0]
        for start, stop in row_ranges(rows, nbytes // max(1, rows), SLAB_BYTES):
            data = self.tensor.read(start, stop).reshape(-1).data.cast("B")
            yield name, data, data.nbytes


def write_tuned(
    tier: Path,
    out: Path,
    tensors: Mapping[str, mx.array],
    how: dict,
    *,
    inputs: Sources = (),
    force: bool = False,
) -> Written:
    """Write a tier anew with other values in some tensors.

    Args:
        tier: the tier's folder.
        out: the folder to make.
        tensors: the new values by the tensors' names, in the dtypes and shapes that the tier has.
        how: what the manifest says under `tuned`, and the card in words: `parts` (a list),
            `text` (a file's name) and `teacher` (a model's name, or None).
        inputs: what the values were made from; never replaced.
        force: replace `out` if this project wrote it.

    Raises:
        CheckpointError: the tier is not valid, or a tensor is not one of its own.
        OutlierError: `out` exists, or cannot be written.
    """
    stored = open_stored(tier)
    assert stored.config is not None  # a tier's is checked
    parts = []
    for name, tensor in stored.tensors.items():
        count = stored_params(name, stored.tensors, stored.config, tier.name)
        value = tensors.get(name)
        if value is not None and (value.shape, value.nbytes) != (tensor.shape, tensor.nbytes):
            raise CheckpointError(
                f"{name}: {value.dtype} {value.shape}, expected {tensor.dtype} {tensor.shape}"
            )
        parts.append(Copied(name.rpartition(".")[0], kind_of(name), tensor, count, value))
    for name in tensors:
        if name not in stored.tensors:
            raise CheckpointError(f"{name}: not a tensor of {tier}")
    manifest = read_json(tier / "tier.json")
    kept = {key: value for key, value in manifest.items() if key not in _MADE_ANEW}
    return write_model(
        out,
        Parts(parts, "the tier"),
        raw_config(tier),
        source=tier.name,
        inputs=[tier, *inputs],
        assets=partial(copy_assets, [tier]),
        manifest=kept | {"tuned": how},
        manifest_name="tier.json",
        card=lambda folder: model_card(folder, out.name),
        check=check_loads,
        force=force,
    )
