"""`verify`: any damage to a tier is found, and named by its file or tensor."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import Built
from tests.damage import edit_json
from tests.library import Library
from tests.tensor_file import read_stored, write_stored


@pytest.fixture(scope="module")
def overlay(library: Library) -> Built:
    return library.overlay(expert_intermediate=96)


@pytest.fixture(scope="module")
def whole(library: Library, overlay: Built) -> Path:
    return library.tier(overlay, tier="q4")


@pytest.fixture
def tier(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tier")


def listed(tier: Path) -> dict:
    return json.loads((tier / "tier.json").read_text())["files"]


def sign_again(tier: Path) -> None:
    """Make the manifest agree with the files, as one who means harm would."""
    files = {}
    for name in listed(tier):
        data = (tier / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_json(tier / "tier.json", files=files)


@pytest.mark.parametrize("options", [{}, {"tier": "f32"}, {"experts": "affine2"}, {"tier": "q8"}])
def test_what_convert_writes_is_whole(overlay: Built, tmp_path: Path, options: dict) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", **options)
    seen: list[tuple[int, int | None]] = []
    found = verify_tier(tier, lambda done, total: seen.append((done, total)))
    assert found.files == len(listed(tier))
    assert seen[-1] == (found.nbytes, found.nbytes)


def test_any_changed_byte_is_found_and_its_file_named(tier: Path) -> None:
    chance = random.Random(1)
    for name in listed(tier):
        path = tier / name
        data = path.read_bytes()
        places = {0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(12))}
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=name.split("-")[0]):
                verify_tier(tier)
        path.write_bytes(data)
    verify_tier(tier)


def test_missing_short_and_long_files_are_named(tier: Path) -> None:
    for name in listed(tier):
        path = tier / name
        data = path.read_bytes()
        for damage in (data[:-1], data + b"\0"):
            path.write_bytes(damage)
            with pytest.raises(CheckpointError, match=f"{name}: .* bytes, expected"):
                verify_tier(tier)
        path.unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_tier(tier)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-extra.safetensors", "helper.py", "sitecustomize.py"])
def test_files_that_would_be_loaded_but_are_not_listed(tier: Path, name: str) -> None:
    (tier / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name}: not listed"):
        verify_tier(tier)


def test_foreign_model_code_is_refused_even_if_the_manifest_agrees(tier: Path) -> None:
    with (tier / "outlier_moe.py").open("a") as file:
        file.write("import os\n")
    sign_again(tier)
    with pytest.raises(CheckpointError, match=r"outlier_moe\.py: not what this version"):
        verify_tier(tier)


def test_tensors_are_held_against_the_config(tier: Path) -> None:
    shard = tier / "model-00001-of-00001.safetensors"
    tensors = read_stored(shard)
    name = "model.layers.1.mlp.switch_mlp.up_proj.scales"
    del tensors[name]
    write_stored(shard, tensors)
    edit_json(tier / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, shard.name))
    sign_again(tier)
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        verify_tier(tier)


def test_a_config_for_other_shapes_is_refused(tier: Path) -> None:
    edit_json(tier / "config.json", moe_intermediate_size=95)
    sign_again(tier)
    with pytest.raises(CheckpointError, match=r"switch_mlp.*expected"):
        verify_tier(tier)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version 2, expected 1"),
        ({"files": []}, "no list of files"),
        ({"files": {"config.json": {}}}, "config.json: sha256 and bytes"),
        ({"files": {"../x": {"sha256": "", "bytes": 0}}}, "does not list config.json"),
    ],
)
def test_a_manifest_that_is_none(tier: Path, change: dict, words: str) -> None:
    edit_json(tier / "tier.json", **change)
    with pytest.raises(CheckpointError, match=words):
        verify_tier(tier)
