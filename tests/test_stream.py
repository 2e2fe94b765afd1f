"""Conversions that fetch one source file at a time, from a local stand-in for the hub."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, file_download

import outlier_mlx
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError
from outlier_mlx.storage import remote
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.tiers.choose import list_choices
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing import folders
from outlier_mlx.writing.folders import kept_folder, whole_folder
from outlier_mlx.writing.journal import Journal
from outlier_mlx.writing.writer import PlacedWriter, ShardedWriter, TensorSpec
from tests.builders import write_base, write_overlay
from tests.damage import find_tensor, replace_tensor
from tests.form_builders import torch_save, write_toy_dense
from tests.forms import FORMS, build
from tests.hub import Hub, Request, point_to, serving
from tests.program import run, run_command

DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}
OVERLAY_DIMS: dict[str, Any] = DIMS | {"moe_layers": (1,), "experts": 2}
OVERLAY_FILE = "model.safetensors"
BASE_FILES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
#: In which they are first needed: experts follow their layer's base.
ORDER = [*BASE_FILES, OVERLAY_FILE]


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small: take less for a small file, and do not wait before a retry."""
    monkeypatch.setattr(remote, "SMALL_BYTES", 2000)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


@dataclass(frozen=True)
class Models:
    """Two commits of an overlay and of its base, and the tiers that they make from folders."""

    root: Path

    def overlay(self, n: int) -> Path:
        return self.root / f"overlay-{n}"

    def base(self, n: int) -> Path:
        return self.root / f"base-{n}"

    def tier(self, n: int) -> Path:
        return self.root / f"tier-{n}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    models = Models(tmp_path_factory.mktemp("models"))
    for n in (1, 2):
        write_overlay(models.overlay(n), with_base=False, tokenizer=False, seed=n, **OVERLAY_DIMS)
        write_base(models.base(n), shards=3, seed=n, **DIMS)
        outlier_mlx.convert(models.overlay(n), models.base(n), models.tier(n))
    return models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in as this process's hub, with an empty cache and nobody logged in."""
    hub = Hub(redirects=True)
    with serving(hub):
        point_to(hub, tmp_path, monkeypatch)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def served(hub: Hub, models: Models) -> Hub:
    """The stand-in with the first commits of both models."""
    hub.add("owner/overlay", models.overlay(1))
    hub.add("owner/base", models.base(1))
    return hub


def stream(out: Path, **options: Any) -> Path:
    return outlier_mlx.convert("owner/overlay", "owner/base", out, stream=True, **options)


def contents(tier: Path) -> dict[str, Any]:
    """A tier's files, but for what tells where it came from."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in tier.iterdir()}
    manifest = json.loads(found.pop("tier.json"))
    del found["README.md"], manifest["overlay"], manifest["base"]
    return found | {"manifest": manifest}


def fetched(hub: Hub) -> list[str]:
    """The files of tensors that were fetched as a whole, in order."""
    return [r.path.rsplit("/", 1)[1] for r in hub.requests if is_transfer(r) and r.part is None]


def is_transfer(request: Request) -> bool:
    return request.method == "GET" and request.path.startswith("/lfs/") and request.sent > 100


@pytest.fixture
def stop_at(served: Hub) -> Callable[[str], None]:
    """Have the hub go away when a file is fetched as a whole; the next call brings it back."""

    def stop(name: str) -> None:
        def on_file(method: str, file: str, part: str | None) -> None:
            served.down |= method == "GET" and file == name and part is None

        served.down, served.on_file = False, on_file

    return stop


def unfinished(tmp_path: Path, stop_at: Callable[[str], None], name: str) -> Path:
    """A conversion to `tmp_path/tier` that ended when the hub went away; what it keeps."""
    stop_at(name)
    with pytest.raises(OutlierError), pytest.warns(CheckpointWarning, match="unfinished: the same"):
        stream(tmp_path / "tier")
    assert not (tmp_path / "tier").exists()
    return kept_folder(tmp_path / "tier")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The result


@pytest.mark.parametrize(
    "form", ["per-file", "trainer", "repacked", "packed", "monolith", "toy", "toy-dense"]
)
def test_every_form(hub: Hub, tmp_path: Path, form: str) -> None:
    dense = form == "toy-dense"
    built = write_toy_dense(tmp_path / "overlay") if dense else build(tmp_path / "overlay", form)
    hub.add("owner/overlay", built.path)
    base = None
    if not dense and not FORMS[form][1].get("with_base", True):
        sizes = {k: v for k, v in FORMS[form][1].items() if k in ("hidden", "heads")}
        base = write_base(tmp_path / "base", shards=2, **sizes).path
        hub.add("owner/base", base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no tokenizer", CheckpointWarning)
        whole = outlier_mlx.convert(built.path, base, tmp_path / "whole")
        repo = "owner/base" if base else None
        out = tmp_path / "out" / "tier"
        outlier_mlx.convert("owner/overlay", repo, out, stream=True)
    assert contents(out) == contents(whole)
    assert names(out.parent) == ["tier"]
    assert len(fetched(hub)) == len(set(fetched(hub))) > 0


@pytest.mark.parametrize("options", [{}, {"portable": True}, {"tier": "f32", "experts": "affine2"}])
def test_shards_that_experts_straddle_and_a_base_that_repeats(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Never more than one source file is here, nor more bytes than the tier and the largest one."""
    dims = DIMS | {"moe_layers": (0, 1), "experts": 2, "expert_intermediate": 64}
    overlay = write_overlay(tmp_path / "overlay", shards=3, base_dtype="F32", **dims).path
    base = write_base(tmp_path / "base", shards=2, base_dtype="F32", **DIMS).path
    torch_save(overlay / "alpha_overlay.pt", {"alphas": {1: {0: 0.25}}})
    hub.add("owner/overlay", overlay)
    hub.add("owner/base", base)
    whole = outlier_mlx.convert(overlay, base, tmp_path / "whole", **options)
    out = tmp_path / "out" / "tier"
    here: list[tuple[int, int]] = []

    def look(*_: object) -> None:
        kept = [p for p in kept_folder(out).rglob("*") if p.is_file()]
        sources = [p for p in kept if "fetched" in p.parts and p.stat().st_size > 2000]
        here.append((len(sources), sum(p.stat().st_blocks * 512 for p in kept)))

    hub.on_file = look
    monkeypatch.setattr(PlacedWriter, "sync", look)
    outlier_mlx.convert("owner/overlay", "owner/base", out, stream=True, **options)
    assert contents(out) == contents(whole)
    files = [p for folder in (overlay, base) for p in folder.glob("*.safetensors")]
    assert sorted(fetched(hub)) == sorted(p.name for p in files)
    assert max(count for count, _ in here) == 1
    sizes = [p.stat().st_size for p in out.iterdir()], [p.stat().st_size for p in files]
    # Blocks, and huggingface_hub's notes of what it fetched.
    assert max(used for _, used in here) <= sum(sizes[0]) + max(sizes[1]) + 20 * 4096
    assert max(sizes[1]) + 30 * 4096 < sum(sizes[1])


def test_of_sparse_files_only_alphas_are_read(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else would be zeros that nobody wrote."""
    read = []
    original = TensorRef._fill

    def spy(self: TensorRef, buffer: memoryview, offset: int) -> None:
        if not self.file.is_symlink():
            read.append(self.name)
            assert self.file.stat().st_blocks * 512 < self.file.stat().st_size
        original(self, buffer, offset)

    monkeypatch.setattr(TensorRef, "_fill", spy)
    stream(tmp_path / "tier")
    assert read == ["model.layers.1.mlp.alpha_values"]


def test_only_headers_come_before_the_space_is_checked(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [p for p in models.tier(1).iterdir() if p.suffix == ".safetensors"]
    header = int.from_bytes(tensors[0].read_bytes()[:8], "little") + 8
    tier = sum(p.stat().st_size for p in tensors) - header
    sources = [*models.overlay(1).glob("*.safetensors"), *models.base(1).glob("*.safetensors")]
    usage = shutil.disk_usage(tmp_path)
    needed = tier + max(p.stat().st_size for p in sources)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutlierError, match="the tier with one source file takes"):
        stream(tmp_path / "out" / "tier")
    assert not fetched(served) and not (tmp_path / "out").exists()
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    stream(tmp_path / "out" / "tier")


def test_folders_are_read_as_ever(served: Hub, models: Models, tmp_path: Path) -> None:
    """A repository with a folder is streamed; folders alone are converted as without."""
    overlay, base = models.overlay(1), models.base(1)
    outlier_mlx.convert("owner/overlay", base, tmp_path / "one", stream=True)
    outlier_mlx.convert(overlay, "owner/base", tmp_path / "other", stream=True)
    assert sorted(fetched(served)) == sorted(ORDER)
    served.requests.clear()
    outlier_mlx.convert(overlay, base, tmp_path / "both", stream=True)
    assert not served.requests
    for name in ("one", "other", "both"):
        assert contents(tmp_path / name) == contents(models.tier(1))
        verify_tier(tmp_path / name)
    assert overlay.is_dir() and names(tmp_path) == ["both", "one", "other"]


def test_another_volume(served: Hub, models: Models) -> None:
    volume = Path("/dev/shm")
    if not os.access(volume, os.W_OK) or volume.stat().st_dev == models.root.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=volume) as folder:
        stream(Path(folder) / "tier")
        assert contents(Path(folder) / "tier") == contents(models.tier(1))
        assert names(Path(folder)) == ["tier"]


# The network


def test_a_dropped_connection(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the file is fetched by range, in the same run."""
    name = OVERLAY_FILE
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    def on_file(method: str, file: str, part: str | None) -> None:
        if method == "GET" and file == name and part is None:
            served.drops[name] = 10_000
            served.on_file = None

    served.on_file = on_file
    stream(tmp_path / "tier")
    assert contents(tmp_path / "tier") == contents(models.tier(1))
    sent = [(r.part, r.sent) for r in served.requests if is_transfer(r) and r.path.endswith(name)]
    size = (models.overlay(1) / name).stat().st_size
    assert sent[-2:] == [(None, 10_000), ("bytes=10000-", size - 10_000)]


def test_a_half_fetched_file(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run fetches the rest; the checksum tells if what was here is not what came."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    size = (models.overlay(1) / OVERLAY_FILE).stat().st_size

    def on_file(method: str, file: str, part: str | None) -> None:
        if file == OVERLAY_FILE and part is None:
            served.drops[file] = 10_000
        served.down |= part == "bytes=10000-"

    for damaged in (True, False):
        served.on_file = on_file
        with pytest.raises(OutlierError), pytest.warns(match="unfinished"):
            stream(tmp_path / "tier")
        served.down, served.on_file = False, None
        served.drops.clear()
        (half,) = kept_folder(tmp_path / "tier").glob("fetched/*/*")
        assert half.stat().st_size == 10_000
        if damaged:
            half.write_bytes(bytes(10_000))
            with pytest.raises(OutlierError, match="SHA-256"), pytest.warns(match="unfinished"):
                stream(tmp_path / "tier")
            assert not half.exists()
    served.requests.clear()
    stream(tmp_path / "tier")
    assert [(r.part, r.sent) for r in served.requests if is_transfer(r)][-1] == (
        "bytes=10000-",
        size - 10_000,
    )
    assert not fetched(served)
    assert contents(tmp_path / "tier") == contents(models.tier(1))


def test_what_is_in_the_cache_is_not_fetched(served: Hub, models: Models, tmp_path: Path) -> None:
    cached = Path(huggingface_hub.snapshot_download("owner/base"))
    served.requests.clear()
    stream(tmp_path / "tier")
    assert fetched(served) == [OVERLAY_FILE]
    whole = outlier_mlx.convert("owner/overlay", "owner/base", tmp_path / "whole" / "tier")
    for path in whole.iterdir():
        assert (tmp_path / "tier" / path.name).read_bytes() == path.read_bytes()
    for path in models.base(1).iterdir():
        assert (cached / path.name).read_bytes() == path.read_bytes()


def test_files_that_are_too_large_for_http(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are left to huggingface_hub as a whole, which takes Xet for them."""
    original, taken = huggingface_hub.hf_hub_download, []

    def take(repo: str, name: str, *, local_dir: Path, **options: Any) -> str:
        if not name.endswith(".safetensors"):
            return original(repo, name, local_dir=local_dir, **options)
        taken.append(name)
        folder = models.base(1) if repo == "owner/base" else models.overlay(1)
        return str(shutil.copy(folder / name, local_dir / name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", take)
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 10_000)
    stream(tmp_path / "tier")
    assert taken == ORDER and not fetched(served)
    assert contents(tmp_path / "tier") == contents(models.tier(1))


def test_gone_on_with_at_the_file_it_was_at(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    for n, name in enumerate(ORDER):
        served.requests.clear()
        kept = unfinished(tmp_path, stop_at, name)
        # All but the first are gone on with, and have just one file to fetch before the next.
        assert fetched(served) == ORDER[max(0, n - 1) : n]
        assert len((kept / "journal.jsonl").read_text().splitlines()) == 1 + n
    served.down, served.on_file = False, None
    served.requests.clear()
    stream(tmp_path / "tier")
    assert fetched(served) == ORDER[-1:]
    assert contents(tmp_path / "tier") == contents(models.tier(1))
    # Nothing went into the hub's cache.
    assert names(tmp_path) == ["tier"]


def test_interrupted_anywhere(served: Hub, models: Models, tmp_path: Path) -> None:
    """Ctrl-C at any moment: between bytes of a file, between files, while checksums are taken."""
    calls: list[int] = []
    stream(tmp_path / "first", progress=lambda done, _: calls.append(done))
    chance = random.Random(0)
    total = calls[-1]

    def interrupt_at(moment: int) -> Callable[[int, int], None]:
        def interrupt(done: int, expected: int) -> None:
            assert done <= expected == total
            if done >= moment:
                raise KeyboardInterrupt

        return interrupt

    for moment in sorted(chance.sample(calls, 3)):
        with pytest.raises(KeyboardInterrupt), pytest.warns(match="unfinished"):
            stream(tmp_path / "tier", progress=interrupt_at(moment))
    calls.clear()
    stream(tmp_path / "tier", progress=lambda done, _: calls.append(done))
    assert calls == sorted(calls) and calls[-1] == total
    assert contents(tmp_path / "tier") == contents(models.tier(1))


def test_a_disk_that_fills_up(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [20]

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    said = pytest.warns(match="unfinished")
    with pytest.raises(OutlierError, match="cannot write: No space left on device"), said:
        stream(tmp_path / "tier")
    monkeypatch.setattr(os, "pwrite", real)
    done = fetched(served)
    served.requests.clear()
    stream(tmp_path / "tier")
    assert done + fetched(served) == ORDER
    assert contents(tmp_path / "tier") == contents(models.tier(1))


def test_a_login_that_is_needed(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 401 in the middle keeps what there is; the token goes to the hub and to nobody else."""
    token = "hf_" + "s" * 34

    def on_file(method: str, file: str, part: str | None) -> None:
        if file.startswith("model-00002") and part is None:
            served.private |= {"owner/overlay", "owner/base"}

    served.on_file = on_file
    out = tmp_path / "tier"
    with pytest.raises(OutlierError, match="hf auth login"), pytest.warns(match="unfinished"):
        stream(out)
    with pytest.raises(OutlierError, match="hf auth login"), pytest.warns(match="unfinished"):
        stream(out)
    done = fetched(served)
    served.requests.clear()
    monkeypatch.setenv("HF_TOKEN", token)
    stream(out)
    assert not set(done) & set(fetched(served))
    for request in served.requests:
        assert request.token == (None if request.path.startswith("/lfs/") else f"Bearer {token}")
    assert contents(out) == contents(models.tier(1))
    assert not [p for p in out.iterdir() if token.encode() in p.read_bytes()]


def test_a_repository_that_refuses_leaves_nothing(served: Hub, tmp_path: Path) -> None:
    served.private.add("owner/base")
    with pytest.raises(OutlierError, match="hf auth login"):
        stream(tmp_path / "new" / "tier")
    assert not (tmp_path / "new").exists()


# Revisions and settings


def move(hub: Hub, models: Models, *, gone: bool) -> tuple[str, str]:
    """Let `main` of the overlay be its second commit; returns both."""
    (first,) = hub.repos["owner/overlay"].commits
    _, second = hub.add("owner/overlay", models.overlay(1), models.overlay(2))
    if gone:
        del hub.repos["owner/overlay"].commits[first]
    return first, second


@pytest.mark.parametrize("gone", [False, True])
def test_a_revision_that_moves(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None], gone: bool
) -> None:
    """What was begun goes on with its commit, or anew with the other: never with both."""
    unfinished(tmp_path, stop_at, ORDER[-1])
    first, second = move(served, models, gone=gone)
    if gone:
        # The base would not fit the new overlay.
        served.repos["owner/base"].commits[served.repos["owner/base"].refs["main"]] = models.base(2)
    served.down, served.on_file = False, None
    served.requests.clear()
    said = f"main is now {second[:12]}.*{first[:12]}"
    said += ".*gone: beginning anew" if gone else ".*going on with that"
    with pytest.warns(CheckpointWarning, match=said):
        stream(tmp_path / "tier")
    assert len(fetched(served)) == (4 if gone else 1)
    assert contents(tmp_path / "tier") == contents(models.tier(2 if gone else 1))
    manifest = json.loads((tmp_path / "tier" / "tier.json").read_text())
    assert manifest["overlay"]["revision"] == (second if gone else first)


def test_an_unfinished_run_with_other_settings(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, ORDER[2])
    before = (kept / "journal.jsonl").read_bytes()
    served.down, served.on_file = False, None
    (tmp_path / "alphas.json").write_text(json.dumps({"1": {"0": 2.0}}))
    others: dict[str, dict[str, Any]] = {
        "recipe": {"tier": "q8"},
        "alphas": {"alpha": tmp_path / "alphas.json"},
        "overlay": {"revision": "v1"},
    }
    for what, options in others.items():
        with pytest.raises(OutlierError, match=rf"other settings \({what}\).*--force"):
            stream(tmp_path / "tier", **options)
        assert (kept / "journal.jsonl").read_bytes() == before
    served.requests.clear()
    stream(tmp_path / "tier", tier="q8", force=True)
    assert len(fetched(served)) == 4
    expected = outlier_mlx.convert(models.overlay(1), models.base(1), tmp_path / "q8", tier="q8")
    assert contents(tmp_path / "tier") == contents(expected)
    assert not kept.exists()


def test_a_local_base_that_changes_under_an_unfinished_run(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    base = Path(shutil.copytree(models.base(1), tmp_path / "base"))
    stop_at(OVERLAY_FILE)
    with pytest.raises(OutlierError), pytest.warns(match="unfinished"):
        outlier_mlx.convert("owner/overlay", base, tmp_path / "tier", stream=True)
    served.down, served.on_file = False, None
    shard = sorted(base.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(OutlierError, match=r"other settings \(files\)"):
        outlier_mlx.convert("owner/overlay", base, tmp_path / "tier", stream=True)


def test_what_an_unfinished_run_left_was_touched(
    served: Hub, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, ORDER[2])
    served.down, served.on_file = False, None
    (shard,) = (kept / "whole").glob("*.safetensors")
    shard.rename(kept / "elsewhere")
    with pytest.raises(OutlierError, match="files are missing"), pytest.warns(match="unfinished"):
        stream(tmp_path / "tier")
    for text in ("nonsense\n", "[]\n", "{}\n[]\n", '{"overlay": 1}\n{"done": 1}\n'):
        (kept / "journal.jsonl").write_text(text)
        with pytest.raises(OutlierError, match="not a journal; delete"):
            stream(tmp_path / "tier")


def test_a_run_without_stream_leaves_it_alone_until_the_tier_is_there(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, OVERLAY_FILE)
    with pytest.raises(OutlierError):
        outlier_mlx.convert(tmp_path, models.base(1), tmp_path / "tier")
    assert (kept / "journal.jsonl").exists()
    outlier_mlx.convert(models.overlay(1), models.base(1), tmp_path / "tier")
    assert not kept.exists() and contents(tmp_path / "tier") == contents(models.tier(1))


def test_two_runs_into_one_place(served: Hub, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "tier") as folder:
        with pytest.raises(OutlierError, match="another run is writing it"):
            stream(tmp_path / "tier")
        (folder / "tier.json").write_text("")
    with whole_folder(tmp_path / "other", keep=True) as folder:
        with pytest.raises(OutlierError, match="another run is writing it"):
            outlier_mlx.convert("owner/overlay", "owner/base", tmp_path / "other")
        (folder / "tier.json").write_text("")


# Sources that are not sound


def test_what_is_found_out_late_is_refused_and_nothing_stays(hub: Hub, tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", **OVERLAY_DIMS).path
    base = write_base(tmp_path / "base", shards=2, **DIMS).path
    hub.add("owner/overlay", overlay)
    hub.add("owner/base", base)
    name = "model.layers.1.self_attn.k_proj.bias"
    values = find_tensor(base, name)[1].array().copy()
    values[3] += 1
    replace_tensor(base, name, values)
    with pytest.raises(CheckpointError) as local:
        outlier_mlx.convert(overlay, base, tmp_path / "out" / "tier")
    with pytest.raises(CheckpointError) as streamed:
        stream(tmp_path / "out" / "tier")
    assert str(streamed.value) == str(local.value)
    assert "differs from" in str(local.value) and not (tmp_path / "out").exists()


def test_messages_name_the_repository(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^owner/overlay: holds no base model"):
        outlier_mlx.convert("owner/overlay", out=tmp_path / "tier", stream=True)


def test_gguf_is_refused(hub: Hub, models: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.overlay(1), tmp_path / "overlay"))
    (folder / "experts.gguf").write_bytes(b"GGUF")
    hub.add("owner/overlay", folder)
    with pytest.raises(OutlierError, match=r"experts.gguf: GGUF cannot be streamed; leave out"):
        stream(tmp_path / "tier")


# The command


def test_the_command(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    out = tmp_path / "tier"
    command = ["convert", "owner/overlay", "--base", "owner/base", "--stream", "--out", out]
    stop_at(OVERLAY_FILE)
    warning, error = run(*command, code=1).err.splitlines()
    assert "unfinished: the same command goes on from here" in warning
    assert str(kept_folder(out)) in warning and error.startswith("error: owner/")
    served.down, served.on_file = False, None
    assert run(*command, "--quiet").both == ""
    assert contents(out) == contents(models.tier(1))
    assert "exists; --force" in run(*command, code=1).err


def test_a_recipe_is_chosen_from_headers(served: Hub, models: Models) -> None:
    choices, _ = list_choices("owner/overlay", "owner/base", ram_gb=16)
    local, _ = list_choices(models.overlay(1), models.base(1), ram_gb=16)
    assert [(c.name, c.memory) for c in choices] == [(c.name, c.memory) for c in local]
    assert not fetched(served)


@pytest.mark.slow
def test_killed(served: Hub, models: Models, tmp_path: Path) -> None:
    """SIGKILL while any of the files is fetched; each run goes on where the one before was."""
    script = (
        "import sys; from outlier_mlx.storage import remote; remote.SMALL_BYTES = 2000;"
        "import outlier_mlx; outlier_mlx.convert('owner/overlay', 'owner/base', sys.argv[1],"
        " stream=True)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "TMPDIR": str(tmp_path),
    }
    out = tmp_path / "out" / "tier"
    command = [sys.executable, "-c", script, str(out)]
    running: list[subprocess.Popen[bytes]] = []

    def kill_at(name: str) -> Callable[[str, str, str | None], None]:
        def kill(method: str, file: str, part: str | None) -> None:
            if method == "GET" and file == name and part is None:
                running[-1].kill()

        return kill

    for name in ORDER:
        served.requests.clear()
        served.on_file = kill_at(name)
        running.append(subprocess.Popen(command, env=environment))
        assert running[-1].wait() == -9
        assert len(fetched(served)) <= 2
        assert names(out.parent) == [".tier.part-kept"]
    served.on_file = None
    run_command(*command, env=environment)
    assert contents(out) == contents(models.tier(1))
    assert names(out.parent) == ["tier"]


# The parts that it is made of


def test_bytes_in_any_order_over_several_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    specs = [TensorSpec(f"t{n}", "U8", (int(rng.integers(1, 900)),)) for n in range(12)]
    data = {spec.name: rng.bytes(spec.nbytes) for spec in specs}
    for folder in ("once", "pieces"):
        (tmp_path / folder).mkdir()
    with ShardedWriter(tmp_path / "once", specs, 2000) as whole:
        for name, value in data.items():
            whole.write(name, value)
        expected = whole.finish()
    cuts = [(name, start) for name, value in data.items() for start in range(0, len(value), 100)]
    rng.shuffle(cuts)
    for part in (cuts[:40], cuts[40:]):
        with PlacedWriter(tmp_path / "pieces", specs, 2000) as writer:
            for name, start in part:
                writer.write(str(name), int(start), data[str(name)][int(start) :][:100])
            writer.sync()
            found = writer.finish()
    assert found == expected and len(expected) > 3
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "pieces" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("place", [-1, 1, 5])
def test_bytes_outside_their_tensor(tmp_path: Path, place: int) -> None:
    specs = [TensorSpec(name, "U8", (4,)) for name in "ab"]
    with PlacedWriter(tmp_path, specs) as w, pytest.raises(OutlierError, match="not within"):
        w.write("a", place, b"xxxx")


def test_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    identity = {"what": "a test"}
    journal = Journal(tmp_path, identity)
    journal.add("first", {"a": "1"})
    whole = (tmp_path / "journal.jsonl").read_bytes()
    journal.add("second", {})
    text = (tmp_path / "journal.jsonl").read_bytes()
    for end in range(len(whole), len(text)):
        (tmp_path / "journal.jsonl").write_bytes(text[:end])
        again = Journal(tmp_path, identity)
        assert again.done == {"first": {"a": "1"}}
        again.add("third", {})
        assert Journal(tmp_path, identity).done == {"first": {"a": "1"}, "third": {}}
