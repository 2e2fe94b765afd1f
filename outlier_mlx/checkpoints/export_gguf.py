"""Experts as TQ1_0 tensors of a GGUF file, with the routers; named as llama.cpp names them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.export_shared import Origin, copied, find_scale_forms
from outlier_mlx.checkpoints.gguf_encode import float_slabs, ternary_slabs
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.storage.padding import padded, padding_note, whole_blocks
from outlier_mlx.storage.rounding import narrowed
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.ternary.ggml import BLOCK
from outlier_mlx.writing.gguf_file import Field, GgufTensor, write_gguf
from outlier_mlx.writing.parts import Parts, Tally
from outlier_mlx.writing.writer import WrittenFile

NAME = "experts.gguf"


def gguf_tensors(overlay: Overlay, origin: Origin) -> "GgufTensors":
    """Experts and routers for `experts.gguf`, the base, if there is one, for ordinary shards.

    Raises:
        OutlierError: a hidden size that 256 does not divide, or a scale that float16 does not hold.
    """
    _require_blocks(overlay)
    find_scale_forms(overlay).require_float16("GGUF's ternary blocks")
    base = [copied(name, tensor) for name, tensor in overlay.base.items()]
    return GgufTensors(base, "the export", overlay=overlay, origin=origin)


@dataclass(frozen=True, kw_only=True)
class GgufTensors(Parts):
    """The base in shards, all else in a GGUF file.

    Experts whose width 256 does not divide are written wider, with zeros.
    """

    overlay: Overlay
    origin: Origin

    @property
    def width(self) -> int:
        """Width of an expert in the file."""
        return whole_blocks(self.overlay.expert_intermediate, BLOCK)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what is not exactly as in the tier."""
        return tuple(padding_note(self.overlay.expert_intermediate, self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes + sum(tensor.nbytes for tensor in self._tensors())

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write shards and `experts.gguf`; `progress` gets the bytes written."""
        tally = Tally(self.nbytes, progress)
        files = self.write_shards(folder, tally)
        return [*files, write_gguf(folder / NAME, self._fields(), self._tensors(), tally)]

    def _fields(self) -> dict[str, Field]:
        config = self.overlay.config
        return {
            "general.architecture": "outlier",
            "general.name": self.origin.model,
            "general.quantization_version": 2,
            "outlier.block_count": config.layers,
            "outlier.embedding_length": config.hidden,
            "outlier.expert_feed_forward_length": self.width,
            "outlier.expert_count": config.experts,
            "outlier.expert_used_count": config.top_k,
        }

    def _tensors(self) -> list[GgufTensor]:
        """Routers, then one tensor (experts, out, in) for each projection of a layer."""
        routers = [
            GgufTensor(
                f"blk.{layer}.ffn_gate_inp.weight",
                *("F32", router.shape, partial(float_slabs, router)),
            )
            for layer, router in self.overlay.routers.items()
        ]
        experts = []
        for layer, members in self.overlay.experts.items():
            for projection in PROJECTIONS:
                hidden = self.overlay.config.hidden
                of_one = (hidden, self.width) if projection == "down" else (self.width, hidden)
                matrices = [padded(getattr(expert, projection), of_one) for expert in members]
                name = f"blk.{layer}.ffn_{projection}_exps.weight"
                shape = (len(matrices), *of_one)
                experts.append(GgufTensor(name, "TQ1_0", shape, partial(_blocks, matrices)))
        return routers + experts


def _require_blocks(overlay: Overlay) -> None:
    hidden = overlay.config.hidden
    if hidden % BLOCK:
        raise OutlierError(
            f"{overlay.path.name}: hidden size {hidden}: GGUF cuts rows into blocks of {BLOCK}, in"
            " TQ1_0 and TQ2_0 alike; --format overlay and --format packed take any size"
        )


def _blocks(matrices: list[ExpertMatrix]) -> Iterator[np.ndarray]:
    """Rows of blocks, (rows, in / 256 * 54) uint8, of all experts in order."""
    for matrix in matrices:
        scales = narrowed(matrix.row_scales(), "float16", matrix.scale.where)
        yield from ternary_slabs("tq1_0", matrix.trits, scales)
