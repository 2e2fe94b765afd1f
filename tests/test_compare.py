"""The command compare: scores of several evaluations against the memory they take."""

from __future__ import annotations

import json
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.measure.eval_charts import charts, on_front
from outlier_mlx.measure.eval_draw import draw
from outlier_mlx.measure.eval_results import Evaluation, read, save
from outlier_mlx.measure.eval_results import Result as Score
from outlier_mlx.measure.eval_tables import plot
from tests.program import assert_refused, run

CONFIG = {"tasks": ["quiz"], "limit": None, "num_fewshot": None, "seed": 1, "dtype": "float16"}


def evaluation(model: str, gb: float, **scores: float | None) -> Evaluation:
    """A made-up evaluation; metrics with "perplexity" in their name are better when lower."""
    results = [
        Score(
            task="quiz",
            metric=metric,
            filter="none",
            value=value,
            stderr=None if "perplexity" in metric else 0.02,
            n=100,
            higher_is_better="perplexity" not in metric,
            fewshot=0,
            task_version="1.0",
        )
        for metric, value in scores.items()
    ]
    versions = {"outlier-mlx": "0", "lm-eval": "0.4.13", "mlx": "0", "mlx-lm": "0"}
    date = "2026-01-01T00:00:00+00:00"
    return Evaluation(model, None, round(gb * 1e9), "gpu", date, versions, CONFIG, results)


MODELS = (
    evaluation("big", 14.0, acc=0.75, word_perplexity=7.0),
    evaluation("small", 4.0, acc=0.7, word_perplexity=8.0),
    evaluation("worse", 6.0, acc=0.65, word_perplexity=7.5),
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for model in MODELS:
        save(model, tmp_path / f"{model.model}.json")
    return [tmp_path / f"{model.model}.json" for model in MODELS]


def test_what_is_saved_is_read(files: list[Path]) -> None:
    assert tuple(map(read, files)) == MODELS
    raw = json.loads(files[1].read_text())
    assert raw["gb"] == 4.0
    assert [row["score_per_gb"] for row in raw["results"]] == [0.7 / 4, None]


def test_best_first_and_the_front_marked(files: list[Path]) -> None:
    done = run("compare", *files, "--json")
    assert done.err == ""
    acc, perplexity = done.json
    assert [(p["label"], p["on_front"]) for p in acc["points"]] == [
        ("big", True),
        ("small", True),
        ("worse", False),
    ]
    assert [(p["label"], p["on_front"]) for p in perplexity["points"]] == [
        ("big", True),
        ("worse", True),
        ("small", True),
    ]
    assert acc["points"][1]["score_per_gb"] == 0.7 / 4


def test_the_front() -> None:
    places = [(1.0, 0.5), (1.0, 0.6), (2.0, 0.6), (3.0, 0.9), (3.0, 0.9)]
    found = [on_front(place, places) for place in places]
    assert found == [False, True, False, True, True]  # the last two are equally good


def test_table_and_plot(files: list[Path]) -> None:
    done = run("compare", *files, "--metric", "acc", env={"COLUMNS": "60"})
    lines = done.out.splitlines()
    assert all(len(line) <= 60 for line in lines[:-1]) and "\x1b" not in done.out
    assert lines[0] == "quiz, acc (higher is better)"
    assert [line.split()[0] for line in lines[3:6]] == ["A*", "B*", "c"]
    assert lines[4].split() == ["B*", "small", "4.00", "GB", "0.7000", "0.0200", "0.175"]
    assert "word_perplexity" not in done.out
    narrow = run("compare", *files, "--metric", "acc", env={"COLUMNS": "34"}).out.splitlines()
    assert all(len(line) <= 34 for line in narrow[:-1])  # the legend is one line for pipes
    assert narrow[4].split() == ["B*", "small", "4.00", "GB", "0.7000"]


@pytest.mark.parametrize("width", [16, 48])
def test_every_model_has_its_place_in_the_plot(width: int) -> None:
    chart = charts(["a", "b", "c"], MODELS, metric="acc")[0]
    lines = plot(chart.points, "ABc", width)
    field = [line[12:].ljust(width) for line in lines if line[10:11] == "|"]
    assert {len(line) for line in field} == {width}
    at = {
        mark: (n, line.index(mark))
        for n, line in enumerate(field)
        for mark in "ABc"
        if mark in line
    }
    assert at["A"][1] == width - 1 and at["B"][1] == 0
    assert at["c"][1] == round((6 - 4) / (14 - 4) * (width - 1))
    assert at["A"][0] < at["B"][0] < at["c"][0]
    # 0.63 to 0.77 are 11 steps, so 0.72 is line 4 and 0.68 line 7; one in between has the letter.
    assert [n for n, line in enumerate(field) if line[0] in "|B"] == [4, 5, 6, 7]
    assert lines[0].split()[0] == "0.77" and lines[len(field) - 1].split()[0] == "0.63"
    assert lines[-1].split() == ["4.00", "GB", "14.00", "GB"]


def test_one_model_and_equal_ones_can_be_shown(files: list[Path], tmp_path: Path) -> None:
    alone = run("compare", files[0])
    assert "big" in alone.out
    twice = run("compare", files[0], files[0], "--json", "--out", tmp_path / "same.png")
    points = twice.json[0]["points"]
    assert [point["label"] for point in points] == ["big (big) 1", "big (big) 2"]
    assert all(point["on_front"] for point in points)
    run("compare", files[0], files[0])


def test_the_picture(files: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "scores.png"
    run("compare", *files, "--out", picture)
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1.5 * height > 500  # two charts, side by side
    again = run("compare", *files, "--out", picture, code=1)
    assert "--force replaces it" in again.err
    run("compare", *files, "--out", picture, "--force", "--quiet")
    wrong = run("compare", *files, "--out", tmp_path / "scores.jpg", code=2)
    assert ".png" in wrong.err


def test_a_picture_of_odd_names(tmp_path: Path) -> None:
    odd = replace(MODELS[0], model="$a\ud800\x1b\n" + "b" * 300)
    found = charts(["x"], [odd], task="quiz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(found, tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_the_extra(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("compare", *files, "--out", tmp_path / "scores.png", code=1)
    assert_refused(done, "pip install 'outlier-mlx[plots]'")
    assert not (tmp_path / "scores.png").exists()


def test_experts_left_out_are_a_difference(files: list[Path], tmp_path: Path) -> None:
    lossy = replace(MODELS[1], model="lossy", config=CONFIG | {"expert_skip": 0.2})
    save(lossy, tmp_path / "lossy.json")
    done = run("compare", files[0], tmp_path / "lossy.json")
    assert done.err == "warning: not run alike: expert skip: 0.0, 0.2\n"


def test_what_was_not_run_alike_is_told(files: list[Path], tmp_path: Path) -> None:
    result = MODELS[1].results[0]
    other = replace(
        MODELS[1],
        model="other",
        versions=MODELS[1].versions | {"lm-eval": "0.5"},
        config=CONFIG | {"limit": 10, "batch_size": 3},
        results=[replace(result, fewshot=5, n=10)],
    )
    save(other, tmp_path / "other.json")
    done = run("compare", files[0], tmp_path / "other.json")
    assert done.err.splitlines() == [
        'warning: not run alike: lm-eval version: "0.4.13", "0.5"',
        "warning: not run alike: limit: null, 10",
        "warning: not run alike: examples before a question of quiz: 0, 5",
        "warning: not run alike: documents of quiz: 100, 10",
    ]
    assert "perplexity" not in done.out  # which only one of them has
    assert run("compare", files[0], tmp_path / "other.json", "--quiet").err == ""


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in MODELS[0].as_json().items() if name != key}


FOREIGN: dict[str, Any] = {
    "no JSON": b"\x89PNG",
    "a list": [],
    "another's": {"results": {"quiz": {"acc,none": 0.5}}},
    "newer": without("") | {"format": "outlier-mlx evaluation 2"},
    "less": without("config"),
    "a text as number": without("") | {"bytes_in_memory": "14"},
    "no memory": without("") | {"bytes_in_memory": 0},
    "a truth as number": without("") | {"bytes_in_memory": True},
    "not finite": json.dumps(without("")).replace("0.75", "NaN").encode(),
    "larger than any float": json.dumps(without("")).replace("0.75", "9" * 400).encode(),
    "an error below zero": json.dumps(without("")).replace('"stderr": ', '"stderr": -').encode(),
    "more memory than there is": without("") | {"bytes_in_memory": 10**400},
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(files: list[Path], tmp_path: Path, name: str) -> None:
    raw = FOREIGN[name]
    (tmp_path / "x.json").write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    assert_refused(run("compare", files[0], tmp_path / "x.json", code=1), "x.json: ")


def test_nothing_in_common(files: list[Path], tmp_path: Path) -> None:
    save(evaluation("x", 1.0, f1=0.5, acc=None), tmp_path / "x.json")
    assert_refused(run("compare", files[0], tmp_path / "x.json", code=1), "no score in common")
    unknown = run("compare", *files, "--task", "other", code=1)
    assert_refused(unknown, "quiz acc and quiz word_perplexity")
    assert_refused(run("compare", tmp_path / "nowhere.json", code=1), "nowhere.json")
