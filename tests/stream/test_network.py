"""Streamed conversions over a network that fails, refuses or asks for a login."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import outlier_mlx
from outlier_mlx.errors import OutlierError
from outlier_mlx.writing.folders import kept_folder
from tests.folders import tier_contents
from tests.hub import Hub
from tests.stream.streaming import ORDER, OVERLAY_FILE, Models, fetched, is_transfer, stream


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
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))
    sent = [(r.part, r.sent) for r in served.requests if is_transfer(r) and r.path.endswith(name)]
    size = (models.overlay(1) / name).stat().st_size
    assert sent[-2:] == [(None, 10_000), ("bytes=10000-", size - 10_000)]


@pytest.mark.slow
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
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))


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
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))


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
    assert tier_contents(out) == tier_contents(models.tier(1))
    assert not [p for p in out.iterdir() if token.encode() in p.read_bytes()]


def test_a_repository_that_refuses_leaves_nothing(served: Hub, tmp_path: Path) -> None:
    served.private.add("owner/base")
    with pytest.raises(OutlierError, match="hf auth login"):
        stream(tmp_path / "new" / "tier")
    assert not (tmp_path / "new").exists()
