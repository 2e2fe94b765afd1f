"""How fast a disk is: what is read, what counts, and what is left behind."""

from __future__ import annotations

import errno
import os
import posix
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import disk
from outlier_mlx.measure.disk import (
    DiskSpeed,
    Piece,
    are_enough,
    cached_share,
    expert_pieces,
    measure_folder,
    measure_pieces,
)
from outlier_mlx.storage.shards import read_shards

PIECE = 1 << 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 64 small pieces, which does reach the disk; temporary folders may be memory."""
    monkeypatch.setattr(disk, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(disk, "FILE_BYTES", 64 * PIECE)
    monkeypatch.setattr(os, "fsync", posix.fsync)
    monkeypatch.setattr(disk, "cached_share", lambda handle, piece: None)


@pytest.fixture
def pieces(tmp_path: Path, small: None) -> list[Piece]:
    """32 pieces of one file, each full of its own number."""
    file = tmp_path / "pieces"
    file.write_bytes(np.repeat(np.arange(32, dtype=np.uint8), PIECE).tobytes())
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return [Piece(file, n * PIECE, PIECE) for n in range(32)]


def test_a_temporary_file_is_measured_and_gone(tmp_path: Path, small: None):
    shown: list[tuple[int, int | None]] = []
    found = measure_folder(tmp_path, lambda *counts: shown.append(counts))
    assert set(found.by_depth) <= {1, 2, 4, 8} and found.gb_s == max(found.by_depth.values()) > 0
    assert found.nbytes == 64 * PIECE and found.piece_bytes == PIECE
    assert found.what == f"a temporary file of 4.2 MB in {tmp_path}"
    assert shown[-1] == (128 * PIECE, 128 * PIECE) and shown == sorted(shown)
    assert not list(tmp_path.iterdir())


def test_the_quartile_of_reads_with_all_in_flight(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three reads in four reach it; the last ones, which have the disk for themselves, are out."""
    pieces = [Piece(Path("x"), n, 1_000_000) for n in range(20)]
    seconds = {1: [1e-3, 2e-3, 4e-3, 5e-3, 8e-3], 2: [2e-3] * 4 + [1e-9], 4: [1e-3] * 5, 8: []}

    def read_all(handles: Any, cold: Any, depth: int, progress: Any) -> Any:
        return [(1_000_000, one) for one in seconds[depth]]

    monkeypatch.setattr(disk, "_read_all", read_all)
    monkeypatch.setattr(disk, "_drop", lambda handle: None)
    found = disk._measure({Path("x"): 0}, pieces, "", lambda done, total: None)
    # Of depth 4, two reads were in full company: too few to tell.
    assert found.by_depth == pytest.approx({1: 0.2, 2: 1.0})
    assert (found.depth, found.gb_s) == (2, pytest.approx(1.0))


def test_every_piece_is_read_once_and_whole(
    pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = disk._read

    def noted(handle: int, piece: Piece, buffer: memoryview) -> None:
        real(handle, piece, buffer)
        assert bytes(buffer) == bytes([piece.offset // PIECE]) * PIECE
        read.append(piece.offset)

    monkeypatch.setattr(disk, "_read", noted)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda h, b, at: preadv(h, [b[0][:10_000]], at))
    found = measure_pieces(pieces, "pieces")
    assert sorted(read) == [piece.offset for piece in pieces] and found.nbytes == 32 * PIECE
    assert found.what == "pieces"


def test_what_is_cached_is_told_and_left_out(
    pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pieces[0].file.open("rb") as file:
        handle = file.fileno()
        if cached_share(handle, pieces[3]) is None:
            pytest.skip("this system does not say what is cached")
        os.pread(handle, PIECE, pieces[3].offset)
        assert cached_share(handle, pieces[3]) == 1.0
        disk._drop(handle)
        assert cached_share(handle, pieces[3]) == 0.0 or is_memory(pieces[3].file)
    monkeypatch.setattr(disk, "cached_share", lambda handle, piece: 0.5)
    with pytest.raises(OutlierError, match=r"stays in the page cache.*--disk"):
        measure_pieces(pieces, "pieces")


def is_memory(file: Path) -> bool:
    """Whether a file is on a file system that has no disk."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    below = [m for m in mounts if file.is_relative_to(m[1])]
    return max(below, key=lambda mount: len(mount[1]))[2] == "tmpfs"


def test_a_full_disk(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    """It is seen before, or while the file is written; nothing stays behind."""
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5_000_000))
        with pytest.raises(OutlierError, match=r"5\.0 MB free; .* 4\.2 MB .*--disk"):
            measure_folder(tmp_path)

    def full(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutlierError, match="make room"):
        measure_folder(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["_write", "_read"])
def test_ctrl_c(at: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read(pieces: list[Piece]):
    os.truncate(pieces[0].file, PIECE // 2)
    with pytest.raises(OutlierError, match="pieces: became shorter"):
        measure_pieces(pieces, "pieces")
    pieces[0].file.unlink()
    with pytest.raises(OutlierError, match="pieces: cannot be read: No such file"):
        measure_pieces(pieces, "pieces")


def test_reading_ends_in_time(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "SECONDS", 0.0)
    with pytest.raises(OutlierError):
        measure_pieces(pieces, "pieces")


def test_the_matrices_of_experts(tier: Path):
    tensors = read_shards(tier)
    found = expert_pieces(tensors)
    experts = [tensors[name] for name in tensors if "switch_mlp" in name and "weight" in name]
    assert len(found) == sum(tensor.shape[0] for tensor in experts)
    first = experts[0]
    ours = [piece for piece in found if piece.file == first.file]
    data = first.read()
    for number in range(first.shape[0]):
        one = next(p for p in ours if p.offset == first.offset + number * p.nbytes)
        with one.file.open("rb") as file:
            assert os.pread(file.fileno(), one.nbytes, one.offset) == data[number].tobytes()
    assert not are_enough(found)  # some hundred bytes each
    assert are_enough([Piece(tier, 0, disk.LEAST_PIECE)] * 30)


def test_the_best_depth():
    found = DiskSpeed({1: 2.0, 4: 5.0, 8: 4.5}, 1, 1, "")
    assert (found.depth, found.gb_s) == (4, 5.0)
