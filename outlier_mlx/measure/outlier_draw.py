"""Pictures: one model's hits by dimension and layer, and models beside published ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from outlier_mlx.measure.outlier_accumulate import Accumulator
from outlier_mlx.measure.outlier_published import FIRST, LATER, SPREAD, Published
from outlier_mlx.measure.pictures import picture

# Columns of a heat map; wider models show the largest value of several dimensions in each.
_COLUMNS = 1024
#: What models are compared by, and how the axis is called.
Against = Literal["active_params", "total_params", "perplexity"]
AXES: dict[Against, str] = {
    "active_params": "active parameters",
    "total_params": "parameters in all",
    "perplexity": "perplexity on the text",
}
_SHARES = {"layer_pct": "layers an outlier feature is in, %", "seq_pct": "positions it is at, %"}
_SETS = ((FIRST, "v", "published first"), (LATER, "s", "published later"))


def draw_heatmap(counts: Accumulator, name: str, dims: Sequence[int], path: Path) -> None:
    """Draw the share of positions that are hit, layer by dimension, attention and FFN apart (PNG).

    Args:
        counts: of a measured model.
        name: the model's.
        dims: outlier features, which are marked.
        path: the file to write.
    """
    from matplotlib.colors import PowerNorm

    share = 100 * counts.hits / counts.positions  # (probes, hidden)
    each, columns = narrowed(share, _COLUMNS)
    height = 2.5 + max(2.0, 0.14 * len(share))
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
                # A share of 1 % is a find, too: the square root lets it be seen.
                norm=PowerNorm(0.5, vmin=0, vmax=100),
                extent=(-0.5, columns.shape[1] * each - 0.5, rows.sum() - 0.5, -0.5),
            )
            axes.set_ylabel("layer")
            axes.set_title(title, fontsize="medium")
            for dim in dims:
                axes.axvline(dim, ymin=1.0, ymax=1.05, clip_on=False, color="tab:red", linewidth=1)
            axes.yaxis.get_major_locator().set_params(integer=True)
        of = f"; each column is the largest of {each}" if each > 1 else ""
        panels[1].set_xlabel(f"dimension (red: outlier features{of})")
        figure.suptitle(name)
        figure.colorbar(image, ax=panels, label="positions hit, %")


def narrowed(values: np.ndarray, most: int) -> tuple[int, np.ndarray]:
    """Bring (rows, n) to at most `most` columns, each the largest of as many neighbours.

    Returns:
        How many neighbours, and (rows, columns).
    """
    rows, n = values.shape
    each = -(-n // most)
    padded = np.pad(values, ((0, 0), (0, -n % each)))
    return each, padded.reshape(rows, -1, each).max(axis=2)


def draw_comparison(entries: Sequence[dict[str, Any]], against: Against, path: Path) -> None:
    """Draw `layer_pct` and `seq_pct` of measured models (PNG), with published ones as marks.

    Args:
        entries: models as `report.describe` has them.
        against: what is on the horizontal axis. Published models have no perplexity, as they were
            measured on another text.
        path: the file to write.
    """
    with picture(path, 13, 5.5) as figure:
        for axes, (share, title) in zip(figure.subplots(1, 2), _SHARES.items(), strict=True):
            if against != "perplexity":
                for models, marker, label in _SETS:
                    _draw_published(axes, models, against, share, marker, label)
            for entry in entries:
                x, y = entry[against], entry["blog"][share]
                axes.plot(x, y, "o", markersize=9, zorder=3, clip_on=False, label=entry["model"])
                axes.annotate(
                    entry["model"], (x, y), (6, 6), textcoords="offset points", fontsize=8
                )
            axes.set_xscale("log")
            axes.margins(x=0.12)
            axes.set_ylim(0, 105)
            axes.set_xlabel(AXES[against])
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _draw_published(
    axes: Any, models: Sequence[Published], against: Against, share: str, marker: str, label: str
) -> None:
    xs = [getattr(model, against) for model in models]
    ys = [getattr(model, share) for model in models]
    # The marks say where others found a model, give or take: hence the bars.
    axes.errorbar(
        xs,
        ys,
        yerr=SPREAD,
        fmt=marker,
        color="0.55",
        markerfacecolor="none",
        capsize=2,
        linewidth=0.8,
        label=f"{label}, reference ±{SPREAD:g}",
    )
    if models is not LATER:  # which has all of them
        return
    order = sorted(zip(ys, xs, [model.model for model in models], strict=True))
    for number, (y, x, name) in enumerate(order):
        # Neighbours in height are written on different sides.
        side, where = ("left", 5) if number % 2 else ("right", -5)
        axes.annotate(
            name,
            (x, y),
            (where, 2),
            textcoords="offset points",
            ha=side,
            fontsize=6,
            color="0.4",
        )
