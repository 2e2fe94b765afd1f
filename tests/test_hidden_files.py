"""Hidden files, as macOS writes them beside every file on some drives, are as if not there."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx import open_overlay
from outlier_mlx.measure.eval_tasks import _local_tasks
from outlier_mlx.storage.paths import entries, files_below, is_hidden
from tests.awq_builder import write_awq
from tests.builders import write_base, write_overlay
from tests.evaluating import GENERATE, write_task
from tests.folders import contents, names, tier_contents
from tests.forms import FORMS, assert_same_contents, build
from tests.forms import contents as overlay_contents
from tests.gguf_builder import build as gguf_model
from tests.hub import Hub, opened
from tests.hub_uploads import WritableHandler, WritableHub
from tests.library import Library
from tests.merging import write_merge_config, write_models
from tests.program import ROOT, assert_refused, run

# The beginning of an AppleDouble file; as a length of a safetensors header, it is 2 TB.
SIDECAR = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)
LISTING = ("glob", "iglob", "rglob", "iterdir", "listdir", "scandir", "fwalk")


def sidecars(folder: Path) -> Path:
    """What a Mac leaves in a folder on a foreign drive, and a hidden folder of somebody's."""
    for path in [folder, *folder.rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(SIDECAR)
    for place in [path for path in [folder, *folder.rglob("*")] if path.is_dir()]:
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    hidden = folder / ".backup"
    hidden.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        (hidden / path.name.removeprefix("._")).write_bytes(b"{")
    for name in ("alpha.json", "task.yaml", "model.safetensors", "code.py"):
        (hidden / name).write_bytes(b"{")
    return folder


def with_sidecars(source: Path, target: Path) -> Path:
    return sidecars(shutil.copytree(source, target))


@pytest.mark.parametrize("name", FORMS)
def test_overlays_of_every_form(name: str, tmp_path: Path) -> None:
    built = build(tmp_path / "overlay", name)
    expected = overlay_contents(open_overlay(built.path))
    found = open_overlay(sidecars(built.path))
    assert found.form == FORMS[name][2]
    assert_same_contents(overlay_contents(found), expected)


def test_convert(tmp_path: Path) -> None:
    dims: dict[str, Any] = {"layers": 2, "intermediate": 64}
    bare = write_overlay(
        tmp_path / "overlay", with_base=False, moe_layers=(1,), experts=2, tokenizer=False, **dims
    )
    base = write_base(tmp_path / "base", shards=2, **dims)
    for folder in (bare.path, base.path):
        (folder / "LICENSE").write_text("The licence.\n")
    run("convert", bare.path, "--base", base.path, "--out", tmp_path / "plain", "--quiet")
    run("convert", sidecars(bare.path), "--base", sidecars(base.path), "--out", tmp_path / "tier")
    assert tier_contents(tmp_path / "tier") == tier_contents(tmp_path / "plain")


def test_a_tier_is_read_measured_exported_and_replaced(library: Library, tmp_path: Path) -> None:
    place = library.place(layers=2, moe_layers=(1,))
    plain, tier = place / "tier", with_sidecars(place / "tier", tmp_path / "tier")
    assert "whole" in run("verify", tier).out
    assert run("info", tier, "--json").json == run("info", plain, "--json").json
    said = ("--prompt", "the cat", "-m", "4", "--temp", "0", "--quiet")
    assert run("generate", tier, *said).out == run("generate", plain, *said).out
    text = ("--text", place / "text.txt", "--window", "32", "--windows", "2")
    assert run("perplexity", tier, *text).out == run("perplexity", plain, *text).out
    sizes = []
    for source, out in ((plain, "a"), (tier, "b")):
        sizes.append(run("export", source, "--out", tmp_path / out).err.partition(":")[2])
    assert sizes[0] == sizes[1]
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    again = ("convert", place / "overlay", "--out", tier, "--force", "--quiet")
    refused = run(*again, code=1)  # a hidden folder is somebody's
    assert_refused(refused, ".backup/README.md", "which tier.json does not list")
    shutil.rmtree(tier / ".backup")
    run(*again)
    assert not [name for name in names(tier) if is_hidden(name)]


def test_a_shard_that_is_not_listed_is_still_refused(library: Library, tmp_path: Path) -> None:
    tier = with_sidecars(library.place(layers=2, moe_layers=(1,)) / "tier", tmp_path / "tier")
    (tier / "model-extra.safetensors").write_bytes(SIDECAR)
    assert_refused(run("verify", tier, code=1), "model-extra.safetensors: not listed")


def test_import(tmp_path: Path) -> None:
    one, split = tmp_path / "one", tmp_path / "split"
    one.mkdir()
    split.mkdir()
    gguf_model().write(one / "m.gguf")
    gguf_model().split(split, 2, "m")
    awq = write_awq(tmp_path / "awq").path
    for source in (one, split, awq, one / "m.gguf"):
        if source.is_dir():
            sidecars(source)
        out = tmp_path / f"{source.name}-mlx"
        run("import", source, "--out", out, "--quiet")
        assert "whole" in run("verify", sidecars(out)).out


def test_a_folder_of_hidden_models_alone_holds_none(tmp_path: Path) -> None:
    (tmp_path / "._m.gguf").write_bytes(SIDECAR)
    (tmp_path / "._model.safetensors").write_bytes(SIDECAR)
    (tmp_path / "._pytorch_model.bin").write_bytes(SIDECAR)
    refused = run("import", tmp_path, "--out", tmp_path / "out", code=1)
    assert_refused(refused, "no *.safetensors and no *.gguf files")


def test_merge(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    config = write_merge_config(tmp_path / "models")
    run("merge", config, "--out", tmp_path / "plain", "--no-measure", "--quiet")
    sidecars(tmp_path / "models")
    run("merge", config, "--out", tmp_path / "merged", "--no-measure", "--quiet")
    expected, found = contents(tmp_path / "plain"), contents(tmp_path / "merged")
    assert found["model-00001-of-00001.safetensors"] == expected["model-00001-of-00001.safetensors"]


def test_tasks_of_eval(tmp_path: Path) -> None:
    write_task(tmp_path, "mine", [{"question": "one", "answer": "two"}], GENERATE % '"."')
    expected = _local_tasks([f"{tmp_path}/"], trust=False)[1]
    assert expected == ["mine"]
    assert _local_tasks([f"{sidecars(tmp_path)}/"], trust=False)[1] == expected


def test_outputs_of_measuring(library: Library, tmp_path: Path) -> None:
    place, out = library.place(layers=2, moe_layers=(1,)), tmp_path / "out"
    out.mkdir()
    for name in ("._routing.json", ".DS_Store"):
        (out / name).write_bytes(SIDECAR)
    text = ("--text", place / "text.txt", "--window", "16", "--windows", "1")
    run("routing", place / "tier", *text, "--out", out, "--no-plots")
    assert names(out) == [".DS_Store", "._routing.json", "routing.json"]


@pytest.mark.parametrize("command", ["info", "tiers", "convert", "convert --stream"])
def test_hidden_files_of_repositories_are_not_fetched(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, hub = build(tmp_path / "overlay", "packed"), Hub()
    hub.add("owner/overlay", sidecars(built.path))
    out = ("--out", tmp_path / "tier", "--quiet") if "convert" in command else ()
    with opened(hub, tmp_path, monkeypatch):
        run(*command.split(), "owner/overlay", *out)
        asked = hub.files_asked("owner/overlay")
    assert asked and not [name for name in asked if is_hidden(name)]


def test_push_sends_no_hidden_file_and_minds_none(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = with_sidecars(library.place(layers=2, moe_layers=(1,)) / "tier", tmp_path / "tier")
    (tmp_path / "store").mkdir()
    hub = WritableHub(store=tmp_path / "store")
    hub.create("owner/tier", private=True)
    hub.put("owner/tier", "._model-00001-of-00001.safetensors", SIDECAR)
    with opened(hub, tmp_path, monkeypatch, WritableHandler):
        monkeypatch.setenv("HF_TOKEN", hub.token)
        run("push", tier, "owner/tier", "--private", "--quiet")
    there = [name for name in names(hub.head("owner/tier")) if is_hidden(name)]
    assert there == ["._model-00001-of-00001.safetensors", ".gitattributes"]


def test_what_is_hidden(tmp_path: Path) -> None:
    hidden = tmp_path / ".cache" / "model"  # only what is in the folder counts
    (hidden / "sub" / ".git").mkdir(parents=True)
    for name in ("b.json", "a.json", "a.txt", "._a.json", "sub/c.json", "sub/.git/d.json"):
        (hidden / name).write_text(name)
    assert [path.name for path in entries(hidden)] == ["a.json", "a.txt", "b.json", "sub"]
    assert [path.name for path in entries(hidden, "*.json")] == ["a.json", "b.json"]
    assert entries(hidden, "*.json", hidden=True)[0].name == "._a.json"
    assert entries(hidden / "none") == entries(hidden / "a.txt") == []
    below = [path.relative_to(hidden).as_posix() for path in files_below(hidden, "*.json")]
    assert below == ["a.json", "b.json", "sub/c.json"]
    assert len(files_below(hidden, hidden=True)) == 6
    assert is_hidden("sub/._c.json") and is_hidden(".git/config") and not is_hidden("sub/c.json")


def test_one_module_lists_folders() -> None:
    # The model code of a tier stands alone; the list of kernels leaves hidden files out itself.
    lists = {ROOT / "outlier_mlx/storage/paths.py", ROOT / "outlier_mlx/runtime/kernel_text.py"}
    for file in sorted((ROOT / "outlier_mlx").rglob("[!.]*.py")):
        if file in lists:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                listing = node.attr in LISTING or (owner, node.attr) == ("os", "walk")
                assert not listing, f"{file}:{node.lineno}: .{node.attr} lists hidden files"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "glob", f"{file}:{node.lineno}"
