"""Pictures: their files, what is refused before any work, and that nothing in them overlaps."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.measure.eval_charts import Chart, Point
from outlier_mlx.measure.eval_draw import draw as draw_charts
from outlier_mlx.measure.labels import arrange
from outlier_mlx.measure.outlier_draw import draw_comparison, draw_heatmap
from outlier_mlx.measure.pictures import check_picture
from outlier_mlx.measure.routing import LayerRouting
from outlier_mlx.measure.routing import draw as draw_routing
from tests.marks import slow_but
from tests.program import run

BEGINNINGS = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def saved(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield figures


def chart(
    places: list[tuple[float, float]], names: list[str] | None = None, metric: str = "acc"
) -> Chart:
    names = names or [f"model-{number}" for number in range(len(places))]
    points = [
        Point(name, gb, value, None if "perplexity" in metric else 0.02, 100, None, number % 2 == 0)
        for number, (name, (gb, value)) in enumerate(zip(names, places, strict=True))
    ]
    return Chart("quiz", metric, "none", "perplexity" not in metric, points)


def routing(layers: int, experts: int) -> list[LayerRouting]:
    rng = np.random.default_rng(layers)
    shares = np.minimum(1, 2 * rng.dirichlet(np.ones(experts), layers))
    return [LayerRouting(n, 9, share.tolist(), [], []) for n, share in enumerate(shares)]


def entry(name: str, params: float, share: float) -> dict[str, Any]:
    blog = {"layer_pct": share, "seq_pct": share}
    return {"model": name, "active_params": params, "total_params": params, "blog": blog}


def boxes(texts: list[Any]) -> np.ndarray:
    """Where texts are, without the lines that join them with points."""
    from matplotlib.text import Text

    return np.array([Text.get_window_extent(text).extents for text in texts])


def overlapping(boxes: np.ndarray) -> int:
    a, b = boxes[:, None], boxes[None]
    pairs = (a[..., :2] < b[..., 2:]).all(-1) & (b[..., :2] < a[..., 2:]).all(-1)
    return int(pairs.sum() - len(boxes)) // 2


def names_in(axes: Any) -> list[Any]:
    """The texts at points: no list below the axes."""
    return [text for text in axes.texts if "\n" not in text.get_text()]


def assert_legible(figure: Any) -> None:
    """No name overlaps another, or a point that has a name, or the edge of its axes."""
    for axes in figure.axes:
        texts = names_in(axes)
        found = boxes(texts)
        assert overlapping(found) == 0
        edge = axes.get_window_extent().extents
        assert (found[:, :2] >= edge[:2]).all() and (found[:, 2:] <= edge[2:]).all()
        points = np.array([axes.transData.transform(text.xy) for text in texts])
        inside = (found[:, None, :2] < points) & (points < found[:, None, 2:])
        assert not inside.all(-1).any()


def assert_nothing_cut_off(figure: Any) -> None:
    width, height = figure.bbox.size
    with np.errstate(all="ignore"):
        tight = figure.get_tightbbox().extents * figure.dpi
    assert tight[0] >= 0 and tight[1] >= 0 and tight[2] <= width and tight[3] <= height


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_the_suffix_is_the_format(tmp_path: Path, suffix: str) -> None:
    for number, name in enumerate((f"a.{suffix}", f"b.{suffix.upper()}", f"a.b.{suffix}")):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        draw_routing(routing(2, 4), path)
        assert path.read_bytes().startswith(BEGINNINGS[suffix])
        assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_equal_pictures_are_equal_files(tmp_path: Path, suffix: str) -> None:
    charts = [chart([(1, 0.5), (2, 0.6)])]
    for name in "ab":
        draw_charts(charts, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_other_suffixes_are_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("scores.jpg", "scores", "png", ".png"):
        shown = run("compare", "missing.json", "--out", tmp_path / name, code=2)
        for suffix in BEGINNINGS:
            assert f".{suffix}" in shown.err
        with pytest.raises(OutlierError, match=r"must end in .png, .svg or .pdf"):
            draw_routing(routing(1, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(OutputExistsError, match="--force replaces it"):
        check_picture(tmp_path / "a.png", force=False)
    check_picture(tmp_path / "a.png", force=True)
    with pytest.raises(OutlierError, match="no such folder"):
        check_picture(tmp_path / "none" / "a.png", force=True)


def test_matplotlib_is_missed_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "text.txt").write_text("text")
    text, out = ["--text", tmp_path / "text.txt"], tmp_path / "out"
    for command, hint in (
        (["compare", "missing.json", "--out", tmp_path / "a.svg"], ""),
        (["routing", "missing", *text, "--out", out], ", or --no-plots"),
        (["outliers", "missing", *text, "--out", out], ", or --no-plots"),
    ):
        shown = run(*command, code=1)
        assert shown.err == (
            f"error: pictures need matplotlib: pip install 'outlier-mlx[plots]'{hint}\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_routing_writes_a_folder_once(small_tier: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    out = tmp_path / "out"
    command = ["routing", small_tier, "--text", tmp_path / "text.txt", "--out", out, "--quiet"]
    run(*command, "--window", 16, "--windows", 1, "--plots", "svg")
    assert sorted(path.name for path in out.iterdir()) == ["routing.json", "routing.svg"]
    again = run("routing", "missing", *command[2:], code=1)  # before the model is looked for
    assert again.err == f"error: {out / 'routing.json'}: exists; --force replaces it\n"
    run(*command, "--window", 16, "--windows", 1, "--force", "--no-plots")
    assert [path.name for path in out.iterdir()] == ["routing.json"]


@pytest.mark.parametrize("models", slow_but([2, 12], [1, 2, 5, 12]))
@pytest.mark.parametrize("long", slow_but([True], [False, True]))
@pytest.mark.parametrize("equal", [False, True])
def test_names_in_charts_overlap_nothing(
    tmp_path: Path, drawn: list[Any], models: int, long: bool, equal: bool
) -> None:
    rng = np.random.default_rng(models)
    names = [f"{'organisation/A-long-name-' * 2 * long}model-{n}" for n in range(models)]
    places = [(14.0, 0.7)] * models if equal else list(zip(*rng.random((2, models)), strict=True))
    draw_charts([chart(places, names), chart(places, names, "perplexity")], tmp_path / "a.png")
    (figure,) = drawn
    assert_legible(figure)
    assert_nothing_cut_off(figure)
    for axes in figure.axes:
        written = [text.get_text() for text in names_in(axes)]
        assert len(written) == models
        listed = [text.get_text() for text in axes.texts if text not in names_in(axes)]
        if written != [name for name in written if "model" in name]:
            # Numbers at the points, and below which number is which model.
            assert written == [str(number) for number in range(1, models + 1)]
            assert [line.split()[0] for line in listed[0].split("\n")] == written
            assert all(f"model-{n}" in listed[0] for n in range(models))


def test_names_of_measured_and_published_models_overlap_nothing(
    tmp_path: Path, drawn: list[Any]
) -> None:
    rng = np.random.default_rng(0)
    entries = [entry(f"model-{n}", 1e9 * 50 ** rng.random(), 100 * rng.random()) for n in range(6)]
    draw_comparison([*entries, entry("none found", 2e9, 0.0)], "active_params", tmp_path / "a.png")
    (figure,) = drawn
    assert_legible(figure)
    assert_nothing_cut_off(figure)
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        texts = [text.get_text() for text in axes.texts]
        assert {"none found", "Mixtral-8x7B", "GLM-4.5-Air"} <= set(texts)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.floats(5, 250))
def test_arranged_names_overlap_nothing(seed: int, count: int, width: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(20, 280, (count, 2)).round(-1)
    sizes = np.stack([rng.uniform(5, width, count), np.full(count, 8.0)], axis=1)
    placed = arrange(points, sizes, (0, 0, 300, 300), points, np.empty((0, 2)))
    good = placed.boxes[~placed.clash]
    assert np.allclose(placed.boxes[:, 2:] - placed.boxes[:, :2], sizes)
    assert overlapping(good) == 0
    assert (good >= 0).all() and (good <= 300).all()
    inside = (good[:, None, :2] < points) & (points < good[:, None, 2:])
    assert not inside.all(-1).any()
    if width <= 10:
        assert not placed.clash.any()


def ticks(axis: Any) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1.get_text() for tick in shown]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((7.0, 9.0), {"7", "8", "9"}),
        ((1.0001, 1e7), {"1", "100", "10000", "1e+06"}),
        ((8.00001, 8.00002), {"8.00001", "8.00002"}),
        ((2.0, 90.0), {"2", "5", "10", "20", "50", "100"}),
    ],
)
def test_perplexities_are_on_a_log_scale_with_plain_numbers(
    tmp_path: Path, drawn: list[Any], values: tuple[float, float], expected: set[str]
) -> None:
    places = [(1.0, values[0]), (2.0, values[1])]
    draw_charts([chart(places, metric="word_perplexity"), chart(places)], tmp_path / "a.png")
    perplexity, accuracy = drawn[0].axes
    assert perplexity.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    assert "log scale" in perplexity.get_ylabel() and "log" not in accuracy.get_ylabel()
    found = ticks(perplexity.yaxis)
    assert expected <= set(found) and len(found) == len(set(found))


def test_extreme_values_are_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    for number, places in enumerate(
        ([(1e-9, -1e299), (9e9, 1e299)], [(0.001, 0.0), (800.0, 0.0)], [(3e-4, 1e-300), (1, 1e299)])
    ):
        draw_charts([chart(places), chart(places, metric="perplexity")], tmp_path / "a.png")
        assert drawn[number].axes[0].get_xscale() == "log"  # sizes that are far apart
        assert_nothing_cut_off(drawn[number])


def test_small_models_are_in_megabytes(tmp_path: Path, drawn: list[Any]) -> None:
    draw_charts([chart([(0.0009, 0.5), (0.002, 0.6)])], tmp_path / "a.png")
    assert drawn[0].axes[0].get_xlabel() == "memory, MB"
    assert "1" in {tick.rstrip("0").rstrip(".") for tick in ticks(drawn[0].axes[0].xaxis)}


@pytest.mark.slow
def test_names_of_any_script_are_drawn_without_a_warning(tmp_path: Path, drawn: list[Any]) -> None:
    names = ["模型-千问 $x^2$", "\U0001f600 ไทย", "العربية \\frac{a}", "\ud800\x1b\n$"]
    for suffix in BEGINNINGS:
        places = [(float(n), 0.5 + n / 9) for n in range(1, 5)]
        draw_charts([chart(places, names)], tmp_path / f"a.{suffix}")
    assert "模型-千问 $x^2$" in [text.get_text() for text in drawn[0].axes[0].texts]


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (1, 2), (4, 8), (28, 8), (80, 4)])
def test_numbers_in_the_cells_of_a_small_heat_map(
    tmp_path: Path, drawn: list[Any], layers: int, experts: int
) -> None:
    shares = routing(layers, experts)
    draw_routing(shares, tmp_path / "a.png")
    figure = drawn[0]
    axes = figure.axes[0]
    assert len(axes.texts) == layers * experts
    (image,) = axes.images
    for text, share in zip(axes.texts, np.ravel([layer.share for layer in shares]), strict=True):
        assert abs(float(text.get_text()) - 100 * share) <= 0.5
        # WCAG 2's contrast ratio; 4.5 is its least for text.
        color = np.array(image.to_rgba(100 * share)[:3])
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        light = linear @ (0.2126, 0.7152, 0.0722)
        contrast = 1.05 / (light + 0.05) if text.get_color() == "white" else (light + 0.05) / 0.05
        assert contrast >= 4.5
    cell = axes.get_window_extent().size / (experts, layers)
    found = boxes(axes.texts)
    assert (found[:, 2:] - found[:, :2] <= cell).all()
    assert_nothing_cut_off(figure)


@pytest.mark.parametrize(
    ("layers", "experts"),
    slow_but([(48, 64), (2, 256)], [(48, 64), (64, 128), (2, 256), (300, 8)], names=2),
)
def test_large_heat_maps_have_no_numbers_and_a_size_that_can_be_looked_at(
    tmp_path: Path, drawn: list[Any], layers: int, experts: int
) -> None:
    draw_routing(routing(layers, experts), tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert not axes.texts
    assert max(drawn[0].get_size_inches()) <= 18
    for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
        labels = boxes([tick.label1 for tick in axis.get_major_ticks()])
        starts, ends = np.sort(labels[:, side]), np.sort(labels[:, side + 2])
        assert (starts[1:] > ends[:-1]).all()
    assert_nothing_cut_off(drawn[0])


@pytest.mark.parametrize("dims", [[], [3, 90]])
def test_heat_maps_of_models_with_and_without_outlier_features(
    tmp_path: Path, drawn: list[Any], dims: list[int]
) -> None:
    probes = [SimpleNamespace(kinds=(kind,)) for kind in ("attention", "ffn") * 4]
    counts: Any = SimpleNamespace(hits=np.ones((8, 128)), positions=100, probes=probes)
    draw_heatmap(counts, "tier", dims, tmp_path / "a.png")
    panels = [axes.get_window_extent() for axes in drawn[0].axes[:2]]
    height = drawn[0].bbox.height
    assert all(panel.height > height / 4 for panel in panels)
    assert_nothing_cut_off(drawn[0])
