"""The log of a training, and the picture that is drawn from it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.train.log import FILE, History, RunLog, as_line, read_log
from outlier_mlx.train.picture import draw

NAMES = ("cooking", "law", "keep")


def step(stage: str, number: int, loss: float = 3.0, steps: int = 40) -> dict[str, Any]:
    return {
        "event": "step",
        "stage": stage,
        "step": number,
        "steps": steps,
        "loss": loss,
        "parts": {"new": loss, "keep": loss / 30},
        "tokens_per_second": 812.5,
        "seconds_left": 12.0,
    }


def held_out(stage: str, number: int, **perplexity: float) -> dict[str, Any]:
    return {"event": "held_out", "stage": stage, "step": number, "perplexity": perplexity}


def ended(stage: str, after: dict[str, float], *, kept: bool = True) -> dict[str, Any]:
    before = dict.fromkeys(NAMES, 80.0)
    return {"event": "stage", "name": stage, "before": before, "after": after, "kept": kept}


def whole_run(domains: tuple[str, ...] = NAMES[:2], layers: int = 3) -> list[dict[str, Any]]:
    """The events of a run, as core has them."""
    events = [ended("begin", dict.fromkeys(NAMES, 80.0))]
    for domain in domains:
        title = f"experts of {domain}, layers 1 to {layers}"
        for at in (1, 20, 40):
            events.append(step(title, at, 4.5 - at / 20))
            events.append(held_out(title, at, **{domain: 80 - at, "keep": 80 + at / 10}))
        events.append(ended(title, {domain: 38.0, "keep": 81.0}, kept=domain != "law"))
    title = "routers, alphas and row scales"
    load = {n: {str(k): [0.5, 0.9, 0.4, 0.2] for k in range(1, layers + 1)} for n in NAMES}
    for at in (1, 20, 40):
        events.append(step(title, at, 2.5 - at / 80))
        told = held_out(title, at, **dict.fromkeys(NAMES, 40 - at / 4))
        events.append(told | {"load": {n: {"1": [1.0] * 4} for n in NAMES}, "windows": 16})
    end = ended(title, {"cooking": 30.0, "law": 31.0, "keep": 80.9})
    return [*events, end | {"load": load}]


def written(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text("".join(map(as_line, events)))
    return path


def test_events_are_written_and_passed_on(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    work = tmp_path / "work"
    log = RunLog(work, [heard.append])
    log.tell({"event": "data", "texts": []})
    assert not work.exists()  # the training makes it, and wants it empty
    work.mkdir()
    log(step("a", 1))
    log.tell({"event": "note"})
    lines = [json.loads(line) for line in (work / FILE).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["data", "step", "note"]
    assert lines == heard
    assert all(list(line)[:2] == ["event", "time"] for line in lines)
    assert abs(lines[0]["time"] - lines[1]["time"]) < 60


def test_a_resumed_run_has_one_history(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    first.tell({"event": "data"})
    for at in (1, 10, 20, 30):
        first(step("a", at, 5.0 - at / 10))
        first(held_out("a", at, keep=50.0 + at))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "step", "sta')  # killed
    heard: list[dict[str, Any]] = []
    second = RunLog(tmp_path, [heard.append])
    second.tell({"event": "data"})
    second(step("a", 21, 1.0))
    second(step("a", 40, 0.5))
    assert [event["event"] for event in heard] == ["data", "resumed", "step", "step"]
    lines = [json.loads(line)["event"] for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines.count("data") == 1
    assert lines[-3:] == ["resumed", "step", "step"]
    (stage,) = read_log(tmp_path / FILE).stages
    assert [at for at, _ in stage.losses] == [1, 10, 20, 21, 40]
    assert stage.losses[3][1]["new"] == 1.0
    assert [at for at, _ in stage.held_out] == [1, 10, 20]


def test_what_a_log_says(tmp_path: Path) -> None:
    history = read_log(written(tmp_path / FILE, whole_run()))
    assert history.before == dict.fromkeys(NAMES, 80.0)
    titles = [stage.title for stage in history.stages]
    assert titles[0] == "begin" and titles[-1].startswith("routers")
    assert [stage.steps for stage in history.stages] == [0, 40, 40, 40]
    assert [stage.kept for stage in history.stages] == [True, True, False, True]
    assert history.stages[1].after == {"cooking": 38.0, "keep": 81.0}
    assert history.stages[-1].load["law"]["2"] == [0.5, 0.9, 0.4, 0.2]


@pytest.mark.parametrize("line", ["{", "[]", '{"event": "step"}', "{}"])
def test_a_log_that_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(f"{as_line(step('a', 1))}{line}\n{as_line(step('a', 2))}")
    with pytest.raises(CheckpointError, match="line 2: no event of a training"):
        read_log(tmp_path / FILE)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_a_run(suffix: str, tmp_path: Path) -> None:
    history = read_log(written(tmp_path / FILE, whole_run()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(history, tmp_path / f"run.{suffix}")
    data = (tmp_path / f"run.{suffix}").read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is drawn from here on."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def saved(figure: Any, *given: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def test_what_is_drawn(tmp_path: Path, figures: list[Any]) -> None:
    draw(read_log(written(tmp_path / FILE, whole_run())), tmp_path / "run.png")
    losses, perplexity, load, *_ = figures[0].axes
    assert [text.get_text() for text in perplexity.get_legend().get_texts()] == list(NAMES)
    assert [text.get_text() for text in losses.texts] == [
        "experts of cooking",
        "experts of law (not kept)",
        "routers",
    ]
    assert losses.get_xlim() == (0, 120)
    ends = next(line for line in perplexity.lines if line.get_label() == "cooking")
    assert ends.get_xydata().tolist() == [[0, 80], [40, 38], [120, 30]]
    assert load.images[0].get_array().shape == (3, 12)
    assert load.images[0].get_array()[1, 1] == 90


def test_the_loss_of_a_stage_of_one_step_is_seen(tmp_path: Path, figures: list[Any]) -> None:
    events = [ended("begin", dict.fromkeys(NAMES, 80.0)), step("a", 1, steps=1)]
    draw(read_log(written(tmp_path / FILE, events)), tmp_path / "run.png")
    losses = figures[0].axes[0]
    assert [line.get_markersize() for line in losses.lines] == [3, 3]
    assert all(number == round(number) for number in losses.get_xticks())


def test_a_picture_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    events = whole_run()
    draw(read_log(written(tmp_path / FILE, events[:4])), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
    with pytest.raises(OutlierError, match="nothing to draw"):
        draw(read_log(written(tmp_path / FILE, events[:1])), tmp_path / "none.png")
    with pytest.raises(OutlierError, match="nothing to draw"):
        draw(History(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_many_layers_and_long_names(tmp_path: Path) -> None:
    names = tuple(f"{n}-a-rather-long-name-of-a-domain" for n in range(9))
    history = read_log(written(tmp_path / FILE, whole_run(names, layers=28)))
    draw(history, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
