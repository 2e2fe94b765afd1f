"""Pictures of outlier features: hits by layer and dimension, and models beside published ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from outlier_mlx.measure.labels import Labels, Named, write_names
from outlier_mlx.measure.outlier_counts import Accumulator
from outlier_mlx.measure.outlier_published import FIRST, LATER, SPREAD
from outlier_mlx.measure.outlier_report import short_count
from outlier_mlx.measure.pictures import color_bar, drawable, picture, spread

# Columns of a heat map, at most; each then shows the largest value of several dimensions.
_COLUMNS = 1024
#: What models are compared by, and the label of that axis.
Against = Literal["active_params", "total_params", "perplexity"]
AXES: dict[Against, str] = {
    "active_params": "active parameters",
    "total_params": "parameters in all",
    "perplexity": "perplexity on the text",
}
_SHARES = {"layer_pct": "layers an outlier feature is in, %", "seq_pct": "positions it is at, %"}
_SETS = ((FIRST, "v", "published first"), (LATER, "s", "published later"))


def draw_heatmap(counts: Accumulator, name: str, dims: Sequence[int], path: Path) -> None:
    """Draw the share of positions that are hit, layer by dimension, attention and FFN apart.

    Args:
        counts: counts of a measured model.
        name: name of the model.
        dims: outlier features, to be marked.
        path: the picture to write.
    """
    from matplotlib.colors import PowerNorm

    share = 100 * counts.hits / counts.positions  # (probes, hidden)
    each, columns = narrowed(share, _COLUMNS)
    height = min(20.0, 2.5 + max(2.0, 0.14 * len(share)))
    with picture(path, 12, height) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        attention = np.array([probe.kinds == ("attention",) for probe in counts.probes])
        for axes, rows, title in (
            (panels[0], attention, "input of attention"),
            (
                panels[1],
                ~attention,
                "input of the feed-forward block (router and experts, where there are any)",
            ),
        ):
            image = axes.imshow(
                columns[rows],
                aspect="auto",
                interpolation="nearest",
                cmap="magma_r",
                # The square root makes shares of 1 % visible, too.
                norm=PowerNorm(0.5, vmin=0, vmax=100),
                extent=(-0.5, columns.shape[1] * each - 0.5, rows.sum() - 0.5, -0.5),
            )
            axes.set_ylabel("layer")
            axes.set_title(title, pad=10)
            marks = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            if len(dims):  # a line without points has no place, and the layout would fail
                axes.plot(dims, np.ones(len(dims)), "v", color="tab:red", markersize=5, **marks)
            axes.yaxis.get_major_locator().set_params(integer=True)
        of = f"; each column is the largest of {each}" if each > 1 else ""
        panels[1].set_xlabel(f"dimension (red: outlier features{of})")
        figure.suptitle(drawable(name, 100))
        color_bar(figure, image, panels, "positions hit, %")


def narrowed(values: np.ndarray, most: int) -> tuple[int, np.ndarray]:
    """Reduce (rows, n) to at most `most` columns, each the largest of a group of neighbours.

    Returns:
        The size of a group, and (rows, columns).
    """
    rows, n = values.shape
    each = -(-n // most)
    padded = np.pad(values, ((0, 0), (0, -n % each)))
    return each, padded.reshape(rows, -1, each).max(axis=2)


def draw_comparison(entries: Sequence[dict[str, Any]], against: Against, path: Path) -> None:
    """Draw `layer_pct` and `seq_pct` of measured models, with published ones as marks.

    Args:
        entries: models as `report.describe` has them.
        against: what is on the horizontal axis. Published models have no perplexity, as they were
            measured on another text.
        path: the picture to write.
    """
    with picture(path, 13, 5.5) as figure:
        panels = figure.subplots(1, 2)
        charts = [_draw(entries, against, *panel) for panel in zip(_SHARES, panels, strict=True)]
        if against != "perplexity":
            figure.legend(
                *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2
            )
        write_names(figure, charts)


def _draw(entries: Sequence[dict[str, Any]], against: Against, share: str, axes: Any) -> Named:
    """Draw everything but the names."""
    published = () if against == "perplexity" else _SETS
    marks = np.empty((0, 2))
    for models, marker, label in published:
        at = np.array([(getattr(model, against), getattr(model, share)) for model in models])
        # Published values are only approximate, so they are drawn with bars.
        axes.errorbar(
            *at.T,
            yerr=SPREAD,
            fmt=marker,
            color="0.55",
            markerfacecolor="none",
            capsize=2,
            linewidth=0.8,
            label=f"{label}, reference ±{SPREAD:g}",
        )
        marks = np.vstack([marks, at])
    ours = np.array([(entry[against], entry["blog"][share]) for entry in entries])
    for point in ours:
        axes.plot(*point, "o", markersize=8, zorder=3)
    xs = np.vstack([ours, marks])[:, 0]
    spread(axes, "x", xs.min(), xs.max(), logarithmic=True)
    if against != "perplexity":
        axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
    axes.set_ylim(-4, 105)
    axes.set_xlabel(f"{AXES[against]}, log scale")
    axes.set_ylabel(_SHARES[share])
    axes.grid()
    names = [drawable(entry["model"]) for entry in entries]
    # The later set has all models of the first, give or take.
    later = Labels(at, [model.model for model in LATER], size=6, color="0.4") if published else None
    bars = [np.array([(x, y - SPREAD), (x, y + SPREAD)]) for x, y in marks]
    return Named(axes, Labels(ours, names), others=later, marks=marks, lines=bars)
