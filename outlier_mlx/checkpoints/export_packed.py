"""The packed form: `packed_experts/` with a file for each tensor, and one `experts.bin` of all.

Everything else goes into ordinary shards with the keys `base.model.*`, as the published
runtime expects.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outlier_mlx.checkpoints.export_shared import (
    Origin,
    ScaleForms,
    copied,
    expert_key,
    find_scale_forms,
    matrices,
)
from outlier_mlx.checkpoints.monolith import ALIGNMENT, HEADER, MAGIC, ROW, VERSION, aligned
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.packed import FOLDER, MONOLITH
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix, PackedTrits, Trits, row_ranges
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.ternary import pack_tq1_0, rows_to_flat
from outlier_mlx.ternary.flat import GROUP, packed_bytes
from outlier_mlx.writing.parts import Parts, Tally
from outlier_mlx.writing.writer import WrittenFile

_MEGA = 1 << 20


def packed_tensors(overlay: Overlay, origin: Origin) -> "PackedTensors":
    """The tensors of the packed form.

    Raises:
        OutlierError: a scale that float16 does not hold; packed files have no other.
    """
    scales = find_scale_forms(overlay)
    scales.require_float16("packed files")
    parts = [copied(name, tensor) for name, tensor in _copied(overlay)]
    return PackedTensors(parts, "the export", overlay=overlay, origin=origin, scales=scales)


@dataclass(frozen=True, kw_only=True)
class PackedTensors(Parts):
    """All but the experts in shards; the experts twice, in files of their own and in one."""

    overlay: Overlay
    origin: Origin
    scales: ScaleForms

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; experts count twice."""
        lengths = sum(self._lengths())
        count = sum(len(experts) for experts in self.overlay.experts.values())
        return super().nbytes + count * (lengths + aligned(lengths))

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write shards, and `packed_experts/`; `progress` gets the bytes written."""
        tally = Tally(self.nbytes, progress)
        files = self.write_shards(folder, tally)
        inner = folder / FOLDER
        inner.mkdir()
        index: dict[str, dict] = {}
        for key, projection, matrix in matrices(self.overlay):
            index |= self._write_matrix(inner, f"base.{key}", projection, matrix, tally)
        write_json(inner / "index.json", index)
        write_json(inner / "meta.json", self._meta(index))
        self._write_monolith(inner, tally)
        return files

    def _write_matrix(
        self,
        inner: Path,
        key: str,
        projection: str,
        matrix: ExpertMatrix,
        tally: Tally,
    ) -> dict[str, dict]:
        """Write the two files of a matrix; returns their entries for the index."""
        trits, scale = f"{key}_ternary", f"{key}_scale"
        with (inner / _file(trits)).open("xb") as file:
            out, width = matrix.trits.shape
            # This many rows end at the end of a byte.
            for start, stop in row_ranges(out, width, multiple=GROUP):
                tally.add(file.write(_packed(matrix.trits, start, stop).data))
        values = self.scales.values(projection, matrix, "float16")
        (inner / _file(scale)).write_bytes(values.tobytes())
        tally.add(values.nbytes)
        shape = tuple(matrix.trits.shape)
        return {
            trits: {
                "file": _file(trits),
                "shape": list(shape),
                "dtype": "uint8",
                "format": "tq10",
                "original_bytes": prod(shape),
                "packed_bytes": packed_bytes(prod(shape)),
            },
            scale: {
                "file": _file(scale),
                "shape": list(values.shape),
                "dtype": "float16",
                "format": "raw",
                "packed_bytes": values.nbytes,
            },
        }

    def _meta(self, index: dict[str, dict]) -> dict:
        trits = [entry for entry in index.values() if entry["format"] == "tq10"]
        original = sum(entry["original_bytes"] for entry in trits)
        packed = sum(entry["packed_bytes"] for entry in trits)
        return {
            "model_ref": self.origin.model,
            "model_dir": ".",
            "format": "tq10",
            "ternary_tensors": len(trits),
            "scale_tensors": len(index) - len(trits),
            "original_mb": original / _MEGA,
            "packed_mb": packed / _MEGA,
            "compression_ratio": original / packed,
        }

    def _lengths(self) -> list[int]:
        """Bytes of the six parts of every expert: all experts of a tier have the same shapes."""
        expert = next(iter(self.overlay.experts.values()))[0]
        lengths = []
        for projection, matrix in expert:
            lengths.append(packed_bytes(prod(matrix.trits.shape)))
            lengths.append(2 * prod(self.scales.shape(projection, matrix)))
        return lengths

    def _write_monolith(self, inner: Path, tally: Tally) -> None:
        """Join the files of `inner`."""
        experts = self.overlay.experts
        places = [(layer, e) for layer, found in sorted(experts.items()) for e in range(len(found))]
        lengths = self._lengths()
        size = sum(lengths)
        begin = ALIGNMENT + aligned(len(places) * ROW.size)
        count = len(places) // len(experts)
        with (inner / MONOLITH).open("xb") as file:
            head = HEADER.pack(MAGIC, VERSION, len(experts), count, len(places), 6, *lengths)
            file.write(head)
            _pad(file)
            for number, (layer, e) in enumerate(places):
                file.write(ROW.pack(layer, e, begin + number * aligned(size), size))
            _pad(file)
            for layer, e in places:
                for projection, _ in experts[layer][e]:
                    for part in ("ternary", "scale"):
                        key = f"base.{expert_key(layer, e, projection)}_{part}"
                        with (inner / _file(key)).open("rb") as f:
                            shutil.copyfileobj(f, file)
                _pad(file)
                tally.add(aligned(size))


def _packed(trits: Trits, start: int, stop: int) -> np.ndarray:
    """Rows in flat bytes, (bytes,) uint8."""
    if isinstance(trits, PackedTrits):
        return rows_to_flat(trits.read_rows(start, stop), (stop - start, trits.shape[1]))
    return pack_tq1_0(trits.read(start, stop))


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _file(key: str) -> str:
    return key.replace(".", "_") + ".bin"


def _copied(overlay: Overlay) -> Iterator[tuple[str, TensorRef]]:
    for name, tensor in overlay.base.items():
        words = name.split(".")
        shared = words[1] == "layers" and words[3] == "mlp" and int(words[2]) in overlay.routers
        if shared and words[5] == "weight":
            projection = words[4].removesuffix("_proj")
            name = f"model.layers.{words[2]}.mlp.shared_expert.{projection}_W"
        yield f"base.{name}", tensor
    for layer, router in overlay.routers.items():
        yield f"base.model.layers.{layer}.mlp.router.weight", router
