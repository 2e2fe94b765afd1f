"""A picture of a training: loss, held-out perplexity of each text, and where its tokens went."""

from collections.abc import Iterator
from itertools import groupby, pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.pictures import drawable, picture
from outlier_mlx.train.log import History, StageHistory

_WIDTH = 11.0
# Inches of a letter of a stage's name.
_LETTER = 0.062
_PARTS = {"new": "text of the domains", "keep": "divergence from the base\non the text to keep"}
# Where legends are: beside the axes, so that they cover nothing.
_BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
# Layers whose whole name has room below the panel of load; of more, the numbers have.
_NAMED_LAYERS, _NUMBERED_LAYERS = 8, 24


def draw(history: History, path: Path) -> None:
    """Draw what a log says.

    Args:
        history: of the log.
        path: the picture to write.

    Raises:
        OutlierError: nothing was trained yet, or as `measure.pictures.picture`.
    """
    stages = [stage for stage in history.stages if stage.steps]
    if not any(stage.losses for stage in stages):
        raise OutlierError(f"{path}: nothing to draw: the log has no step")
    from matplotlib.ticker import MaxNLocator

    starts = np.cumsum([0, *(stage.steps for stage in stages)])
    load = next((stage.load for stage in reversed(stages) if stage.load), {})
    heights = [3.0, 3.0, *([0.8 + 0.34 * len(load)] if load else [])]
    with picture(path, _WIDTH, sum(heights) + 1) as figure:
        panels = figure.subplots(len(heights), 1, height_ratios=heights)
        _draw_losses(panels[0], stages, starts)
        _draw_held_out(panels[1], history, stages, starts)
        for axes in panels[:2]:
            _mark_stages(axes, stages, starts)
            axes.set_xlim(0, starts[-1])
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _name_stages(panels[0], stages, starts)
        panels[1].set_xlabel("step")
        if load:
            _draw_load(figure, panels[2], load)


def _draw_losses(axes: Any, stages: list[StageHistory], starts: np.ndarray) -> None:
    names = dict.fromkeys(name for stage in stages for _, parts in stage.losses for name in parts)
    few = any(len(stage.losses) == 1 for stage in stages)
    for name in names:
        # A point without a number parts the lines of two stages.
        points = [
            point
            for stage, start in zip(stages, starts[:-1], strict=True)
            for point in (
                *((start + step, parts.get(name, nan)) for step, parts in stage.losses),
                (start + stage.steps, nan),
            )
        ]
        label = _PARTS.get(name, drawable(name))
        # A line of a single point is nothing without its marker.
        _line(axes, points, label=label, linewidth=1, marker=".", markersize=3 if few else 0)
    _plain_log_scale(axes)
    axes.set_ylabel("loss, nats")
    axes.legend(**_BESIDE)


def _draw_held_out(
    axes: Any, history: History, stages: list[StageHistory], starts: np.ndarray
) -> None:
    names = dict.fromkeys(
        [
            *history.before,
            *(name for stage in stages for _, found in stage.held_out for name in found),
        ]
    )
    for number, name in enumerate(names):
        color = f"C{number % 10}"
        points: list[tuple[float, float]] = []
        ends: list[tuple[float, float]] = []
        if name in history.before:
            ends.append((0, history.before[name]))
        for stage, start in zip(stages, starts[:-1], strict=True):
            points += [(start + step, found.get(name, nan)) for step, found in stage.held_out]
            points.append((start + stage.steps, nan))
            if name in stage.after:
                ends.append((start + stage.steps, stage.after[name]))
        _line(axes, points, color=color, linewidth=1, marker=".", markersize=3)
        _line(
            axes,
            ends,
            color=color,
            marker="o",
            markersize=5,
            linestyle=":",
            linewidth=0.8,
            clip_on=False,
            label=drawable(name, 40),
        )
    _plain_log_scale(axes)
    axes.set_ylabel("held-out perplexity")
    title = "points: windows that decide\nlines: some of them"
    axes.legend(**_BESIDE, title=title, title_fontsize=7)


def _plain_log_scale(axes: Any) -> None:
    """A log scale with some plain numbers, also within one power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _line(axes: Any, points: list[tuple[float, float]], **style: Any) -> None:
    if points:
        axes.plot(*np.array(points).T, **style)


def _mark_stages(axes: Any, stages: list[StageHistory], starts: np.ndarray) -> None:
    for number, (start, stop) in enumerate(pairwise(starts)):
        if number % 2:
            axes.axvspan(start, stop, color="0.96", zorder=0)
        if not stages[number].kept:
            axes.axvspan(start, stop, facecolor="none", edgecolor="0.8", hatch="///", zorder=0)


def _name_stages(axes: Any, stages: list[StageHistory], starts: np.ndarray) -> None:
    """Write the stages' names above, where there is room; one for neighbours of the same name."""
    for name, start, stop in _names(stages, starts):
        room = (stop - start) / starts[-1] * (_WIDTH - 2.5)
        if len(name) * _LETTER <= room:
            axes.annotate(
                name,
                ((start + stop) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
            )


def _names(stages: list[StageHistory], starts: np.ndarray) -> Iterator[tuple[str, float, float]]:
    def name(number: int) -> str:
        short = drawable(stages[number].title.partition(",")[0], 40)
        return short if stages[number].kept else f"{short} (not kept)"

    for short, of in groupby(range(len(stages)), name):
        numbers = list(of)
        yield short, starts[numbers[0]], starts[numbers[-1] + 1]


def _draw_load(figure: Any, axes: Any, load: dict[str, dict[str, list[float]]]) -> None:
    """Draw the share of each text's tokens that used each expert of each layer."""
    layers = list(dict.fromkeys(layer for of in load.values() for layer in of))
    rows = [[share for layer in layers for share in of[layer]] for of in load.values()]
    shares = 100 * np.array(rows)
    count = shares.shape[1] // len(layers)
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for number in range(1, len(layers)):
        axes.axvline(number * count - 0.5, color="white", linewidth=2)
    each = -(-len(layers) // _NUMBERED_LAYERS)
    word = "layer " if len(layers) <= _NAMED_LAYERS else ""
    axes.set_xticks(
        [number * count + (count - 1) / 2 for number in range(0, len(layers), each)],
        [f"{word}{layer}" for layer in layers[::each]],
    )
    axes.set_yticks(range(len(load)), [drawable(name, 40) for name in load])
    axes.tick_params(length=0)
    axes.set_xlabel(f"layers, with experts 0 to {count - 1} in each")
    # Where the other panels have their legends: constrained layout would put it beyond these.
    figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.015, 1)), label="tokens, %")
