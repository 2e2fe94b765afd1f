"""The V3.2 form: one folder of shards with the keys `model.layers.N.mlp.experts.E.*`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.export_scales import find_scale_forms
from outlier_mlx.checkpoints.export_shared import (
    Origin,
    copy_tensor,
    overlay_config,
    stored_spec,
    trit_slabs,
    write_alphas,
    write_json,
)
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec


class V32Export:
    """Writes a model in the V3.2 form.

    Trits are int8, scales float16 where that holds all of them exactly, else float32. Alphas are
    written twice, as tensors and as alpha.json: readers know the one or the other.
    """

    def __init__(self, overlay: Overlay, origin: Origin) -> None:
        self.overlay = overlay
        self.origin = origin
        self.scales = find_scale_forms(overlay)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self._specs())

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write everything but tokenizer and licence; `advance` is told of bytes written."""
        write_json(folder / "config.json", overlay_config(self.overlay, self.origin))
        write_alphas(self.overlay, folder)
        with ShardedWriter(folder, list(self._specs())) as writer:
            for name, tensor in _copied(self.overlay):
                advance(copy_tensor(writer, name, tensor))
            for name, projection, matrix in _matrices(self.overlay):
                for slab in trit_slabs(matrix.trits):
                    writer.write(f"{name}_ternary", slab.data)
                    advance(slab.size)
                scale = self.scales.values(projection, matrix).astype(self._numpy_dtype)
                writer.write(f"{name}_scale", scale.data)
                advance(scale.nbytes)
            writer.finish()

    @property
    def _numpy_dtype(self) -> type[np.floating]:
        return np.float16 if self.scales.wide is None else np.float32

    def _specs(self) -> Iterator[TensorSpec]:
        dtype = "F16" if self.scales.wide is None else "F32"
        for name, tensor in _copied(self.overlay):
            yield stored_spec(name, tensor)
        for name, projection, matrix in _matrices(self.overlay):
            yield TensorSpec(f"{name}_ternary", "I8", tuple(matrix.trits.shape))
            yield TensorSpec(f"{name}_scale", dtype, self.scales.shape(projection, matrix))


def _copied(overlay: Overlay) -> Iterator[tuple[str, TensorRef]]:
    yield from overlay.base.items()
    for layer, router in overlay.routers.items():
        yield f"model.layers.{layer}.mlp.router.weight", router
    for layer, alphas in zip(overlay.routers, overlay.alpha_tensors.values(), strict=True):
        yield f"model.layers.{layer}.mlp.alpha_values", alphas


def _matrices(overlay: Overlay) -> Iterator[tuple[str, str, ExpertMatrix]]:
    for layer, experts in overlay.experts.items():
        for number, expert in enumerate(experts):
            for projection, matrix in expert:
                name = f"model.layers.{layer}.mlp.experts.{number}.{projection}"
                yield name, projection, matrix
