"""Folders and files that no command replaces, whatever it is told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.damage import edit_json
from tests.folders import names, snapshot
from tests.program import assert_refused, run


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an `overlay` and its `tier`."""
    for name in ("overlay", "tier"):
        shutil.copytree(place / name, tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "empty": (lambda _: {}, "no list of files"),
    "a list": (lambda _: [], "JSON"),
    "scores": (lambda _: {"format": "outlier-mlx evaluation 1"}, "no list of files"),
    "another version": (lambda m: m | {"format_version": 3}, "format_version 3, expected 2"),
    "no version": (lambda m: {k: m[k] for k in m if k != "format_version"}, "None, expected 2"),
    "a file less": (
        lambda m: m | {"files": {k: v for k, v in m["files"].items() if k != "tokenizer.json"}},
        "holds tokenizer.json, which tier.json does not list",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_not_of_this_folder(here: Path, name: str) -> None:
    change, reason = MANIFESTS[name]
    manifest = here / "tier" / "tier.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    before = snapshot(here)
    refused = run("convert", "overlay", "--out", "tier", "--force", code=1)
    assert_refused(refused, "tier: ", reason, "--force replaces only what outlier-mlx wrote")
    assert snapshot(here) == before


def test_a_tier_of_version_1_is_replaced(here: Path) -> None:
    manifest = here / "tier" / "tier.json"
    edit_json(manifest, format_version=1, producer="outlier-mlx 0.1.0")
    run("convert", "overlay", "--out", "tier", "--force")
    assert json.loads(manifest.read_text())["format_version"] == 2


def test_files_beside_the_model_are_named(here: Path) -> None:
    for name in ("thesis.txt", "sub/a", ".git/HEAD", "chat.safetensors"):
        (here / "tier" / name).parent.mkdir(exist_ok=True)
        (here / "tier" / name).write_text("precious")
    (here / "tier" / "link").symlink_to(here)
    before = snapshot(here)
    refused = run("convert", "overlay", "--out", "tier", "--force", code=1)
    assert_refused(refused, "holds .git/HEAD, chat.safetensors, link and 2 more")
    assert snapshot(here) == before


def test_what_this_project_and_systems_add_is_no_hindrance(here: Path) -> None:
    added = ("measured.json", "LICENSE-base", ".DS_Store", "._config.json", ".nfs00000000000a4b")
    for name in (*added, ".measured.0a1b2c3d.json", "__pycache__/outlier_moe.cpython-311.pyc"):
        (here / "tier" / name).parent.mkdir(exist_ok=True)
        (here / "tier" / name).write_text("x")
    run("convert", "overlay", "--out", "tier", "--force")
    assert not set(added) & set(names(here / "tier"))
    (here / "tier" / "__pycache__").mkdir()
    (here / "tier" / "__pycache__" / "mine.pyc").write_text("x")
    refused = run("convert", "overlay", "--out", "tier", "--force", code=1)
    assert_refused(refused, "holds __pycache__/mine.pyc")


@pytest.mark.parametrize("out", [".", "..", "../here", "sub/.."])
def test_the_current_folder_is_never_replaced(
    here: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "tier" / "sub").mkdir()
    monkeypatch.chdir(here / "tier" if out != ".." else here / "tier" / "sub")
    before = snapshot(here)
    for force in ((), ("--force",)):
        if out == "../here":
            out = str(here / "tier")
        refused = run("convert", here / "overlay", "--out", out, *force, code=1)
        assert_refused(refused, "is or holds the current folder, so it stays")
    assert snapshot(here) == before


def test_a_mount_point_is_never_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "tier")
    refused = run("convert", "overlay", "--out", "tier", "--force", code=1)
    assert_refused(refused, "tier: is where a disk is mounted")
    assert (here / "tier" / "tier.json").exists()


def test_a_folder_in_an_input_is_never_replaced(here: Path) -> None:
    shutil.copytree("tier", "overlay/made")
    refused = run("convert", "overlay", "--out", "overlay/made", "--force", code=1)
    assert_refused(refused, "overlay/made: exists and lies in an input")
    (here / "link").symlink_to("overlay")
    refused = run("convert", "link", "--out", "overlay/made", "--force", code=1)
    assert_refused(refused, "lies in an input")
    assert (here / "overlay" / "made" / "tier.json").exists()


def test_alphas_in_the_folder_are_an_input(here: Path) -> None:
    again = ("convert", "overlay", "--out", "tier", "--alpha", "tier/LICENSE", "--force")
    (here / "tier" / "LICENSE").write_text(json.dumps({"1": {"0": 2.0}}))
    assert_refused(run(*again, code=1), "tier: is an input, so it cannot be the output")


# Files that commands write


def test_an_input_is_never_replaced_by_a_file(here: Path) -> None:
    (here / "text.txt").write_text("the cat sat on the mat " * 20)
    (here / "out").mkdir()
    shutil.copyfile("text.txt", "out/routing.json")
    before = snapshot(here)
    for line in (
        "tune tier --text out/routing.json --parts alphas --out out/routing.json",
        "tune tier --text text.txt --parts alphas --out tier/tier.json",
        "eval tier --tasks text.txt --out text.txt",
        "eval tier --tasks x --out tier/config.json",
        "routing tier --text out/routing.json --out out --no-plots",
    ):
        refused = run(*line.split(), "--force", code=1)
        assert_refused(refused, "is an input or lies in one: name another file")
    refused = run(
        *["outliers", "tier", "--text", "text.txt", "--out", "tier", "--no-plots", "--force"],
        code=1,
    )
    assert_refused(refused, "tier: is an input, so it cannot be the output")
    assert snapshot(here) == before
