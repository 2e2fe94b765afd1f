"""Experts as TQ1_0 tensors of a GGUF file, with the routers; named as llama.cpp names them.

GGUF, version 3, little-endian: "GGUF", u32 version, u64 tensors, u64 fields; the fields; for each
tensor its name, dimensions (the last axis first), type and offset; then, from a multiple of 32 on,
the data, each tensor's at a multiple of 32.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outlier_mlx.checkpoints.export_shared import Origin, copied, find_scale_forms, slabs
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.storage.rounding import narrowed
from outlier_mlx.storage.tensors import ExpertMatrix, row_ranges
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.ternary.ggml import BLOCK, TQ1_0_BYTES, pack_tq1_0_blocks
from outlier_mlx.writing.parts import Parts, Tally
from outlier_mlx.writing.writer import WrittenFile

NAME = "experts.gguf"

_ALIGNMENT = 32
_F32, _TQ1_0 = 0, 34
_UINT32, _STRING = 4, 8


@dataclass(frozen=True)
class _Merged:
    """One projection of all experts of a layer: (experts, out, in)."""

    name: str
    matrices: tuple[ExpertMatrix, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices), *self.matrices[0].trits.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // BLOCK * TQ1_0_BYTES


def gguf_tensors(overlay: Overlay, origin: Origin) -> "GgufTensors":
    """Experts and routers for `experts.gguf`, the base, if there is one, for ordinary shards.

    Raises:
        OutlierError: rows that 256 does not divide, or a scale that float16 does not hold.
    """
    _require_blocks(overlay)
    find_scale_forms(overlay).require_float16("GGUF's ternary blocks")
    base = [copied(name, tensor) for name, tensor in overlay.base.items()]
    return GgufTensors(base, "the export", overlay=overlay, origin=origin)


@dataclass(frozen=True, kw_only=True)
class GgufTensors(Parts):
    """The base in shards, all else in a GGUF file."""

    overlay: Overlay
    origin: Origin

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        routers = sum(router.nbytes for router in self.overlay.routers.values())
        return super().nbytes + routers + sum(tensor.nbytes for tensor in _merged(self.overlay))

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write shards and `experts.gguf`; `progress` gets the bytes written."""
        tally = Tally(self.nbytes, progress)
        files = self.write_shards(folder, tally)
        with (folder / NAME).open("xb") as file:
            self._write_header(file)
            for layer in self.overlay.routers:
                _pad(file)
                for slab in slabs(self.overlay.routers[layer]):
                    tally.add(file.write(slab.data))
            for experts in _merged(self.overlay):
                _pad(file)
                for blocks in _blocks(experts):
                    tally.add(file.write(blocks.data))
            _pad(file)
        return files

    def _write_header(self, file: BinaryIO) -> None:
        config = self.overlay.config
        fields: dict[str, str | int] = {
            "general.architecture": "outlier",
            "general.name": self.origin.model,
            "general.quantization_version": 2,
            "outlier.block_count": config.layers,
            "outlier.embedding_length": config.hidden,
            "outlier.expert_feed_forward_length": self.overlay.expert_intermediate,
            "outlier.expert_count": config.experts,
            "outlier.expert_used_count": config.top_k,
        }
        tensors = [
            (f"blk.{layer}.ffn_gate_inp.weight", router.shape, _F32, router.nbytes)
            for layer, router in self.overlay.routers.items()
        ]
        tensors += [(t.name, t.shape, _TQ1_0, t.nbytes) for t in _merged(self.overlay)]
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for key, value in fields.items():
            file.write(_string(key))
            if isinstance(value, str):
                file.write(struct.pack("<I", _STRING) + _string(value))
            else:
                file.write(struct.pack("<II", _UINT32, value))
        offset = 0
        for name, shape, kind, nbytes in tensors:
            file.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
            file.write(struct.pack("<IQ", kind, offset))
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        _pad(file)


def _require_blocks(overlay: Overlay) -> None:
    widths = {"hidden size": overlay.config.hidden, "expert width": overlay.expert_intermediate}
    for name, width in widths.items():
        if width % BLOCK:
            raise OutlierError(
                f"{overlay.path.name}: {name} {width}: GGUF cuts rows into blocks of {BLOCK}, in"
                " TQ1_0 and TQ2_0 alike; --format overlay and --format packed take any width"
            )


def _merged(overlay: Overlay) -> Iterator[_Merged]:
    for layer, experts in overlay.experts.items():
        for projection in PROJECTIONS:
            matrices = tuple(getattr(expert, projection) for expert in experts)
            yield _Merged(f"blk.{layer}.ffn_{projection}_exps.weight", matrices)


def _blocks(tensor: _Merged) -> Iterator[np.ndarray]:
    """Rows of blocks, (rows, in / 256 * 54) uint8, of all experts in order."""
    out, width = tensor.shape[1:]
    for matrix in tensor.matrices:
        scales = narrowed(matrix.row_scales(), "float16", matrix.scale.where)
        for start, stop in row_ranges(out, width):
            d = np.repeat(scales[start:stop, None], width // BLOCK, axis=1)
            yield pack_tq1_0_blocks(matrix.trits.read(start, stop), d)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
