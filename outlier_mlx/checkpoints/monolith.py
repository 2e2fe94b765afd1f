"""`experts.bin`: all packed experts of a model in one file, each at a multiple of 4096 bytes.

Little-endian. A header of 4096 bytes: "OEXS", then u32 version, layers, experts a layer, entries
and parts an expert, at 24 the u64 lengths of the parts. From 4096 on, a table of u64 (layer,
expert, offset, length), padded to 4096; then the experts, their parts with nothing between.
"""

import struct
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import PROJECTIONS

MAGIC = b"OEXS"
VERSION = 1
ALIGNMENT = 4096
#: The parts of an expert in their order: (projection, "trits" or "scale").
PARTS = tuple((projection, part) for projection in PROJECTIONS for part in ("trits", "scale"))

HEADER = struct.Struct("<4s5I6Q")
ROW = struct.Struct("<4Q")
# Far more experts than any model has: 32 MB of table.
_MAX_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Monolith:
    """Where everything is in an `experts.bin`.

    Attributes:
        lengths: bytes of the six parts of an expert.
        experts: for each (layer, expert), where its first part begins.
    """

    lengths: tuple[int, ...]
    experts: dict[tuple[int, int], int]

    def offsets(self, layer: int, expert: int) -> list[int]:
        """Where each of an expert's parts begins."""
        return list(accumulate(self.lengths[:-1], initial=self.experts[layer, expert]))


def head_bytes(begin: bytes) -> int:
    """How much of a monolith `read_monolith` reads, given its first bytes."""
    if len(begin) < HEADER.size or begin[:4] != MAGIC:
        return HEADER.size
    _, _, _, _, entries, *_ = HEADER.unpack(begin[: HEADER.size])
    return ALIGNMENT + min(entries, _MAX_ENTRIES) * ROW.size


def aligned(size: int) -> int:
    """`size`, rounded up to a multiple of 4096."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_monolith(path: Path) -> Monolith:
    """Read header and table.

    Raises:
        CheckpointError: they are not valid, do not fit the file, or leave experts out.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or size < ALIGNMENT or head[:4] != MAGIC:
            raise CheckpointError(f"{path.name}: not a monolith: it does not begin with OEXS")
        _, version, layers, experts, entries, parts, *lengths = HEADER.unpack(head)
        if version != VERSION or parts != len(PARTS):
            raise CheckpointError(
                f"{path.name}: version {version} with {parts} parts an expert, expected"
                f" version {VERSION} with {len(PARTS)}"
            )
        if entries != layers * experts or entries > _MAX_ENTRIES:
            raise CheckpointError(
                f"{path.name}: {entries} entries, but {layers} layers of {experts} experts"
            )
        file.seek(ALIGNMENT)
        table = file.read(entries * ROW.size)
    if len(table) < entries * ROW.size:
        raise CheckpointError(f"{path.name}: the file ends within its table")
    rows = list(ROW.iter_unpack(table))
    begin = ALIGNMENT + aligned(len(table))
    for layer, expert, offset, length in rows:
        place = f"{path.name}: layer {layer}, expert {expert}"
        if length != sum(lengths):
            raise CheckpointError(f"{place}: {length} bytes, but its parts take {sum(lengths)}")
        if offset % ALIGNMENT or offset < begin or offset + aligned(length) > size:
            raise CheckpointError(
                f"{place}: offset {offset}: expected a multiple of {ALIGNMENT} from {begin} on, and"
                f" {aligned(length)} bytes before the file's end at {size}"
            )
    _check_grid(path, rows, layers, experts)
    return Monolith(tuple(lengths), {(layer, e): offset for layer, e, offset, _ in rows})


def _check_grid(path: Path, rows: list[tuple], layers: int, experts: int) -> None:
    places = {(layer, expert) for layer, expert, _, _ in rows}
    if len(places) < len(rows):
        raise CheckpointError(f"{path.name}: an expert is listed twice")
    if len({layer for layer, _ in places}) != layers or any(e >= experts for _, e in places):
        raise CheckpointError(
            f"{path.name}: its table does not list experts 0 to {experts - 1} of {layers} layers"
        )
    by_offset = sorted(rows, key=lambda row: row[2])
    for (layer, expert, offset, length), (other, second, following, _) in pairwise(by_offset):
        if following < offset + length:
            raise CheckpointError(
                f"{path.name}: layer {layer}, expert {expert} overlaps layer {other}, expert"
                f" {second}"
            )
