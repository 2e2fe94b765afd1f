"""KV caches on disk: they are found again, and nothing else is used, replaced or deleted."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve import cache_file
from outlier_mlx.serve.cache_dir import CacheDir, cache_dir
from outlier_mlx.serve.cache_folder import CacheFolder
from outlier_mlx.serve.prefix_cache import PrefixCache
from tests.test_prefix_cache import text


@pytest.fixture
def where(tmp_path: Path) -> CacheDir:
    return CacheDir(tmp_path / "kept", 10_000_000, "/models/tiny", lambda: "weights", "options")


class Server:
    """The kept caches of a server, as it starts and ends."""

    def __init__(self, where: CacheDir, nbytes: int | None = None) -> None:
        self.log: list[str] = []
        self.folder = CacheFolder(where, self.log.append)
        self.kept = PrefixCache(None, nbytes, folder=self.folder)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close(10)

    def keep(self, tokens: list[int], kinds: Callable[[list[int]], list[Any]]) -> None:
        self.kept.keep(tokens, kinds(tokens), "assistant")
        assert self.folder.settle(10)

    def found(self, tokens: list[int]) -> int:
        """How many tokens a request has in its cache."""
        self.kept.bring([*tokens, 7], None)
        return self.kept.fetch([*tokens, 7])[1]

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.path.iterdir())


def rows(tokens: list[int], dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Numbers that tell tokens and places apart, (2, 1, 2, tokens, 16)."""
    values = mx.array(tokens)[:, None] * 4 + mx.arange(len(tokens))[:, None] + mx.arange(16)
    return mx.broadcast_to(values / 64, (2, 1, 2, len(tokens), 16)).astype(dtype)


def plain(tokens: list[int]) -> list[Any]:
    cache = [KVCache(), KVCache()]
    for layer in cache:
        layer.update_and_fetch(*rows(tokens))
    return cache


def hybrid(tokens: list[int]) -> list[Any]:
    state = ArraysCache(2)
    state[0] = mx.full((1, 3, 8), len(tokens)).astype(mx.float32)
    window = RotatingKVCache(32)
    window.update_and_fetch(*rows(tokens))
    return [*plain(tokens), state, window]


def quantized(tokens: list[int]) -> list[Any]:
    cache = QuantizedKVCache(group_size=32, bits=4)
    cache.update_and_fetch(*mx.concatenate([rows(tokens, mx.float16)] * 2, axis=-1))
    return [cache]


def same(one: list[Any], other: list[Any]) -> bool:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, ArraysCache):
            pairs: list[Any] = list(zip(a.cache, b.cache, strict=True))
            pairs = [pair for pair in pairs if pair[0] is not None]
            assert [x is None for x in a.cache] == [x is None for x in b.cache]
        elif isinstance(a, QuantizedKVCache):
            (k1, v1), (k2, v2) = a.keys_and_values(), b.keys_and_values()
            pairs = list(zip([*k1, *v1], [*k2, *v2], strict=True))
        else:
            pairs = list(zip(a.keys_and_values(), b.keys_and_values(), strict=True))
            assert a.offset == b.offset
        if not all(x.dtype == y.dtype and mx.array_equal(x, y) for x, y in pairs):
            return False
    return True


@pytest.mark.parametrize("kind", [plain, hybrid, quantized])
def test_a_new_server_finds_what_an_earlier_one_kept(where: CacheDir, kind: Any) -> None:
    first, second = text(700), text(900)
    with Server(where) as server:
        server.keep(first, kind)
        server.keep(second, kind)
    with Server(where) as server:
        assert server.kept.nbytes == 0
        assert server.found(second) == 900
        assert same(server.kept.fetch([*second, 7])[0] or [], kind(second))
        expected = 700 if kind is hybrid else 800
        assert server.found(second[:800]) == expected
        assert server.log == []


def test_a_conversation_that_goes_on_after_the_start_adds_to_the_files(where: CacheDir) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
    with Server(where) as server:
        assert server.found(text(700)) == 700
        before = server.files()
        server.keep(text(1400), plain)
        assert len(server.files()) == len(before) + 1
    with Server(where) as server:
        assert server.found(text(1400)) == 1400


def test_files_and_folders_are_private(where: CacheDir) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in server.files()}
        folders = {stat.S_IMODE(p.stat().st_mode) for p in (where.path, server.folder.path)}
    assert modes == {0o600}
    assert folders == {0o700}


def test_a_folder_that_others_can_read_is_refused(where: CacheDir) -> None:
    with Server(where) as server:
        path = server.folder.path
    path.chmod(0o755)
    with pytest.raises(OutlierError, match=f"{path}: others can"):
        CacheFolder(where, print)


def test_a_file_in_the_place_of_the_folder_is_refused(where: CacheDir) -> None:
    where.path.write_text("mine")
    with pytest.raises(OutlierError, match=f"{where.path}: exists and is not a folder"):
        CacheFolder(where, print)
    assert where.path.read_text() == "mine"


@pytest.mark.parametrize("change", ["model", "options", "place"])
def test_only_files_of_the_same_model_and_options_are_used(where: CacheDir, change: str) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        old = server.files()
    new: dict[str, Any] = {
        "model": lambda: "other weights",
        "options": "other",
        "place": "/models/other",
    }
    with Server(replace(where, **{change: new[change]})) as server:
        assert server.found(text(700)) == 0
        assert server.log == []
    # What other weights left in the same place is of no use; the rest may be.
    assert [path.exists() for path in old] == [change != "model"]
    assert old[0].parent.exists() == (change != "model")


def test_files_of_weights_that_another_server_still_has_stay(where: CacheDir) -> None:
    with Server(where) as old:
        old.keep(text(700), plain)
        with Server(replace(where, model=lambda: "other weights")):
            assert old.files() != []
        assert old.found(text(700)) == 700


def test_files_of_others_are_left_alone(where: CacheDir) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        name, folder = server.files()[0].name, server.folder.path
    foreign = [
        where.path / "notes.txt",
        folder / "notes.safetensors",
        folder / f"{'0' * 24}-root-0-50.safetensors",
        folder / f".{'0' * 24}-root-0-50.01234567.safetensors",
    ]
    for path in foreign:
        path.write_bytes(b"mine" * 100)
    (folder / f"{'1' * 24}-root-0-50.safetensors").symlink_to(where.path / "notes.txt")
    with Server(where) as server:
        assert server.found(text(700)) == 700
        assert [line for line in server.log if "ignored" in line] == server.log
        assert len(server.log) == 1
    with Server(replace(where, model=lambda: "other weights", nbytes=1000)):
        pass
    assert [path.read_bytes() for path in foreign] == [b"mine" * 100] * 4
    assert not (folder / name).exists()


def test_no_file_of_another_is_replaced(where: CacheDir) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        (path,) = server.files()
    path.write_bytes(b"mine")
    with Server(where) as server:
        server.keep(text(700), plain)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["flipped", "shorter", "header", "renamed"])
def test_a_damaged_file_is_told_and_removed(where: CacheDir, damage: str) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        (path,) = server.files()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    elif damage == "shorter":
        del data[-100:]
    elif damage == "header":
        data[8 + 400] ^= 0x55
    path.write_bytes(data)
    if damage == "renamed":
        path.rename(path.with_name(path.name.replace("-0-700", "-0-600")))
    with Server(where) as server:
        assert server.found(text(700)) == 0
        assert len(server.log) == (damage != "renamed")
        assert all(f"{path}: ignored: " in line for line in server.log)
        assert server.files() == []
        server.keep(text(700), plain)
    with Server(where) as server:
        assert server.found(text(700)) == 700


def test_the_folder_takes_no_more_than_it_may(where: CacheDir) -> None:
    limit = 3 * 700 * 2 * 2 * 2 * 16 * 2
    with Server(replace(where, nbytes=limit)) as server:
        for seed in range(6):
            server.keep(text(700, seed), plain)
            for path in server.files():  # as if time went by
                found = path.stat()
                os.utime(path, (found.st_atime, found.st_mtime - 100))
        assert server.folder.nbytes <= limit
        assert server.log == []
    with Server(replace(where, nbytes=limit)) as server:
        assert [server.found(text(700, seed)) for seed in range(6)] == [0] * 4 + [700] * 2


def test_short_conversations_do_not_push_a_long_one_off_the_disk(where: CacheDir) -> None:
    with Server(replace(where, nbytes=2500 * 256 + 100_000)) as server:
        server.keep(text(2000), plain)
        for seed in range(1, 12):
            server.keep(text(90, seed), plain)
    with Server(where) as server:
        assert server.found(text(2000)) == 2000


def test_a_full_disk_is_told_once(where: CacheDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Server(where) as server:
        with monkeypatch.context() as patch:
            patch.setattr(cache_file, "write", full)
            server.keep(text(700), plain)
            server.keep(text(700, 1), plain)
        assert len(server.log) == 1
        assert "No space left" in server.log[0]
        assert server.files() == []
        assert server.found(text(700)) == 700
        server.keep(text(700, 2), plain)
        assert len(server.files()) == 1


def test_a_full_disk_is_told_once_of_long_texts(
    where: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which only the first part is tried: the others are of no use without it."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Server(where) as server, monkeypatch.context() as patch:
        patch.setattr(cache_file, "write", full)
        for seed in range(3):
            server.keep(text(5000, seed), plain)
        assert len(server.log) == 1


def test_pipes_and_folders_with_names_of_files_are_left_alone(where: CacheDir) -> None:
    """A pipe that is opened may never give anything."""
    with Server(where) as server:
        server.keep(text(700), plain)
        folder = server.folder.path
        (written,) = server.files()
    pipes = [folder / f"{'1' * 24}-root-0-7.safetensors"]
    pipes += [folder / f".{'1' * 24}-root-0-7.01234567.safetensors"]
    for pipe in pipes:
        os.mkfifo(pipe)
    (folder / f"{'2' * 24}-root-0-7.safetensors").mkdir()
    written.unlink()
    os.mkfifo(written)
    with Server(where) as server:
        assert server.found(text(700)) == 0
        server.keep(text(700), plain)
        assert server.folder.settle(10)
    with Server(replace(where, model=lambda: "other weights", nbytes=1000)):
        pass
    assert all(pipe.exists() for pipe in [*pipes, written])
    assert len(list(folder.iterdir())) == 4


def test_what_a_killed_server_left_half_written_is_removed(where: CacheDir) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        (path,) = server.files()
    half = path.with_name(f".{path.stem[:40]}.0123abcd.safetensors")
    half.write_bytes(path.read_bytes()[:5000])
    with Server(where) as server:
        assert server.files() == [path]
        # While it runs, it may be what it is writing itself.
        half.write_bytes(path.read_bytes()[:5000])
        with Server(where):
            assert half.exists()
    half.unlink()


def test_a_server_that_ends_writes_what_waits(where: CacheDir) -> None:
    with Server(where) as server:
        for seed in range(5):
            server.kept.keep(text(700, seed), plain(text(700, seed)), "assistant")
    with Server(where) as server:
        assert [server.found(text(700, seed)) for seed in range(5)] == [700] * 5


def test_a_server_that_must_end_at_once_leaves_nothing_half_written(where: CacheDir) -> None:
    server = Server(where)
    for seed in range(20):
        server.kept.keep(text(700, seed), plain(text(700, seed)), "assistant")
    server.kept.close(0)
    server.kept.close(10)
    assert [path.name for path in server.files() if path.name.startswith(".")] == []
    with Server(where) as again:
        assert again.log == []


def test_two_servers_share_a_folder(where: CacheDir) -> None:
    with Server(where) as one, Server(where) as other:
        one.keep(text(700), plain)
        other.keep(text(700), plain)
        other.keep(text(700, 1), plain)
        assert len(one.files()) == 2
        # What one removes, the other finds gone.
        one.kept.clear()
        for path in one.files():
            path.unlink()
        assert one.found(text(700)) == 0
        assert one.log == []
    with Server(where) as server:
        assert server.found(text(700)) == 0


def test_what_memory_has_no_room_for_is_read_again(where: CacheDir) -> None:
    with Server(where, 800 * 256) as server:
        for seed in range(3):
            server.keep(text(700, seed), plain)
        assert server.kept.nbytes == 700 * 256
        assert [server.found(text(700, seed)) for seed in range(3)] == [700] * 3


@pytest.mark.parametrize(("old", "new"), [("2,16]", "9,16]"), ('"KVCache', '"Popen')])
def test_no_form_that_the_arrays_do_not_have_is_believed(
    where: CacheDir, old: str, new: str
) -> None:
    with Server(where) as server:
        server.keep(text(700), plain)
        (path,) = server.files()
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    form = header["__metadata__"]["form"]
    header["__metadata__"]["form"] = form.replace(old, new)
    assert form != header["__metadata__"]["form"]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    with Server(where) as server:
        assert server.found(text(700)) == 0
        assert len(server.log) == 1


def test_what_a_cache_belongs_to(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")

    def of(*more: Any, dtype: str | None = None) -> tuple[str, str, str]:
        found = cache_dir(tmp_path / "kept", 1000, folder, dtype, None, *more)
        return found.place, found.model(), found.options

    place, model, options = of({"kv_bits": None})
    assert of({"kv_bits": None}) == (place, model, options)
    for other in (of({"kv_bits": 8}), of({"kv_bits": None}, dtype="float16")):
        assert other[:2] == (place, model)
        assert other[2] != options
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert of({"kv_bits": None})[1:] != (model, options)
    (folder / "model.safetensors").write_bytes(b"[]")
    found = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", (found.st_atime, found.st_mtime + 1))
    assert of({"kv_bits": None})[1] != model


def test_the_place_of_a_model_of_the_hub_is_its_repository(tmp_path: Path) -> None:
    places = []
    for revision in ("aaa", "bbb"):
        folder = tmp_path / "models--me--tiny" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        places.append(cache_dir(tmp_path / "kept", 1000, folder, None, None).place)
    assert places[0] == places[1] == str(tmp_path / "models--me--tiny")
    assert np.unique(places).size == 1
