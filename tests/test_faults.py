"""Conversions that end early, whatever ends them: nothing stays behind or changes."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError
from outlier_mlx.writing import expert_parts, folders
from outlier_mlx.writing import parts as storage_parts
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec
from tests.builders import write_overlay
from tests.damage import find_tensor, replace_tensor, truncate
from tests.folders import snapshot
from tests.program import run, run_program, run_python, start_program

LAST_TENSOR = "lm_head.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    overlay = write_overlay(folder / "overlay", layers=2, moe_layers=(0, 1), experts=2)
    outlier_mlx.convert(overlay.path, out=folder / "outputs" / "old")
    (folder / "outputs" / "note").write_text("here before")
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A folder with an `overlay`, and `outputs` that hold a tier `old` and a file."""
    return shutil.copytree(sound, tmp_path / "place")


@contextmanager
def leaves_no_trace(place: Path) -> Iterator[None]:
    """No file made, changed or touched; no descriptor, thread or MLX setting left over."""
    descriptors = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    before, threads = snapshot(place, times=True), threading.active_count()
    handles = len(list(descriptors.iterdir()))
    limit = mx.set_cache_limit(12345678)
    try:
        yield
        assert mx.set_cache_limit(limit) == 12345678
    finally:
        mx.set_cache_limit(limit)
    assert snapshot(place, times=True) == before
    assert threading.active_count() == threads
    assert len(list(descriptors.iterdir())) == handles


def progress_that(end: Callable[[], object], share: float) -> Callable[[int, int], None]:
    """A progress callback that calls `end` once this share of the source is read."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            end()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


# Where the output goes: a new place, one below folders that do not exist, and over an old tier.
TARGETS = ["new", "deep/er/new", "old"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ctrl_c(place: Path, target: str, share: float) -> None:
    with leaves_no_trace(place), pytest.raises(KeyboardInterrupt):
        outlier_mlx.convert(
            place / "overlay",
            out=place / "outputs" / target,
            force=True,
            progress=progress_that(interrupt, share),
        )


def test_ctrl_c_on_the_command_line_is_one_word(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_parts, "pack_rows", lambda trits: interrupt())
    with leaves_no_trace(place):
        result = run("convert", place / "overlay", "--out", place / "outputs" / "new", code=130)
    assert (result.out, result.err) == ("", "interrupted\n")


class FullDisk:
    """A file that takes `room` bytes, and then as much as fits."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self.file.write(data[: self.room])
        self.room -= min(self.room, data.nbytes)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return data.nbytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("room", [0, 100, 50_000])
def test_a_full_disk(place: Path, target: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def open_on_full_disk(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return FullDisk(file, room) if mode == "xb" else file

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    out = place / "outputs" / target
    with leaves_no_trace(place), pytest.raises(OutlierError, match="No space left") as caught:
        outlier_mlx.convert(place / "overlay", out=out, force=True)
    assert str(out) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "outlier_moe.py", "tier.json", "README.md"])
def test_a_disk_that_is_full_at_the_last_file(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def write(self: Path, data: Any) -> int:
        if self.name.startswith(f".{Path(name).stem}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with leaves_no_trace(place), pytest.raises(OutlierError, match="No space left"):
        outlier_mlx.convert(place / "overlay", out=place / "outputs" / "new")


def test_too_little_space_is_said_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with leaves_no_trace(place), pytest.raises(OutlierError, match=r"takes .* kB, but only 1 B"):
        outlier_mlx.convert(
            place / "overlay", out=place / "outputs" / "new", progress=progress_that(interrupt, 0)
        )


def bad_head(overlay: Path) -> None:
    array = find_tensor(overlay, LAST_TENSOR)[1].array().copy()
    array[-1, -1] = np.nan
    replace_tensor(overlay, LAST_TENSOR, array)


def bad_trit(overlay: Path) -> None:
    key = "model.layers.1.mlp.experts.1.down_ternary"
    array = find_tensor(overlay, key)[1].array().copy()
    array[-1, -1] = 3
    replace_tensor(overlay, key, array)


def bad_scale(overlay: Path) -> None:
    replace_tensor(overlay, "model.layers.1.mlp.experts.1.down_scale", [-1.0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("damage", "named"),
    [(bad_head, LAST_TENSOR), (bad_trit, "1.down_ternary: 3 at row"), (bad_scale, "1.down_scale")],
)
def test_a_bad_tensor_at_the_very_end(
    place: Path, target: str, damage: Callable[[Path], None], named: str
) -> None:
    damage(place / "overlay")
    with leaves_no_trace(place), pytest.raises(CheckpointError, match=named):
        outlier_mlx.convert(place / "overlay", out=place / "outputs" / target, force=True)


def test_a_source_that_becomes_shorter_meanwhile(place: Path) -> None:
    shard = place / "overlay" / "model.safetensors"
    whole = shard.read_bytes()
    cut = progress_that(lambda: truncate(shard, 10) if shard.stat().st_size == len(whole) else 0, 0)
    outputs = snapshot(place / "outputs", times=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*the file ends within"):
        outlier_mlx.convert(place / "overlay", out=place / "outputs" / "new", progress=cut)
    assert snapshot(place / "outputs", times=True) == outputs


@pytest.mark.parametrize("error", [RuntimeError("lost"), MemoryError(), KeyboardInterrupt()])
def test_an_exception_in_a_worker_thread(
    place: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_rows, calls = expert_parts.pack_rows, 0

    def fail_at_the_third(trits: np.ndarray) -> np.ndarray:
        nonlocal calls
        assert threading.current_thread() is not threading.main_thread()
        calls += 1
        if calls == 3:
            raise error
        return pack_rows(trits)

    monkeypatch.setattr(expert_parts, "pack_rows", fail_at_the_third)
    with leaves_no_trace(place), pytest.raises(type(error)):
        outlier_mlx.convert(place / "overlay", out=place / "outputs" / "new")


@pytest.mark.slow
def test_the_pool_drops_what_it_has_not_begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C nobody waits for more than the slabs that are being packed."""
    pack_rows, begun = expert_parts.pack_rows, []

    def slow(trits: np.ndarray) -> np.ndarray:
        begun.append(time.monotonic())
        time.sleep(0.1)
        return pack_rows(trits)

    monkeypatch.setattr(expert_parts, "pack_rows", slow)
    monkeypatch.setattr(expert_parts, "SLAB_BYTES", 64)
    monkeypatch.setattr(storage_parts, "AHEAD", 1000)
    stopped = 0.0

    def stop(done: int, total: int) -> None:
        nonlocal stopped
        if begun:
            stopped = time.monotonic()
            raise KeyboardInterrupt

    with leaves_no_trace(place), pytest.raises(KeyboardInterrupt):
        outlier_mlx.convert(place / "overlay", out=place / "outputs" / "new", progress=stop)
    assert stopped
    assert len([when for when in begun if when > stopped]) <= (os.cpu_count() or 1)


@pytest.mark.parametrize("moment", ["after the first rename", "at the second", "while removing"])
def test_ctrl_c_while_the_old_tier_is_replaced(
    place: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the old tier is there whole, or the new one, and nothing beside it."""
    rename, rmtree = Path.rename, shutil.rmtree
    interrupted: list[bool] = []

    def once() -> None:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    def interrupted_rename(self: Path, target: Path) -> Path:
        aside = target.name == "former"
        if not {self.name, target.name} & {"former", "whole"}:  # of a file in the tier
            return rename(self, target)
        if not aside and moment == "at the second":
            once()
        renamed = rename(self, target)
        if aside and moment == "after the first rename":
            once()
        return renamed

    def interrupted_rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "former" and path.exists() and moment == "while removing":
            next(path.iterdir()).unlink()
            once()
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)
    old = snapshot(place / "outputs", times=True)
    with pytest.raises(KeyboardInterrupt):
        outlier_mlx.convert(
            place / "overlay", out=place / "outputs" / "old", force=True, tier="f32"
        )
    assert interrupted
    if moment == "while removing":
        assert '"dtype": "float32"' in (place / "outputs" / "old" / "config.json").read_text()
        assert {path.name for path in (place / "outputs").iterdir()} == {"old", "note"}
    else:
        assert snapshot(place / "outputs", times=True) == old


def test_somebody_else_takes_the_name_meanwhile(place: Path) -> None:
    out = place / "outputs" / "new"

    def take_it() -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("not ours to remove")

    with pytest.raises(OutputExistsError, match="exists"):
        outlier_mlx.convert(place / "overlay", out=out, progress=progress_that(take_it, 0.5))
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert {path.name for path in (place / "outputs").iterdir()} == {"old", "note", "new"}


def test_a_sound_conversion_changes_nothing_but_its_output(place: Path) -> None:
    before = snapshot(place, times=True)
    seen: list[tuple[int, int]] = []
    out = outlier_mlx.convert(
        place / "overlay", out=place / "made" / "new", progress=lambda *at: seen.append(at)
    )
    after = snapshot(place, times=True)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("made") for name in set(after) - set(before))
    # The bar rises to exactly its end.
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    umask = folders._umask()
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in out.iterdir())


# In processes of their own


def write_zeros(folder: Path, gigabytes: float) -> Path:
    """An overlay of zeros: a sparse file that takes no space, and as long to convert as any."""
    hidden, width, vocab = 1024, 4096, 64
    dims: dict[str, Any] = {
        "hidden": hidden,
        "intermediate": 64,
        "vocab": vocab,
        "layers": 1,
        "experts": 1,
    }
    experts = round(gigabytes * 1e9 / (3 * hidden * width))
    overlay = write_overlay(folder, expert_intermediate=8, tokenizer=False, moe_layers=(0,), **dims)
    mlp = "model.layers.0.mlp."
    specs = [TensorSpec(f"{mlp}router.weight", "F32", (experts, hidden))]
    for expert in range(experts):
        for part in ("gate", "up", "down"):
            shape = (hidden, width) if part == "down" else (width, hidden)
            specs.append(TensorSpec(f"{mlp}experts.{expert}.{part}_ternary", "I8", shape))
            specs.append(TensorSpec(f"{mlp}experts.{expert}.{part}_scale", "F16", (1,)))
    specs += [TensorSpec(name, "F32", value.shape) for name, value in overlay.base.items()]
    (folder / "model.safetensors").unlink()
    with ShardedWriter(folder, specs, 1 << 60) as writer:
        writer._begin(specs[0].name)
        assert writer._file is not None
        writer._file.truncate(writer._file.tell() + sum(spec.nbytes for spec in specs))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_experts": 1', f'"n_experts": {experts}'))
    return folder


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, "hung up", marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_of_a_conversion(
    tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    overlay = write_zeros(tmp_path / "overlay", 8.0)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    process = start_program("convert", overlay, "--out", outputs / "tier")
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 1_000_000 for path in outputs.rglob("*.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout, stderr) == (code, "", f"{word}\n")
    assert list(outputs.iterdir()) == []


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_limit_on_the_size_of_files(place: Path) -> None:
    """The system itself refuses a write."""
    outputs = snapshot(place / "outputs", times=True)
    out = place / "outputs" / "old"
    command = ["convert", place / "overlay", "--out", out, "--force"]
    done = run_program(*command, code=1, preexec_fn=limit_files, timeout=120)
    assert done.out == ""
    assert done.err == f"error: {out}: cannot write: {os.strerror(errno.EFBIG)}\n"
    assert snapshot(place / "outputs", times=True) == outputs


@contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own, as small as wanted; skips where one cannot be had."""
    path.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux, for a file system of its own")
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={nbytes}".encode()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options) != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield path
    finally:
        assert libc.umount2(os.fsencode(path), 2) == 0


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path, place: Path) -> None:
    tensors = sum(f.stat().st_size for f in (place / "outputs" / "old").glob("*.safetensors"))
    # Room for the tensors, as is checked beforehand, but not for all the files.
    pages = -(-tensors // 4096) + 2
    with small_disk(tmp_path / "disk", 4096 * pages) as disk:
        command = ["convert", place / "overlay", "--out", disk / "deep" / "tier"]
        done = run_program(*command, code=1, timeout=120)
        assert done.out == ""
        assert done.err == f"error: {disk}/deep/tier: cannot write: No space left on device\n"
        assert list(disk.iterdir()) == []


MEASURE = """
import sys, outlier_mlx, outlier_mlx.tiers.convert
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
before = memory("VmRSS")
outlier_mlx.convert(sys.argv[1], out=sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """The peak of 24 layers is that of 4, to within what allocators do."""
    sizes: dict[str, Any] = {"hidden": 256, "intermediate": 1024, "expert_intermediate": 1024}
    peaks = {}  # kB
    for layers in (4, 24):
        overlay = tmp_path / f"overlay-{layers}"
        write_overlay(overlay, layers=layers, moe_layers=None, experts=8, base_dtype="F32", **sizes)
        done = run_python(MEASURE, overlay, tmp_path / f"tier-{layers}")
        peaks[layers] = int(done.out)
    assert peaks[24] < peaks[4] + 12_000, peaks
    # 24 layers have 200 MB of source: holding them would show.
    assert peaks[24] < 80_000, peaks
