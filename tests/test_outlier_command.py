"""The command `outliers`: what it writes, what it refuses, and the windows it cuts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.outlier_draw import narrowed
from outlier_mlx.measure.outliers import measure, read_windows, tokens_digest
from tests.builders import write_base, write_overlay
from tests.damage import edit_config
from tests.program import run

TEXT = "the cat sat on the mat, and the dog sat on the log.\nThere it rained:  and rained. " * 40
PLANTED = 23


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text; a tier; and a base in which one dimension is huge wherever attention reads it."""
    folder = tmp_path_factory.mktemp("outliers")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    overlay = write_overlay(folder / "overlay", expert_intermediate=64)
    outlier_mlx.convert(overlay.path, out=folder / "tier")
    write_base(folder / "planted", base_dtype="F32")
    tensors = mx.load(str(folder / "planted" / "model.safetensors"))
    assert isinstance(tensors, dict)
    for n in range(4):
        name = f"model.layers.{n}.input_layernorm.weight"
        tensors[name] = tensors[name].at[PLANTED].multiply(300.0)
    mx.save_safetensors(str(folder / "planted" / "model.safetensors"), tensors)
    return folder


def command(place: Path, *models: str) -> list[object]:
    folders = [place / model for model in models]
    return ["outliers", *folders, "--text", place / "text.txt", "--sequences", 3, "--length", 32]


@pytest.mark.slow
def test_two_models(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Most of the time that a picture takes is for where matplotlib puts its panels.
    layout = "matplotlib.layout_engine.ConstrainedLayoutEngine.execute"
    monkeypatch.setattr(layout, lambda engine, figure: None)
    out = tmp_path / "deep" / "found"
    extras = ["--per-expert", "--residual", "--hold", "bf16", "--overlap", 0.5]
    shown = run(*command(place, "tier", "planted"), "--out", out, *extras)
    assert "planted: 3 sequences of 32 tokens" in shown.out
    assert "note: windows overlap" in shown.out
    assert sorted(path.name for path in out.iterdir()) == [
        *("by-active-params.png", "by-perplexity.png", "by-total-params.png"),
        *("heatmap-planted.png", "heatmap-tier.png", "outliers.json", "summary.json"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    tier, planted = json.loads((out / "outliers.json").read_text())
    assert (tier["model"], planted["model"]) == ("tier", "planted")
    for entry in (tier, planted):
        assert entry["probes"] == 2 * entry["layers"] == 8
        assert (entry["hidden"], entry["sequences"], entry["length"]) == (64, 3, 32)
        assert (entry["dtype"], entry["hold"]) == ("float32", "bfloat16")
        assert len(entry["probe_max"]) == 8
        assert len(entry["residual"]) == 4
    assert tier["tokens_sha256"] == planted["tokens_sha256"]
    assert tier["weights_bits"] < 12 < planted["weights_bits"] == 32
    assert [layer["layer"] for layer in tier["per_expert"]] == [1, 3]
    assert tier["inputs"]["same_vector_in_layers"] == [1, 3]
    assert tier["inputs"]["routed_experts"] == tier["inputs"]["shared_experts"]
    assert planted["per_expert"] == []

    assert planted["blog"]["unique_dims"] == [PLANTED]
    assert planted["blog"]["num_outliers"] == 3
    assert planted["blog"]["layer_pct"] == 50  # of probes: attention's alone
    assert planted["pooled"]["layer_pct"] == 100
    assert planted["inputs"]["attention"]["layer_pct"] == 100
    assert planted["inputs"]["dense_ffn"]["num_outliers"] == 0
    assert json.loads((out / "summary.json").read_text())["planted"] == {
        "layer_pct": 50.0,
        "seq_pct": round(planted["blog"]["seq_pct"], 1),
        "active_params": f"{planted['active_params'] / 1000:.0f}K",
    }


def test_the_command_measures_what_the_functions_do(place: Path, tmp_path: Path) -> None:
    options = ["--no-plots", "--json", "--quiet", "--threshold", 3, "--min-seq", 0.5]
    shown = run(*command(place, "planted"), "--out", tmp_path, *options, "--min-layers", 0.4)
    assert shown.err == ""
    (found,) = shown.json
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outliers.json", "summary.json"]
    assert json.loads((tmp_path / "outliers.json").read_text()) == [found]
    assert found["thresholds"] == {"magnitude": 3.0, "min_layers": 0.4, "min_seq": 0.5}
    model, tokenizer = load(place / "planted")
    windows = read_windows(tokenizer, place / "text.txt", 3, 32)
    assert found["tokens_sha256"] == tokens_digest(windows)
    measured = measure(model, windows)
    assert found["perplexity"] == measured.perplexity
    assert [probe["max_magnitude"] for probe in found["probe_max"]] == [
        row.max() for row in measured.counts.largest
    ]
    listed = run("perplexity", place / "planted", "--text", place / "text.txt",
                            "--window", 32, "--windows", 3, "--json").json  # fmt: skip
    # That command leaves out each window's last token, which it has nothing to check against.
    assert found["perplexity"] == pytest.approx(listed["perplexity"], rel=1e-4)


@pytest.mark.slow
def test_nothing_is_overwritten_unasked_and_what_is_done_stays(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    run(*command(place, "tier"), "--out", out, "--no-plots")
    before = (out / "outliers.json").read_bytes()
    again = run(*command(place, "planted"), "--out", out, "--no-plots", code=1)
    assert "outliers.json: exists; --force replaces it" in again.err
    assert (out / "outliers.json").read_bytes() == before

    # Files of an earlier run, and some that are somebody's own.
    theirs = ("notes.txt", "heatmap-of-us.png", "by-us.svg")
    for name in ("heatmap-tier.png", "by-perplexity.png", *theirs):
        (out / name).touch()
    # A model that fails only when it is run.
    broken = shutil.copytree(place / "planted", tmp_path / "broken")
    tensors = mx.load(str(broken / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors["model.layers.2.post_attention_layernorm.weight"] *= mx.nan
    mx.save_safetensors(str(broken / "model.safetensors"), tensors)
    replacing = command(place), "--out", out, "--no-plots", "--force"
    failed = run(*replacing[0], broken, *replacing[1:], code=1)
    assert failed.err == "error: broken: layer_2.ffn: not all values are finite\n"
    assert (out / "outliers.json").read_bytes() == before
    failed = run(*replacing[0], place / "planted", broken, *replacing[1:], code=1)
    (entry,) = json.loads((out / "outliers.json").read_text())
    assert entry["model"] == "planted"
    assert {path.name for path in out.iterdir()} == {"outliers.json", "summary.json", *theirs}


def test_models_of_one_name_are_told_apart(place: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(place / "planted", tmp_path / "other" / "planted")
    models = [place / "planted", twin]
    (tmp_path / "text.txt").write_text(TEXT[:600], encoding="utf-8")
    options = ["--no-plots", "--json", "--text", tmp_path / "text.txt", "--sequences", 10**9]
    shown = run(*command(place), *models, "--out", tmp_path / "found", *options)
    (note,) = shown.json[0]["notes"]
    assert re.fullmatch(r"the text has \d+ whole windows, fewer than 10{9}", note)
    assert [entry["model"] for entry in shown.json] == [str(m) for m in models]
    assert shown.out.count(shown.json[0]["tokens_sha256"]) == 2


def test_refusals(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found"
    nothing = tmp_path / "nothing.txt"
    run("outliers", place / "tier", "--text", nothing, "--out", out, code=2)
    for option, value in (("--length", 1), ("--overlap", 1), ("--hold", "int8")):
        run(*command(place, "tier"), "--out", out, option, value, code=2)

    copy = shutil.copytree(place / "planted", tmp_path / "copy")
    parallel = shutil.copytree(place / "planted", tmp_path / "parallel")
    edit_config(parallel, model_type="cohere")
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe")
    (tmp_path / "short.txt").write_text("the cat")
    refused: list[tuple[list[object], str]] = [
        (["nowhere"], "nowhere: no such folder"),
        ([copy, copy], "a model is given twice"),
        ([copy, copy / ".." / "copy"], "a model is given twice"),
        ([copy, "--length", 10**9], "fewer than one window of 10"),
        ([place / "overlay"], "an overlay; `outlier-mlx convert` makes a tier from it"),
        ([copy, "--text", tmp_path / "binary.txt"], "binary.txt: not UTF-8 text"),
        ([copy, "--text", tmp_path / "short.txt"], "fewer than one window of 32"),
        ([copy, "--out", copy / "config.json"], "exists and is not a folder"),
        ([copy, "--out", copy], "copy: is an input, so it cannot be the output"),
        ([copy, "--out", copy / "config.json" / "below"], "cannot write there"),
        ([parallel], "parallel: invalid model"),
        ([copy, "--threshold", "inf"], "--threshold"),
    ]
    for arguments, message in refused:
        shown = run(*command(place), "--out", out, *arguments, code=None)
        assert shown.code in (1, 2), (arguments, shown)
        assert message in shown.err, (message, shown.err)
        assert shown.code == 2 or shown.err.count("\n") == 1
        assert not out.exists()

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    shown = run(*command(place, "tier"), "--out", out, code=1)
    assert "pip install 'outlier-mlx[plots]', or --no-plots" in shown.err


def test_windows_are_exact_and_only_what_is_needed_is_read(place: Path, tmp_path: Path) -> None:
    _, tokenizer = load(place / "tier")
    path = place / "text.txt"
    whole = tokenizer.encode(path.read_text(encoding="utf-8"))
    for sequences, length, overlap in (
        (1, 2, 0),
        (3, 32, 0),
        (5, 20, 0.5),
        (4, 7, 0.99),
        (99, 64, 0),
    ):
        step = max(1, round(length * (1 - overlap)))
        expected = [whole[at : at + length] for at in range(0, len(whole) - length + 1, step)]
        found = read_windows(tokenizer, path, sequences, length, overlap)
        assert found == expected[:sequences]
    # A file whose later part is no text: it is not looked at.
    (tmp_path / "long.txt").write_bytes(TEXT.encode() * 200 + b"\xff" * 100)
    assert read_windows(tokenizer, tmp_path / "long.txt", 3, 32) == read_windows(
        tokenizer, path, 3, 32
    )
    with pytest.raises(OutlierError, match=r"the text has \d+ tokens, fewer than one window of"):
        read_windows(tokenizer, path, 1, len(whole) + 1)


def test_heatmaps_of_wide_models_lose_no_hit() -> None:
    """With more dimensions than columns, a column shows the largest of several."""
    values = np.zeros((2, 2051))
    values[0, [0, 1500, 2050]] = 1, 2, 3
    each, columns = narrowed(values, 1024)
    assert (each, columns.shape) == (3, (2, 684))
    assert {int(at): columns[0, at] for at in np.flatnonzero(columns[0])} == {0: 1, 500: 2, 683: 3}
    assert not columns[1].any()
    each, columns = narrowed(values, 2051)
    assert each == 1
    np.testing.assert_array_equal(columns, values)
