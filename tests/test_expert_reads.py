"""Experts read from files into buffers, and what a failing disk does to them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.paging import paged, reading, reads
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import statistics_of
from outlier_mlx.engine.paging.reads import ExpertFiles, beyond_the_cache
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.safetensors import read_header
from outlier_mlx.storage.shards import read_shards
from tests.library import Library
from tests.tensor_file import Stored, read_stored, stored, write_stored

LAYERS, EXPERTS = (1, 3), 4
SLOTS = ExpertMemory(slots=13)
PROJECTIONS = {"gate": (24, 16), "up": (24, 16), "down": (8, 32)}  # out, row bytes
PREAD = os.preadv


class Experts:
    """A folder with random experts in two shards, and what is in it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        for layer in LAYERS:
            for projection, (out, row) in PROJECTIONS.items():
                path = f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj"
                shape = (EXPERTS, out, row)
                self.arrays[f"{path}.weight"] = draw.integers(0, 243, shape).astype(np.uint8)
                self.arrays[f"{path}.scales"] = draw.random((EXPERTS, out), np.float32)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for layer in LAYERS:
            here = {k: stored(v) for k, v in self.arrays.items() if f".{layer}.mlp" in k}
            other: dict[str, Stored] = {f"model.layers.{layer}.norm": stored(np.ones(3, "f4"))}
            write_stored(self.folder / f"model-{layer}.safetensors", other | here)

    def open(self, **how: Any) -> ExpertFiles:
        return ExpertFiles(read_shards(self.folder), **how)

    def expected(self, layer: int, expert: int) -> list[bytes]:
        path = f"model.layers.{layer}.mlp.switch_mlp"
        return [
            self.arrays[f"{path}.{projection}_proj.{name}"][expert].tobytes()
            for projection in PROJECTIONS
            for name in ("weight", "scales")
        ]

    def shard(self, layer: int) -> Path:
        return self.folder / f"model-{layer}.safetensors"


@pytest.fixture
def experts(tmp_path: Path) -> Experts:
    return Experts(tmp_path / "tier")


def buffers(files: ExpertFiles) -> list[memoryview]:
    return [memoryview(bytearray(b"\xee" * piece.nbytes)) for piece in files.pieces]


def read(files: ExpertFiles, layer: int, expert: int) -> list[bytes]:
    into = buffers(files)
    files.read(layer, expert, into)
    return [bytes(buffer) for buffer in into]


def test_pieces_are_the_arrays_of_an_expert_in_order(experts: Experts) -> None:
    files = experts.open()
    assert (files.layers, files.experts) == (LAYERS, EXPERTS)
    assert [(p.name, p.dtype, p.shape) for p in files.pieces] == [
        ("gate_proj.weight", "U8", (24, 16)),
        ("gate_proj.scales", "F32", (24,)),
        ("up_proj.weight", "U8", (24, 16)),
        ("up_proj.scales", "F32", (24,)),
        ("down_proj.weight", "U8", (8, 32)),
        ("down_proj.scales", "F32", (8,)),
    ]
    assert files.nbytes == 2 * (24 * 16 + 24 * 4) + 8 * 32 + 8 * 4


@pytest.mark.parametrize("direct", [False, True])
def test_every_expert_is_read_whole(experts: Experts, direct: bool) -> None:
    files = experts.open(direct=direct, chunk_bytes=100)
    for layer in LAYERS:
        for expert in range(EXPERTS):
            assert read(files, layer, expert) == experts.expected(layer, expert)
    assert files.read_bytes == len(LAYERS) * EXPERTS * files.nbytes


@settings(max_examples=25, deadline=None)
@given(data=st.data(), threads=st.integers(1, 5), chunk=st.integers(1, 500), early=st.booleans())
def test_reads_of_any_size_in_any_number_of_threads_give_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    threads: int,
    chunk: int,
    early: bool,
) -> None:
    experts = Experts(tmp_path_factory.mktemp("any"), seed=chunk)
    files = experts.open(threads=threads, chunk_bytes=chunk)
    keys = st.tuples(st.sampled_from(LAYERS), st.integers(0, EXPERTS - 1))
    wanted = data.draw(st.lists(keys, min_size=1, max_size=12))
    filled = [(key, buffers(files)) for key in wanted]
    started = [files.start(*key, into, early=early) for key, into in filled]
    for one in started:
        one.wait()
    for key, into in filled:
        assert [bytes(buffer) for buffer in into] == experts.expected(*key)
    files.close()


def test_what_is_needed_now_is_read_before_what_may_be_needed(
    experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = experts.open(threads=1)
    first, order = threading.Event(), list[int]()

    def slow(handle: int, into: list[memoryview], offset: int) -> int:
        first.wait(10)
        order.append(offset)
        return PREAD(handle, into, offset)

    monkeypatch.setattr(os, "preadv", slow)
    begun = files.start(1, 0, buffers(files))
    early = files.start(1, 1, buffers(files), early=True)
    now = files.start(1, 2, buffers(files))
    first.set()
    for one in (begun, early, now):
        one.wait()
    pieces = len(files.pieces)
    assert len(order) == 3 * pieces
    # Experts lie one after the other in a tensor.
    assert order[pieces] > order[2 * pieces] > order[0]


def test_short_and_interrupted_reads_are_continued(
    experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fickle(handle: int, into: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return PREAD(handle, [into[0][:7]], offset)

    files = experts.open(threads=1)
    monkeypatch.setattr(os, "preadv", fickle)
    assert read(files, 3, 2) == experts.expected(3, 2)


@pytest.mark.parametrize("direct", [False, True])
def test_short_direct_reads_are_continued_where_they_may_begin(
    experts: Experts, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(reading, "ALIGNMENT", 64)
    monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)  # ask nothing of this disk
    starts = []

    def short(handle: int, into: list[memoryview], offset: int) -> int:
        starts.append(offset)
        return PREAD(handle, [into[0][:100]], offset)

    files = experts.open(threads=1, direct=direct)
    monkeypatch.setattr(os, "preadv", short)
    assert read(files, 1, 3) == experts.expected(1, 3)
    assert all(start % 64 == 0 for start in starts) == direct


def assert_fails(files: ExpertFiles, layer: int, *words: str) -> OutlierError:
    with pytest.raises(OutlierError) as caught:
        read(files, layer, 1)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return caught.value


def failing(number: int, layer_file: Path) -> Callable[..., int]:
    """`os.preadv` that fails with an error number for one file."""
    inode = layer_file.stat().st_ino

    def preadv(handle: int, into: list[memoryview], offset: int) -> int:
        if os.fstat(handle).st_ino == inode:
            raise OSError(number, os.strerror(number))
        return PREAD(handle, into, offset)

    return preadv


def test_an_error_of_the_disk_names_file_and_tensor_and_passes(
    experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = experts.open()
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", failing(errno.EIO, experts.shard(1)))
        words = str(experts.shard(1)), "model.layers.1.mlp.switch_mlp.", "Input/output error"
        assert_fails(files, 1, *words)
        assert read(files, 3, 1) == experts.expected(3, 1)
    assert read(files, 1, 1) == experts.expected(1, 1)


def test_a_file_that_ends_early_is_named(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    files = experts.open()
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    error = assert_fails(files, 1, "model-1.safetensors: model.layers.1.", "ends within")
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_cut_under_the_model_ends_the_request(experts: Experts, direct: bool) -> None:
    files = experts.open(direct=direct)
    whole = experts.shard(1).stat().st_size
    os.truncate(experts.shard(1), whole // 2)
    assert_fails(files, 1, "model-1.safetensors", f"{whole // 2} bytes instead of {whole}")
    assert read(files, 3, 1) == experts.expected(3, 1)


def test_a_file_written_to_is_refused(experts: Experts) -> None:
    files = experts.open()
    time.sleep(0.02)
    with experts.shard(3).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    assert_fails(files, 3, "model-3.safetensors", "was written to")


def test_a_replaced_file_is_refused_even_with_the_same_bytes(experts: Experts) -> None:
    files = experts.open()
    copy = experts.folder / "copy"
    copy.write_bytes(experts.shard(1).read_bytes())
    copy.replace(experts.shard(1))
    assert_fails(files, 1, "model-1.safetensors", "was replaced", "load the model again")


def test_a_removed_file_is_refused_until_it_is_back(experts: Experts) -> None:
    files = experts.open()
    away = experts.folder / "away"
    experts.shard(1).rename(away)
    assert_fails(files, 1, "model-1.safetensors", "was removed")
    away.rename(experts.shard(1))
    assert read(files, 1, 1) == experts.expected(1, 1)


@pytest.fixture
def wedged(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The first read of layer 1 ends only after this is set."""
    free, once = threading.Event(), threading.Lock()
    inode = experts.shard(1).stat().st_ino

    def preadv(handle: int, into: list[memoryview], offset: int) -> int:
        if os.fstat(handle).st_ino == inode and once.acquire(blocking=False):
            free.wait(20)
        return PREAD(handle, into, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reading, "TIMEOUT", 0.2)
    yield free
    free.set()


def test_a_read_that_never_ends_times_out_and_keeps_its_buffers(
    experts: Experts, wedged: threading.Event
) -> None:
    files = experts.open(threads=2)
    into = buffers(files)
    started = files.start(1, 0, into)
    with pytest.raises(OutlierError, match=r"model-1.*: no read ended for 0.2 seconds"):
        started.wait()
    assert not started.done
    assert read(files, 1, 2) == experts.expected(1, 2)  # by other threads
    assert not started.done
    wedged.set()
    while not started.done:
        time.sleep(0.001)
    with pytest.raises(OutlierError):
        started.wait()


def test_a_cancelled_reading_is_done_when_its_running_read_ends(
    experts: Experts, wedged: threading.Event
) -> None:
    files = experts.open(threads=1)
    started = files.start(1, 0, buffers(files), early=True)
    started.cancel()
    assert not started.done
    wedged.set()
    with pytest.raises(OutlierError, match="stopped"):
        started.wait()
    assert started.done
    assert read(files, 1, 0) == experts.expected(1, 0)


def test_a_model_that_is_gone_leaves_no_thread_and_no_open_file(experts: Experts) -> None:
    before = threading.active_count()
    files = experts.open()
    read(files, 1, 0)
    handle = files._files[experts.shard(1)].handle
    os.fstat(handle)
    del files
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.005)
    assert threading.active_count() <= before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_buffers_must_have_the_pieces_sizes(experts: Experts) -> None:
    files = experts.open()
    into = buffers(files)
    into[2] = into[2][1:]
    with pytest.raises(ValueError, match=r"up_proj\.weight: 383 bytes, expected 384"):
        files.start(1, 0, into)


def test_a_file_changed_between_header_and_opening_is_refused(experts: Experts) -> None:
    tensors = read_shards(experts.folder)
    experts.arrays = {k: np.concatenate([v, v]) for k, v in experts.arrays.items()}
    experts.write()
    with pytest.raises(CheckpointError, match="changed while it was opened"):
        ExpertFiles(tensors)


def test_a_link_out_of_the_folder_is_refused(experts: Experts, tmp_path: Path) -> None:
    tensors = read_shards(experts.folder)
    experts.shard(1).rename(tmp_path / "outside")
    experts.shard(1).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="links out of its folder"):
        ExpertFiles(tensors)


def test_a_model_without_experts_or_with_odd_ones_is_refused(experts: Experts) -> None:
    tensors = read_shards(experts.folder)
    plain = {k: v for k, v in tensors.items() if "switch_mlp" not in k}
    with pytest.raises(CheckpointError, match="no experts"):
        ExpertFiles(plain)
    del tensors["model.layers.3.mlp.switch_mlp.up_proj.scales"]
    with pytest.raises(CheckpointError, match="not of one shape"):
        ExpertFiles(tensors)


@pytest.mark.parametrize(
    ("platform", "room", "beyond"),
    [("linux", 149, True), ("linux", 150, False), ("linux", None, False), ("darwin", 99, False)],
)
def test_the_page_cache_is_left_out_only_where_it_cannot_hold_all_experts(
    monkeypatch: pytest.MonkeyPatch, platform: str, room: int | None, beyond: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(reads, "free", lambda: None if room is None else Budget(room, "this test"))
    assert beyond_the_cache(100, taken=50) == beyond


# -- equal experts --------------------------------------------------------------------------------


def copied(experts: Experts, source: tuple[int, int], target: tuple[int, int], only: str) -> None:
    for key, array in experts.arrays.items():
        if f".{target[0]}.mlp" in key and only in key:
            other = key.replace(f".{target[0]}.mlp", f".{source[0]}.mlp")
            array[target[1]] = experts.arrays[other][source[1]]
    experts.write()


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    sizes = []

    def counted(handle: int, into: list[memoryview], offset: int) -> int:
        sizes.append(PREAD(handle, into, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return lambda: sum(sizes)


def test_experts_with_other_scales_are_told_apart_by_them_alone(
    experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = experts.open()
    read_bytes = count_reads(monkeypatch)
    assert files.equal == {}
    scales = sum(array.nbytes for key, array in experts.arrays.items() if "scales" in key)
    assert read_bytes() == scales


def test_experts_with_equal_bytes_have_one_canonical(experts: Experts) -> None:
    copied(experts, (1, 1), (3, 2), "")
    copied(experts, (1, 1), (3, 0), "")
    copied(experts, (1, 0), (1, 3), ".scales")
    assert experts.open().equal == {(3, 2): (1, 1), (3, 0): (1, 1)}


def test_a_difference_in_the_last_byte_is_seen(experts: Experts) -> None:
    copied(experts, (1, 1), (3, 2), "")
    experts.arrays["model.layers.3.mlp.switch_mlp.down_proj.weight"][2, -1, -1] ^= 1
    experts.write()
    assert experts.open().equal == {}


def test_header_of_the_shards_agrees_with_what_is_read(experts: Experts) -> None:
    tensors = read_header(experts.shard(1))
    files = ExpertFiles(tensors)
    assert files.layers == (1,)
    assert read(files, 1, 0) == experts.expected(1, 0)


def test_a_model_reads_equal_experts_once(library: Library, tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    shutil.copytree(library.demo_tier("q4"), tier)
    (shard,) = tier.glob("*.safetensors")
    tensors = read_stored(shard)
    for name, stack in list(tensors.items()):
        if ".layers.1.mlp.switch_mlp." in name:
            # All experts of this layer become the first one.
            one = stack.data[: len(stack.data) // stack.shape[0]]
            tensors[name] = Stored(stack.dtype, stack.shape, one * stack.shape[0])
    write_stored(shard, tensors)
    whole, model = (load_model(tier, expert_memory=memory)[0] for memory in (None, SLOTS))
    given = mx.array([[7 * number % 1500 + 5 for number in range(300)]])
    assert mx.array_equal(model(given), whole(given))
    statistics = statistics_of(model)
    assert statistics is not None
    # One of the first layer, and six of each of two.
    assert statistics.misses + statistics.early == 1 + 6 + 6


def test_a_model_that_reads_past_the_cache_gives_the_same(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = library.demo_tier("q4")
    monkeypatch.setattr(paged, "beyond_the_cache", lambda *_, **__: True)
    model, whole = load_model(tier, expert_memory=SLOTS)[0], load_model(tier)[0]
    given = mx.array([[7 * number % 200 + 5 for number in range(60)]])
    assert mx.array_equal(model(given), whole(given))
