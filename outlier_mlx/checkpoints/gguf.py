"""Overlays whose experts are ternary tensors of a GGUF file: TQ1_0 or TQ2_0 blocks of 256 weights.

Names as llama.cpp has them (`blk.N.ffn_{gate,up,down}_exps.weight` for all experts of a layer,
`blk.N.ffn_gate.E.weight` for one, `blk.N.ffn_gate_inp.weight` for the router), or as overlays do.
Files are read through the package `gguf`, an optional dependency; config.json, alphas and the base
are beside them as in any other form.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.collect import Collected, collect
from outlier_mlx.checkpoints.keys import ExpertKey, RouterKey, parse_key, parse_number
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import read_config
from outlier_mlx.storage.gguf import GgufTensor, read_gguf
from outlier_mlx.storage.paths import entries, inside
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.ternary import TernaryError
from outlier_mlx.ternary.ggml import BLOCK, unpack_tq1_0_blocks, unpack_tq2_0_blocks

SIGN = "blk.N.ffn_*_exps.weight in *.gguf"

_MERGED = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)_exps\.(.+)")
_SPLIT = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.([0-9]+)\.(.+)")
_ROUTER = re.compile(r"blk\.([0-9]+)\.ffn_gate_inp\.weight")
_FLOATS = ("F32", "F16", "BF16")  # named as in safetensors
_UNPACK = {"TQ1_0": unpack_tq1_0_blocks, "TQ2_0": unpack_tq2_0_blocks}


@dataclass(frozen=True)
class BlockTrits:
    """A matrix in ternary blocks: a tensor (out, in) of TQ1_0 or TQ2_0."""

    tensor: GgufTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.tensor.shape

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return self.tensor.where

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return self.tensor.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in).

        Raises:
            CheckpointError: a scale is not finite, or a TQ2_0 weight has the unused code 3.
        """
        return self.read_blocks(start, stop)[0]

    def read_scales(self, start: int, stop: int | None) -> np.ndarray:
        """The scales of the rows' blocks, (rows, in / 256) float16, as they are stored."""
        packed = self.tensor.read(start, stop)
        blocks = packed.reshape(len(packed), -1, self.tensor.block_bytes)
        return np.ascontiguousarray(blocks[..., -2:]).view("<f2")[..., 0]

    def read_blocks(self, start: int, stop: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows as int8 (rows, in) and the scales of their blocks, (rows, in / 256) float16."""
        try:
            return _UNPACK[self.tensor.kind](self.tensor.read(start, stop))
        except TernaryError as error:
            raise CheckpointError(f"{self.where}: from row {start}: {error}") from None


@dataclass(frozen=True)
class BlockScales:
    """One scale for each row: all blocks of the row that are not zero must have it."""

    trits: BlockTrits
    dtype: str = "F16"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 1)."""
        return (self.trits.shape[0], 1)

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return self.trits.where

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Scales of rows `start` to `stop`, (rows, 1).

        Raises:
            CheckpointError: blocks of one row have different scales.
        """
        out, width = self.trits.shape
        stop = out if stop is None else min(stop, out)
        scales = np.empty((stop - start, 1), np.float32)
        for first, last in row_ranges(stop - start, width):
            row, end = start + first, start + last
            d = self.trits.read_scales(row, end)
            if (d == d[:, :1]).all():  # so is nearly every file; NaN is none
                scales[first:last] = d[:, :1]
                continue
            trits, d = self.trits.read_blocks(row, end)
            used = trits.reshape(*d.shape, BLOCK).any(axis=-1)
            # In a row of zeros, any block's scale is as good.
            scale = np.take_along_axis(d, used.argmax(axis=1, keepdims=True), axis=1)
            differs = (used & (d != scale)).any(axis=1)
            if differs.any():
                raise CheckpointError(
                    f"{self.where}: row {row + int(differs.argmax())} has blocks of different"
                    " scales; experts have one for each row"
                )
            scales[first:last] = scale
        return scales


def open_gguf(folder: Path, tensors: Mapping[str, TensorRef]) -> Overlay | None:
    """Open an overlay with experts in GGUF files, or return None if this is none.

    Raises:
        CheckpointError: it is one, but not a valid one, or the package `gguf` is missing.
    """
    collected = collect(tensors)
    files = [path.name for path in entries(folder, "*.gguf")]
    if collected.trits or not files:
        return None
    for name in files:
        path = inside(folder, name)
        for tensor in read_gguf(path).tensors:
            _add(collected, tensor)
    if not collected.trits:
        return None
    return collected.overlay(folder, "gguf", read_config(folder))


def _add(collected: Collected, tensor: GgufTensor) -> None:
    place = tensor.where
    if match := _MERGED.fullmatch(tensor.name) or _SPLIT.fullmatch(tensor.name):
        layer, projection, leaf = parse_number(match[1]), match[2], match[match.re.groups]
        if leaf != "weight":
            raise CheckpointError(f"{place}: unexpected {leaf} of an expert")
        expert = parse_number(match[3]) if match.re is _SPLIT else None
        _add_matrices(collected, tensor, layer, expert, projection)
        return
    key = parse_key(tensor.name)
    if match := _ROUTER.fullmatch(tensor.name):
        key = RouterKey(parse_number(match[1]))
    if isinstance(key, ExpertKey) and key.part == "trits":
        _add_matrices(collected, tensor, key.layer, key.expert, key.projection)
    elif tensor.kind in _FLOATS:
        collected.add(
            key, TensorRef(tensor.name, tensor.file, tensor.kind, tensor.shape, tensor.offset)
        )
    elif key is not None:
        raise CheckpointError(f"{place}: type {tensor.kind}, expected one of {', '.join(_FLOATS)}")
    else:
        collected.unused.append(tensor.name)


def _add_matrices(
    collected: Collected,
    tensor: GgufTensor,
    layer: int,
    expert: int | None,
    projection: str,
) -> None:
    """Add one expert's matrix, or, if `expert` is None, those of all experts."""
    place = tensor.where
    if tensor.kind not in _UNPACK:
        raise CheckpointError(f"{place}: type {tensor.kind}, expected TQ1_0 or TQ2_0")
    rank = 3 if expert is None else 2
    if len(tensor.shape) != rank or 0 in tensor.shape or tensor.shape[-1] % BLOCK:
        raise CheckpointError(
            f"{place}: shape {tensor.shape}, expected {rank} dimensions with rows of a multiple of"
            f" {BLOCK}"
        )
    parts = [tensor]
    if expert is None:
        count, out, _ = tensor.shape
        parts = [tensor.matrix(n * out, (n + 1) * out, f"{tensor.name}[{n}]") for n in range(count)]
    for number, part in enumerate(parts):
        where = (layer, number if expert is None else expert, projection)
        trits = BlockTrits(part)
        collected.add_trits(where, trits)
        collected.add_scale(where, BlockScales(trits))
