"""Overlays with experts of five trits a byte: a file for each tensor, or all in `experts.bin`.

`packed_experts/index.json` gives shapes; everything else is in ordinary shards beside it.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.collect import Collected, collect
from outlier_mlx.checkpoints.keys import ExpertKey, parse_key
from outlier_mlx.checkpoints.monolith import PARTS, read_monolith
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.models.config import read_config
from outlier_mlx.models.fields import MAX_SIZE
from outlier_mlx.storage.paths import inside, require_plain
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import Stored
from outlier_mlx.storage.texts import read_json
from outlier_mlx.ternary import TernaryError, flat_to_rows, pack_rows, unpack_tq1_0
from outlier_mlx.ternary.flat import GROUP, packed_bytes

SIGN = "packed_experts/index.json"
FOLDER = "packed_experts"
MONOLITH = "experts.bin"
#: The path of a monolith in another place; the published runtime has this variable, too.
MONOLITH_VARIABLE = "OUTLIER_MONOLITH_PATH"


@dataclass(frozen=True)
class PackedTrits(Stored):
    """A matrix of trits in flat bytes, stored as (packed_bytes(out * in),) uint8."""

    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.size

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in).

        Rows share bytes with their neighbours where 5 does not divide `in`, so the bytes that
        cover them are read, and what belongs to other rows is cut off.

        Raises:
            CheckpointError: a byte above 242.
        """
        first, last = self._span(start, stop)
        begin = first // GROUP
        packed = self._read(begin, -(-last // GROUP))
        with self._naming(begin):
            trits = unpack_tq1_0(packed, (GROUP * packed.size,))
        return trits[first - GROUP * begin : last - GROUP * begin].reshape(-1, self.shape[1])

    def read_rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as a tier has them, (rows, row_bytes) uint8; see `read`."""
        first, last = self._span(start, stop)
        if first % GROUP or (last % GROUP and last < prod(self.shape)):
            return pack_rows(self.read(start, stop))
        begin = first // GROUP
        packed = self._read(begin, -(-last // GROUP))
        with self._naming(begin):
            return flat_to_rows(packed, ((last - first) // self.shape[1], self.shape[1]))

    def _span(self, start: int, stop: int | None) -> tuple[int, int]:
        """The first trit of these rows, and the one after the last."""
        out, width = self.shape
        return start * width, (out if stop is None else min(stop, out)) * width

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Bytes `begin` to `end`. Padding other than zeros gives a warning, and becomes zeros."""
        packed = self.tensor.read(begin, end)
        used = prod(self.shape) % GROUP
        if used and end == self.nbytes:
            values, padding = packed[-1] % 3**used, packed[-1] // 3**used
            zeros = sum(3**k for k in range(GROUP - used))
            if padding != zeros and packed[-1] < 3**GROUP:
                warnings.warn(
                    f"{self.where}: its last byte is padded with something else than zeros",
                    CheckpointWarning,
                    stacklevel=3,
                )
                packed[-1] = values + zeros * 3**used
        return packed

    @contextmanager
    def _naming(self, begin: int) -> Iterator[None]:
        try:
            yield
        except TernaryError as error:
            raise CheckpointError(f"{self.where}: from byte {begin}: {error}") from None


@dataclass(frozen=True)
class Entry:
    """One line of index.json, checked: a part of an expert."""

    key: str
    part: ExpertKey
    file: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What its shape takes: five trits a byte, or float16 scales."""
        return packed_bytes(prod(self.shape)) if self.part.part == "trits" else 2 * prod(self.shape)

    def add_to(self, collected: Collected, file: Path, offset: int) -> None:
        """Put the part into `collected`, given where its bytes are."""
        place = (self.part.layer, self.part.expert, self.part.projection)
        if self.part.part == "trits":
            stored = TensorRef(self.key, file, "U8", (self.nbytes,), offset)
            collected.add_trits(place, PackedTrits(stored, self.shape))
        else:
            collected.add_scale(place, TensorRef(self.key, file, "F16", self.shape, offset))


def open_packed(folder: Path, tensors: Mapping[str, TensorRef]) -> Overlay | None:
    """Open an overlay with packed experts, or return None if this is none.

    Looked for, in this order: the monolith that the environment names (for overlays that hold
    routers and no experts), `packed_experts/experts.bin`, and the files of `packed_experts/`.

    Raises:
        CheckpointError: it is one, but not a valid one.
    """
    collected = collect(tensors)
    if collected.trits:
        if (folder / SIGN).exists():
            warnings.warn(
                f"{folder.name}: {FOLDER} is ignored: the shards hold the experts",
                CheckpointWarning,
                stacklevel=2,
            )
        return None
    named = os.environ.get(MONOLITH_VARIABLE)
    if named and collected.routers:
        monolith = Path(named)
        if not monolith.is_file():
            raise CheckpointError(f"{MONOLITH_VARIABLE}: {named}: no such file")
        _say_origin(folder, monolith)
        _add_monolith(collected, monolith, read_index(monolith.parent, "index.json"))
        return collected.overlay(folder, "monolith", read_config(folder))
    inner = f"{FOLDER}/{MONOLITH}"
    if not (folder / SIGN).exists():
        if (folder / FOLDER).is_dir():
            raise CheckpointError(
                f"{folder}: {FOLDER}: no index.json, which has the shapes of the tensors"
            )
        return None
    entries = read_index(folder, SIGN)
    if (folder / inner).exists():
        _add_monolith(collected, inside(folder, inner), entries)
        return collected.overlay(folder, "monolith", read_config(folder))
    for entry in entries.values():
        file = inside(folder, f"{FOLDER}/{entry.file}")
        size = file.stat().st_size
        if size != entry.nbytes:
            raise CheckpointError(
                f"{entry.file}: {size} bytes, but index.json says {entry.shape}, which takes"
                f" {entry.nbytes}"
            )
        entry.add_to(collected, file, 0)
    return collected.overlay(folder, "packed", read_config(folder))


def _add_monolith(collected: Collected, path: Path, entries: dict[ExpertKey, Entry]) -> None:
    monolith = read_monolith(path)
    for layer, expert in monolith.experts:
        offsets = monolith.offsets(layer, expert)
        for (projection, part), offset, length in zip(
            PARTS, offsets, monolith.lengths, strict=True
        ):
            entry = entries.get(ExpertKey(layer, expert, projection, part))
            place = f"{path.name}: layer {layer}, expert {expert}, {projection} {part}"
            if entry is None:
                raise CheckpointError(f"{place}: index.json does not say its shape")
            if entry.nbytes != length:
                raise CheckpointError(
                    f"{place}: {length} bytes, but index.json says {entry.shape}, which takes"
                    f" {entry.nbytes}"
                )
            entry.add_to(collected, path, offset)


def _say_origin(folder: Path, monolith: Path) -> None:
    """Warn that experts come from another place; refuse those of another model, if known."""
    origin = None
    if (monolith.parent / "meta.json").exists():
        origin = read_json(inside(monolith.parent, "meta.json")).get("model_ref")
    wanted = read_json(inside(folder, "config.json")).get("_name_or_path")
    if _is_repo(origin) and _is_repo(wanted) and origin != wanted:
        raise CheckpointError(
            f"{MONOLITH_VARIABLE}: {monolith} holds the experts of {origin}, not of {wanted}"
        )
    warnings.warn(
        f"{folder.name}: its experts come from {monolith} ({MONOLITH_VARIABLE}), packed from"
        f" {origin or 'an unknown model'}",
        CheckpointWarning,
        stacklevel=3,
    )


def _is_repo(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def read_index(folder: Path, name: str) -> dict[ExpertKey, Entry]:
    """The entries of an index.json by the part of an expert.

    Raises:
        CheckpointError: an entry is not valid.
    """
    entries: dict[ExpertKey, Entry] = {}
    for key, fields in read_json(inside(folder, name)).items():
        entry = _entry(key, fields)
        if entry.part in entries:
            raise CheckpointError(
                f"index.json: {key}: the same weight as {entries[entry.part].key}"
            )
        entries[entry.part] = entry
    return entries


def _entry(key: str, fields: object) -> Entry:
    part = parse_key(key)
    place = f"index.json: {key}"
    if not isinstance(part, ExpertKey) or not isinstance(fields, dict):
        raise CheckpointError(f"{place}: not an entry for a part of an expert")
    file, shape = fields.get("file"), fields.get("shape")
    kind = (fields.get("format"), fields.get("dtype"))
    trits = part.part == "trits"
    expected = ("tq10", "uint8") if trits else ("raw", "float16")
    if kind != expected:
        raise CheckpointError(f"{place}: format and dtype {kind}, expected {expected}")
    if not isinstance(file, str):
        raise CheckpointError(f"{place}: file is {str(file)[:80]!r}, expected a name")
    require_plain(file, place)
    if not isinstance(shape, list) or not all(
        type(size) is int and 0 <= size <= MAX_SIZE for size in shape
    ):
        raise CheckpointError(f"{place}: shape is not a list of sizes from 0 to {MAX_SIZE}")
    if len(shape) > 2 or (trits and len(shape) < 2):
        raise CheckpointError(f"{place}: shape {shape} is not that of {part.part}")
    entry = Entry(key, part, file, tuple(shape))
    if fields.get("packed_bytes", entry.nbytes) != entry.nbytes:
        raise CheckpointError(
            f"{place}: packed_bytes is {fields['packed_bytes']!r}, but its shape takes"
            f" {entry.nbytes}"
        )
    return entry
