"""How fast experts come from the disk, against plain reads of the same bytes in as many threads.

    python scripts/bench_expert_reads.py [MODEL] [--rounds N] [--all]

Without MODEL, a file with experts of the size of a 14B overlay is written to a temporary folder.
Each round takes some experts at random. Each way of reading them, in random order, begins with
files dropped from the page cache, and reads two experts at a time, as the layer of a token needs
them. The ratio is that of a way's rate to the rate of plain reads in the same round; medians are
printed. The last line is the default way again, when everything is in the page cache. Linux only.
--all tries other numbers of threads, other sizes of reads, and reads past the page cache.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from outlier_mlx.engine.paging.reads import CHUNK_BYTES, THREADS, ExpertFiles
from outlier_mlx.measure.disk import Piece, cached_share
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards

# A 14B overlay's expert: out and bytes of a row, of gate, up and down.
SHAPES = {"gate": (13824, 1024), "up": (13824, 1024), "down": (5120, 2768)}
LAYERS, EXPERTS, AT_A_TIME, EXPERTS_A_ROUND = 4, 8, 2, 12

Key = tuple[int, int]
Buffers = list[list[memoryview]]
Read = Callable[[Sequence[Key]], None]


def write_experts(folder: Path) -> None:
    """Write a shard for each layer, of random bytes: no disk can make less of them."""
    draw = np.random.default_rng(0)
    for layer in range(LAYERS):
        stacks: dict[str, np.ndarray] = {}
        for projection, (out, row) in SHAPES.items():
            path = f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj"
            drawn = np.frombuffer(draw.bytes(EXPERTS * out * row), np.uint8)
            stacks[f"{path}.weight"] = drawn.reshape(EXPERTS, out, row)
            stacks[f"{path}.scales"] = draw.random((EXPERTS, out), np.float32)
        file = folder / f"model-{layer}.safetensors"
        save_file(stacks, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())


def our_reads(tensors: Mapping[str, TensorRef], buffers: Buffers, **how: Any) -> Read:
    """Reads through `ExpertFiles`."""
    files = ExpertFiles(tensors, **how)

    def read(keys: Sequence[Key]) -> None:
        for begin in range(0, len(keys), AT_A_TIME):
            some = keys[begin : begin + AT_A_TIME]
            started = [files.start(*key, into) for key, into in zip(some, buffers, strict=False)]
            for one in started:
                one.wait()

    return read


def plain_reads(places: Mapping[Key, list[Piece]], threads: int, buffers: Buffers) -> Read:
    """Plain `pread` of the same arrays, each by one call where the system reads it at once."""
    handles = {p.file: os.open(p.file, os.O_RDONLY) for one in places.values() for p in one}
    pool = ThreadPoolExecutor(threads)

    def fill(piece: Piece, buffer: memoryview) -> None:
        done = 0
        while done < piece.nbytes:
            done += os.preadv(handles[piece.file], [buffer[done:]], piece.offset + done)

    def read(keys: Sequence[Key]) -> None:
        for begin in range(0, len(keys), AT_A_TIME):
            some = keys[begin : begin + AT_A_TIME]
            pieces = [piece for key in some for piece in places[key]]
            into = [buffer for n in range(len(some)) for buffer in buffers[n]]
            list(pool.map(fill, pieces, into))

    return read


def all_places(tensors: Mapping[str, TensorRef], files: ExpertFiles) -> dict[Key, list[Piece]]:
    """Where the arrays of each expert are."""
    found: dict[Key, list[Piece]] = {}
    for layer in files.layers:
        for piece in files.pieces:
            name = next(n for n in tensors if f".{layer}.mlp.switch_mlp.{piece.name}" in n)
            for expert in range(files.experts):
                at = tensors[name].offset + expert * piece.nbytes
                place = Piece(tensors[name].file, at, piece.nbytes)
                found.setdefault((layer, expert), []).append(place)
    return found


def drop(files: Iterable[Path]) -> float:
    """Drop files from the page cache; the largest part of one that stays there."""
    kept = 0.0
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        kept = max(kept, cached_share(handle, Piece(file, 0, file.stat().st_size)) or 0.0)
        os.close(handle)
    return kept


def measure(folder: Path, rounds: int, every: bool) -> None:
    """Measure all ways of reading, and print a table."""
    tensors = read_shards(folder)
    files = ExpertFiles(tensors)
    places = all_places(tensors, files)
    buffers = [[np.ones(p.nbytes, np.uint8).data for p in files.pieces] for _ in range(AT_A_TIME)]
    megabytes = files.nbytes / 1e6
    print(f"{len(places)} experts of {megabytes:.1f} MB; {AT_A_TIME} at a time, {rounds} rounds\n")

    plain_name = f"plain pread, {THREADS} threads"
    ways: dict[str, Read] = {plain_name: plain_reads(places, THREADS, buffers)}

    def add(threads: int = THREADS, chunk_bytes: int = CHUNK_BYTES, direct: bool = False) -> None:
        name = f"{threads} threads, reads of {chunk_bytes >> 20} MiB{', direct' * direct}"
        how = {"threads": threads, "chunk_bytes": chunk_bytes, "direct": direct}
        ways[name] = our_reads(tensors, buffers, **how)

    add()
    if every:
        for direct in (False, True):
            for threads in (1, 2, 4, 8):
                add(threads=threads, direct=direct)
            for chunk_bytes in (1 << 20, 16 << 20):
                add(chunk_bytes=chunk_bytes, direct=direct)

    default, again = list(ways)[1], "the same, from the page cache"
    rates: dict[str, list[float]] = {name: [] for name in (*ways, again)}
    kept = 0.0

    def time_reads(name: str, read: Read, keys: Sequence[Key]) -> None:
        begin = time.perf_counter()
        read(keys)
        rates[name].append(len(keys) * files.nbytes / (time.perf_counter() - begin) / 1e9)

    for _ in range(rounds):
        keys = random.sample(list(places), min(EXPERTS_A_ROUND, len(places)))
        for name in random.sample(list(ways), len(ways)):
            kept = max(kept, drop({tensor.file for tensor in tensors.values()}))
            time_reads(name, ways[name], keys)
            if name == default:
                time_reads(again, ways[name], keys)
    plain = rates[plain_name]
    print("| how | GB/s | of plain reads |\n|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found, plain, strict=True))
        print(f"| {name} | {statistics.median(found):.2f} | {ratio:.0%} |")
    print(f"\nAt most {kept:.1%} of a file was in the page cache at the beginning.")


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of a tier")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="try every way of reading")
    given = parser.parse_args()
    if given.model is not None:
        measure(given.model, given.rounds, given.all)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_experts(Path(folder))
        measure(Path(folder), given.rounds, given.all)


if __name__ == "__main__":
    main()
