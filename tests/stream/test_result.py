"""Conversions that fetch one source file at a time make what folders make."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.tiers.choose import list_choices
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing import folders
from outlier_mlx.writing.folders import kept_folder
from outlier_mlx.writing.writer import PlacedWriter
from tests.builders import write_base, write_overlay
from tests.damage import find_tensor, replace_tensor
from tests.folders import names, tier_contents
from tests.form_builders import torch_save, write_toy_dense
from tests.forms import FORMS, build
from tests.hub import Hub
from tests.program import run
from tests.stream.streaming import DIMS, ORDER, OVERLAY_DIMS, OVERLAY_FILE, Models, fetched, stream


@pytest.mark.parametrize(
    "form",
    ["per-file", "trainer", "repacked", "packed", "monolith", "gguf", "toy", "toy-dense"],
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
    assert tier_contents(out) == tier_contents(whole)
    assert names(out.parent) == ["tier"]
    assert len(fetched(hub)) == len(set(fetched(hub))) > 0


@pytest.mark.parametrize(
    ("width", "options"),
    [(64, {}), (48, {"portable": True}), (64, {"tier": "f32", "experts": "affine2"})],
)
def test_shards_that_experts_straddle_and_a_base_that_repeats(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, options: dict[str, Any]
) -> None:
    """Never more than one source file is here, nor more bytes than the tier and the largest one."""
    dims = DIMS | {"moe_layers": (0, 1), "experts": 2, "expert_intermediate": width}
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
    assert tier_contents(out) == tier_contents(whole)
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
        assert tier_contents(tmp_path / name) == tier_contents(models.tier(1))
        verify_tier(tmp_path / name)
    assert overlay.is_dir() and names(tmp_path) == ["both", "one", "other"]


def test_another_volume(served: Hub, models: Models) -> None:
    volume = Path("/dev/shm")
    if not os.access(volume, os.W_OK) or volume.stat().st_dev == models.root.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=volume) as folder:
        stream(Path(folder) / "tier")
        assert tier_contents(Path(folder) / "tier") == tier_contents(models.tier(1))
        assert names(Path(folder)) == ["tier"]


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


def test_the_command(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    out = tmp_path / "tier"
    command = ["convert", "owner/overlay", "--base", "owner/base", "--stream", "--out", out]
    stop_at(OVERLAY_FILE)
    warning, error = run(*command, code=1).err.splitlines()
    assert "unfinished: the same command resumes from here" in warning
    assert str(kept_folder(out)) in warning and error.startswith("error: owner/")
    served.down, served.on_file = False, None
    assert run(*command, "--quiet").both == ""
    assert tier_contents(out) == tier_contents(models.tier(1))
    assert "exists; --force" in run(*command, code=1).err


def test_a_recipe_is_chosen_from_headers(served: Hub, models: Models) -> None:
    choices, _ = list_choices("owner/overlay", "owner/base", ram_gb=16)
    local, _ = list_choices(models.overlay(1), models.base(1), ram_gb=16)
    assert [(c.name, c.memory) for c in choices] == [(c.name, c.memory) for c in local]
    assert not fetched(served)
