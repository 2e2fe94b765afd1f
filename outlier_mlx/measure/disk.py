"""How fast a disk reads pieces of the size of an expert's matrices, in random order, uncached.

Every piece is read once: the page cache keeps what was read, also where it is asked not to. What it
still holds of earlier runs is left out, where the system can tell. Some reads are in flight at a
time, `depth` of them. A read's rate is depth · bytes / seconds: what the disk gives while all reads
are like this one. The figure that counts is the first quartile of the rates, which three reads in
four reach; a mean would be that of a few lucky ones.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.output import flush
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.terminal import Progress, no_progress, size

DEPTHS = (1, 2, 4, 8)
# Reads at each depth, at most, and seconds after which no further one begins.
READS, SECONDS = 24, 2.0
# Reads from which a quartile is taken, at least.
LEAST_READS = 4
# The file that is written where a model has no experts to read: its bytes, those of a piece, and
# seconds after which it is long enough.
FILE_BYTES, PIECE_BYTES, WRITE_SECONDS = 1 << 29, 1 << 23, 5.0
# Smaller pieces say nothing of experts.
LEAST_PIECE = 1 << 20
# Part of a piece that may be in the page cache.
CACHED = 0.05


class NotMeasuredError(OutlierError):
    """The disk may be sound, but cannot be measured."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file that are read at once."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class DiskSpeed:
    """What a disk gave.

    Attributes:
        by_depth: first quartile of the rates in GB/s, by the number of reads at a time.
        piece_bytes: bytes of the largest piece.
        nbytes: bytes that were read in all.
        what: what was read.
    """

    by_depth: Mapping[int, float]
    piece_bytes: int
    nbytes: int
    what: str

    @property
    def depth(self) -> int:
        """The depth at which the disk is fastest."""
        return max(self.by_depth, key=lambda depth: self.by_depth[depth])

    @property
    def gb_s(self) -> float:
        """GB/s at that depth."""
        return self.by_depth[self.depth]


def expert_pieces(tensors: Mapping[str, TensorRef]) -> list[Piece]:
    """The matrices of a model's stacked experts, each of them a piece."""
    found = []
    for name, tensor in tensors.items():
        if kind_of(name) == "experts" and name.endswith(".weight") and len(tensor.shape) == 3:
            one = tensor.nbytes // tensor.shape[0]
            starts = range(tensor.offset, tensor.offset + tensor.nbytes, one) if one else ()
            found += [Piece(tensor.file, start, one) for start in starts]
    return found


def are_enough(pieces: Sequence[Piece]) -> bool:
    """Whether reading these pieces says something about the disk."""
    large = sum(piece.nbytes >= LEAST_PIECE for piece in pieces)
    return large >= sum(2 * depth for depth in DEPTHS)


def measure_pieces(
    pieces: Sequence[Piece], what: str, progress: Progress = no_progress
) -> DiskSpeed:
    """Measure the disk with pieces of files, each read at most once.

    Args:
        pieces: what to read; some of them, in random order.
        what: their name in the result.
        progress: called with bytes read so far, and at most.

    Raises:
        NotMeasuredError: all of them stay in the page cache.
        OutlierError: a file cannot be read.
    """
    with ExitStack() as opened:
        files = {piece.file for piece in pieces}
        handles = {file: opened.enter_context(_opened(file)) for file in files}
        return _measure(handles, pieces, what, progress)


def measure_folder(folder: Path, progress: Progress = no_progress) -> DiskSpeed:
    """Measure the disk of a folder with a temporary file, which has no name and is gone at the end.

    Args:
        folder: where the file is written.
        progress: called with bytes written and read so far, and at most.

    Raises:
        NotMeasuredError: there is no room for the file, or it stays in the page cache.
        OSError: no file can be written there.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * FILE_BYTES:
        raise _no_room(folder, free)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        handle, path = file.fileno(), folder / "temporary file"
        try:
            pieces = _write(handle, path, lambda n: progress(n, 2 * FILE_BYTES))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _no_room(folder, shutil.disk_usage(folder).free) from None
        _bypass_cache(handle)
        written = len(pieces) * PIECE_BYTES
        what = f"a temporary file of {size(written)} in {folder}"
        return _measure(
            {path: handle}, pieces, what, lambda n, _: progress(written + n, 2 * written)
        )


def _no_room(folder: Path, free: int) -> NotMeasuredError:
    return NotMeasuredError(
        f"{folder}: {size(free)} free; measuring the disk takes a file of {size(FILE_BYTES)} and"
        " leaves as much; make room, or name its speed with --disk GB/s"
    )


def _write(handle: int, path: Path, progress: Callable[[int], None]) -> list[Piece]:
    """Fill a file with random bytes, on the disk."""
    draw, begun = np.random.default_rng(), time.perf_counter()
    pieces: list[Piece] = []
    while len(pieces) * PIECE_BYTES < FILE_BYTES:
        if len(pieces) % 8 == 0:
            flush(handle)
            if time.perf_counter() - begun > WRITE_SECONDS:
                break
        rest = memoryview(draw.bytes(PIECE_BYTES))
        while rest:
            rest = rest[os.write(handle, rest) :]
        pieces.append(Piece(path, len(pieces) * PIECE_BYTES, PIECE_BYTES))
        progress(len(pieces) * PIECE_BYTES)
    flush(handle)
    return pieces


def _measure(
    handles: Mapping[Path, int], pieces: Sequence[Piece], what: str, progress: Progress
) -> DiskSpeed:
    order, largest = random.sample(pieces, len(pieces)), max(piece.nbytes for piece in pieces)
    share = min(READS, len(order) // len(DEPTHS))
    found: dict[int, float] = {}
    done = 0

    def advance(nbytes: int) -> None:
        progress(done + nbytes, len(DEPTHS) * share * largest)

    for depth in DEPTHS:
        batch = [order.pop() for _ in range(share)]
        for handle in handles.values():
            _drop(handle)
        # Where the system does not say what is cached, pages are taken to be dropped.
        cold = [p for p in batch if (cached_share(handles[p.file], p) or 0.0) <= CACHED]
        reads = _read_all(handles, cold, depth, advance)
        done += sum(nbytes for nbytes, _ in reads)
        # At the end, fewer than `depth` reads share the disk.
        full = reads[: len(reads) - depth + 1]
        if len(full) >= LEAST_READS:
            rates = [depth * nbytes / seconds / 1e9 for nbytes, seconds in full]
            found[depth] = float(np.quantile(rates, 0.25))
    if not found:
        raise NotMeasuredError(
            f"{pieces[0].file.parent}: what was read there stays in the page cache, so the disk"
            " itself cannot be measured; name its speed with --disk GB/s"
        )
    return DiskSpeed(found, largest, done, what)


def _read_all(
    handles: Mapping[Path, int],
    pieces: Sequence[Piece],
    depth: int,
    progress: Callable[[int], None],
) -> list[tuple[int, float]]:
    """Read pieces, `depth` at a time: bytes and seconds of each, in the order in which they end."""
    todo, done = deque(pieces), deque[tuple[int, float]]()
    largest = max((piece.nbytes for piece in pieces), default=0)
    until = time.perf_counter() + SECONDS

    def read_some() -> None:
        buffer = np.ones(largest, np.uint8).data  # ones, so that its pages are there
        while todo and time.perf_counter() < until:
            try:
                piece = todo.popleft()
            except IndexError:  # another thread was faster
                return
            start = time.perf_counter()
            _read(handles[piece.file], piece, buffer[: piece.nbytes])
            done.append((piece.nbytes, time.perf_counter() - start))

    with ThreadPoolExecutor(depth) as pool:
        try:
            running = {pool.submit(read_some) for _ in range(depth)}
            while running:
                ended, running = wait(running, timeout=0.1)
                for one in ended:
                    one.result()
                progress(sum(nbytes for nbytes, _ in [*done]))
        finally:
            todo.clear()
    return list(done)


def _read(handle: int, piece: Piece, buffer: memoryview) -> None:
    at = piece.offset
    while buffer.nbytes:
        try:
            count = os.preadv(handle, [buffer], at)
        except OSError as error:
            raise OutlierError(f"{piece.file}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise OutlierError(f"{piece.file}: became shorter while it was read")
        buffer, at = buffer[count:], at + count


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """A file to read, as its handle."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise OutlierError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        _bypass_cache(handle)
        yield handle
    finally:
        os.close(handle)


def _bypass_cache(handle: int) -> None:
    """Ask macOS not to keep what is read; elsewhere, pages are dropped before they are read."""
    if sys.platform == "darwin":
        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)


def _drop(handle: int) -> None:
    """Drop a file from the page cache, on Linux."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(handle: int, piece: Piece) -> float | None:
    """The part of a piece that is in the page cache; None where the system does not say."""
    begin = piece.offset - piece.offset % mmap.ALLOCATIONGRANULARITY
    length = piece.offset + piece.nbytes - begin
    state = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        with mmap.mmap(handle, length, access=mmap.ACCESS_READ, offset=begin) as mapped:
            pages = np.frombuffer(mapped, np.uint8)
            given = pages.ctypes.data, length, state.ctypes.data
            kinds = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
            failed = mincore(*(kind(value) for kind, value in zip(kinds, given, strict=True)))
            del pages  # the mapping cannot be closed while an array uses it
    except (AttributeError, OSError, ValueError):
        return None
    return None if failed else float(np.mean(state & 1))
