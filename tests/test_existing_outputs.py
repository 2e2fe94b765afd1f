"""Commands that write refuse a file or folder that exists, and `--force` replaces it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outlier_mlx.checkpoints import open_overlay
from tests.folders import copy_writable
from tests.merging import write_merge_config, write_models
from tests.program import run

# What is written, and a command that would write it; the words in braces are of `here`.
OUTPUTS = {
    "convert": ("out", "convert overlay --out out"),
    "convert from nowhere": ("out", "convert nobody/nothing --out out"),
    "import": ("out", "import nobody/nothing --out out"),
    "merge": ("out", "merge nothing.yaml --out out"),
    "demo": ("out", "demo --out out"),
    "tune": ("out", "tune nobody/nothing --text text.txt --out out"),
    "tune alphas": (
        "out.json",
        "tune nobody/nothing --text text.txt --parts alphas --out out.json",
    ),
    "export": ("out", "export tier --out out"),
    "eval": ("out.json", "eval nobody/nothing --tasks x --out out.json"),
    "compare": ("out.png", "compare nothing.json --out out.png"),
    "routing": ("out/routing.json", "routing nobody/nothing --text text.txt --out out"),
    "outliers": ("out/outliers.json", "outliers nobody/nothing --text text.txt --out out"),
}


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an `overlay`, its `tier`, and `text.txt`; no hub can be reached."""
    here = copy_writable(place, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return here


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_exists_is_refused_before_the_work(command: str, here: Path) -> None:
    """Also if the model is nowhere to be found: that would only be found out later."""
    name, line = OUTPUTS[command]
    output = here / name
    output.parent.mkdir(exist_ok=True)
    if output.suffix:
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    for more in [""] if output.suffix else ["", "--force"]:
        told = run(*line.split(), *more.split(), code=1).err
        # A folder may be anything: --force is offered only if it replaces that one.
        no = (
            "exists and is not a tier (it holds mine); --force replaces only what outlier-mlx wrote"
        )
        why = "exists; --force replaces it" if output.suffix else no
        assert told == f"error: {name}: {why}\n"
        assert (output if output.suffix else output / "mine").read_text() == "mine"


@pytest.mark.parametrize("form", ["overlay", "packed"])
def test_an_export_is_replaced(form: str, here: Path) -> None:
    run("export", "tier", "--out", "out", "--format", "packed")
    (here / "out/README.md").write_text("stale")
    run("export", "--model", "tier", "--out", "out", "--format", form, "--force")
    assert not (here / "out/README.md").exists()
    assert json.loads((here / "out/checksums.json").read_text())["format"] == form
    assert open_overlay(here / "out").experts
    told = run("export", "tier", "--out", "out", code=1).err
    assert told == "error: out: exists; --force replaces it\n"


def test_an_input_is_never_replaced(here: Path) -> None:
    """Not even one that this project wrote, nor a folder that contains one."""
    run("export", "tier", "--out", "out/inner")
    (here / "out/tier.json").write_text("{}")
    (here / "link").symlink_to("tier")
    before = sorted(here.rglob("*"))
    for line, output in [
        ("export tier --out tier", "tier"),
        ("export link --out tier", "tier"),
        ("convert out/inner --base tier --out out/inner", "out/inner"),
        ("convert overlay --base tier --out tier", "tier"),
        ("convert out/inner --out out", "out"),
        ("import tier --out tier", "tier"),
    ]:
        told = run(*line.split(), "--force", code=1).err
        assert told == f"error: {output}: is an input, so it cannot be the output\n"
    assert sorted(here.rglob("*")) == before


def test_a_model_of_a_merge_is_never_replaced(tmp_path: Path) -> None:
    write_models(tmp_path)
    run("import", tmp_path / "base", "--out", tmp_path / "imported")
    config = write_merge_config(tmp_path, base_model="imported")
    told = run("merge", config, "--out", tmp_path / "imported", "--force", code=1).err
    assert told.endswith("/imported: is an input, so it cannot be the output\n")


def test_routing_is_replaced(here: Path) -> None:
    line = ["routing", "tier", "--text", "text.txt", "--window", 16, "--out", "out", "--no-plots"]
    run(*line, "--windows", 1)
    first = (here / "out/routing.json").read_text()
    run(*line, "--windows", 2, "--force")
    assert (here / "out/routing.json").read_text() != first
