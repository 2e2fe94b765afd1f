"""Pieces of parts: what can be made from one source file alone, and where its bytes belong."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.writing.expert_parts import FromExperts
from outlier_mlx.writing.float_parts import Plain, Quantized, make_slabs, twins_differ
from outlier_mlx.writing.parts import Chunk, Part
from outlier_mlx.writing.writer import PlacedWriter


@dataclass(frozen=True)
class Piece:
    """Bytes of a part that depend on one source file.

    Attributes:
        chunks: makes them, as `Part.chunks` does.
        starts: for each tensor, where its first byte from here belongs in the whole tensor.
        source_bytes: that will be read to make them.
    """

    chunks: Callable[[ThreadPoolExecutor], Iterator[Chunk]]
    starts: dict[str, int]
    source_bytes: int

    def write(self, writer: PlacedWriter, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Write the bytes to their places; yields the bytes of source that each chunk used up."""
        places = dict(self.starts)
        for name, chunk, used in self.chunks(pool):
            writer.write(name, places[name], chunk)
            places[name] += chunk.nbytes
            yield used


@dataclass(frozen=True)
class Work:
    """The pieces of parts, grouped by source file.

    Attributes:
        pieces: by file, in the order of first need; None: those that need no file.
        twins: tensors that overlay and base both hold, by name: they must turn out equal.
    """

    pieces: dict[Path | None, list[Piece]] = field(default_factory=dict)
    twins: dict[str, tuple[FloatTensor, FloatTensor]] = field(default_factory=dict)

    def compared(self, file: Path) -> Iterator[tuple[str, FloatTensor]]:
        """The tensors in a file that have a twin in another."""
        for name, pair in self.twins.items():
            for tensor in pair:
                if source_file(tensor) == file:
                    yield name, tensor

    def check(self, found: Callable[[Path], dict[str, str]]) -> None:
        """Check that twins have the same fingerprint, if both are known.

        Args:
            found: gives the fingerprints of a file's tensors by name; those known so far.

        Raises:
            CheckpointError: two differ.
        """
        for name, (tensor, twin) in self.twins.items():
            first = found(source_file(tensor)).get(name)
            second = found(source_file(twin)).get(name)
            if first is not None and second is not None and first != second:
                raise twins_differ(tensor, twin)


def split(parts: Iterable[Part]) -> Work:
    """Split parts into pieces, grouped by the one source file that each needs."""
    work = Work()
    for part in parts:
        if isinstance(part, FromExperts):
            for place, piece in _expert_pieces(part):
                work.pieces.setdefault(source_file(place), []).append(piece)
            continue
        file = None
        starts = {spec.name: 0 for spec in part.specs()}
        if isinstance(part, Plain | Quantized):
            file = source_file(part.tensor)
            if part.twin is not None:
                work.twins[next(iter(starts))] = (part.tensor, part.twin)
                work.pieces.setdefault(source_file(part.twin), [])
                part = replace(part, twin=None)
        piece = Piece(part.chunks, starts, part.source_bytes)
        work.pieces.setdefault(file, []).append(piece)
    return work


def _expert_pieces(part: FromExperts) -> Iterator[tuple[object, Piece]]:
    """Two pieces for each expert: its trits and its scale may be in different files."""
    for number, matrix in enumerate(part.matrices):
        one = part.of_expert(number)
        starts = {spec.name: number * spec.nbytes for spec in one.specs()}
        yield matrix.trits, Piece(one.code_chunks, starts, prod(matrix.trits.shape))
        yield matrix.scale, Piece(one.scale_chunks, starts, 0)


def source_file(place: object) -> Path:
    """The one file that a tensor is in, however it is wrapped."""
    (file,) = set(_files(place))
    return file


def _files(place: object) -> Iterator[Path]:
    if isinstance(place, Path):
        yield place
    elif is_dataclass(place):
        for item in fields(place):
            yield from _files(getattr(place, item.name))


def fingerprint(tensor: FloatTensor, pool: ThreadPoolExecutor) -> str:
    """SHA-256 of a tensor's values as float32, so that it does not depend on the dtype."""

    def without_minus_zero(slab: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(slab + np.float32(0))

    digest = sha256()
    for slab, _ in make_slabs(tensor, None, pool, without_minus_zero):
        digest.update(slab.data)
    return digest.hexdigest()
