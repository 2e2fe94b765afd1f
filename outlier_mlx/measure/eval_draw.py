"""Pictures of scores against memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.eval_charts import Chart
from outlier_mlx.measure.labels import Labels, Named, write_names
from outlier_mlx.measure.pictures import drawable, picture, spread

#: Charts that one picture holds.
MOST_CHARTS = 12
# Sizes of which the largest is this many times the smallest are shown on a log scale.
_FAR_APART = 30


def check_number(found: Sequence[Chart]) -> None:
    """Check that a picture holds this many charts.

    Raises:
        OutlierError: there are too many.
    """
    if len(found) > MOST_CHARTS:
        raise OutlierError(
            f"{len(found)} charts are too many for a picture; --task and --metric choose some"
        )


def draw(found: Sequence[Chart], path: Path) -> None:
    """Draw scores with their standard errors against memory; the Pareto front is a line.

    Args:
        found: at most `MOST_CHARTS` charts.
        path: the picture to write.

    Raises:
        OutlierError: there are too many charts, matplotlib is not installed, or the file's suffix
            is not that of a picture.
    """
    check_number(found)
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    width, height = (7.5, 5.0) if len(found) == 1 else (5.2 * columns, 4.2 * rows)
    with picture(path, width, height) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(found) :]:
            axes.axis("off")
        if any(point.on_front for chart in found for point in chart.points):
            legend = "blue: no other model is both smaller and better"
            figure.supxlabel(legend, fontsize=8, color="tab:blue")
        write_names(figure, [_draw(*chart) for chart in zip(found, grid, strict=False)], rows)


def _draw(chart: Chart, axes: Any) -> Named:
    """Draw everything but the names."""
    # Gigabytes, or for small models megabytes.
    unit, factor = ("GB", 1.0) if max(p.gb for p in chart.points) >= 0.1 else ("MB", 1e3)
    at = np.array([(point.gb * factor, point.value) for point in chart.points])
    errors = np.array([point.stderr or 0.0 for point in chart.points])
    for point, (x, y), error in zip(chart.points, at, errors, strict=True):
        color = "tab:gray" if point.on_front is False else "tab:blue"
        axes.errorbar(x, y, yerr=error or None, fmt="o", capsize=3, color=color)
    front = at[[bool(point.on_front) for point in chart.points]]
    front = front[np.lexsort(front.T[::-1])]
    axes.plot(*front.T, "--", color="tab:blue", lw=1)
    xs, ys = at.T
    spread(axes, "x", xs.min(), xs.max(), logarithmic=xs.max() > _FAR_APART * xs.min())
    logarithmic = "perplexity" in chart.metric and ys.min() > 0
    low, high = (ys - errors).min(), (ys + errors).max()
    # An error as large as the perplexity itself would reach down to where a log scale ends.
    spread(axes, "y", max(low, ys.min() / 2) if logarithmic else low, high, logarithmic=logarithmic)
    axes.set_title(drawable(chart.title))
    axes.set_xlabel(f"memory, {unit}")
    scale = ", log scale" if logarithmic else ""
    label = f"{drawable(chart.metric, 45)}\n({chart.direction}{scale})"
    axes.set_ylabel(label, linespacing=1.4)
    axes.grid()
    bars = [np.array([(x, y - e), (x, y + e)]) for (x, y), e in zip(at, errors, strict=True)]
    names = [drawable(point.label) for point in chart.points]
    return Named(axes, Labels(at, names), lines=[*bars, front])
