"""What all pictures share: their files, style and scales, and labels that do not overlap.

matplotlib is imported when something is drawn. A command that will draw calls `check_picture` or
`require_matplotlib` before it measures anything.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from outlier_mlx.errors import OutlierError, listed, one_line
from outlier_mlx.storage.output import check_writable, whole_file
from outlier_mlx.upstream import pip_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: File formats of pictures, and how their files' names end.
Format = Literal["png", "svg", "pdf"]
SUFFIXES = tuple(f".{name}" for name in get_args(Format))
# Inches of a cell that has room for a number.
_CELL = (0.3, 0.18)
# Share of an axis that is left free at each end.
_ROOM = 0.15
_STYLE: dict[Any, Any] = {
    # A dollar sign in a name would begin a formula.
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "grid.color": "0.88",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "outlier-mlx",
}


def require_matplotlib(instead: str = "") -> None:
    """Check that pictures can be drawn.

    Args:
        instead: what else the user can do, for the message.

    Raises:
        OutlierError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OutlierError(
            f"pictures need matplotlib: {pip_install('outlier-mlx[plots]')}{instead}"
        ) from None


def check_suffix(path: Path) -> None:
    """Check that a picture's file name ends as one of `SUFFIXES`.

    Raises:
        OutlierError: it does not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutlierError(f"{path}: a picture's name must end in {listed(SUFFIXES, last='or')}")


def check_picture(path: Path, *, force: bool, sources: Iterable[str | Path | None] = ()) -> None:
    """Check that a picture can be drawn and written, before hours are spent on what it will show.

    Args:
        path: its file.
        force: it may be replaced if it exists.
        sources: what it is drawn from, see `check_writable`.

    Raises:
        OutlierError: its name ends in something else than `SUFFIXES`, it exists and `force` is not
            set, its folder is missing, or matplotlib is not installed.
    """
    check_suffix(path)
    check_writable(path, force=force, sources=sources)
    require_matplotlib()


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure that is written to a file when the block ends well, whole or not at all.

    Args:
        path: the file; its suffix is the format.
        width: in inches.
        height: in inches.

    Raises:
        OutlierError: the suffix is not one of `SUFFIXES`, or matplotlib is not installed.
    """
    check_suffix(path)
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower()[1:]
    # Equal pictures are equal files.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    # Scores may be as large as floats get, and ticks lie beyond them.
    quiet = np.errstate(all="ignore")
    with rc_context(_STYLE), warnings.catch_warnings(), quiet:
        # Names may have characters of any script, fonts have some: boxes are drawn for others.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=150)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        yield figure
        with whole_file(path) as part:
            figure.savefig(part, format=kind, metadata=undated)


def drawable(text: str, longest: int = 60) -> str:
    """Text of others, cut in its middle to `longest` characters: names often differ at the end."""
    line, half = one_line(text), longest // 2
    return line if len(line) <= longest else f"{line[: half - 1]}…{line[-half:]}"


def spread(
    axes: "Axes", which: Literal["x", "y"], low: float, high: float, *, logarithmic: bool
) -> None:
    """Set an axis's limits, with room at both ends, and its scale, with plain numbers.

    Args:
        axes: axes of a picture.
        which: the axis.
        low: the least that is shown; above 0 for a log scale.
        high: the most that is shown; it may be the same.
        logarithmic: use a log scale.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.autoscale(False)
    if not logarithmic:
        room = _ROOM * (high - low) or 0.1 * abs(low) or 1.0
        axes.set(**{f"{which}lim": (low - room, high + room)})
        return
    first, last = log10(low), log10(high)
    room = _ROOM * (last - first) or 0.05
    # Floats end at some 1e308.
    first, last = max(first - room, -306), min(last + room, 306)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (10.0**first, 10.0**last)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    if last - first < 1:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last - first < 3 else (1,)))
    axis.set_minor_locator(NullLocator())
    digits = max(6, 3 - floor(log10(last - first)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))


def heat_map(
    path: Path, values: np.ndarray, rows: Sequence[str], names: tuple[str, str, str]
) -> None:
    """Draw a heat map from 0 up; where a cell has room for it, with its number.

    Args:
        path: the picture to write.
        values: (rows, columns), 0 or more.
        rows: a name for each row; columns are numbered from 0.
        names: names of the columns' axis, the rows' axis and the values.

    Raises:
        OutlierError: as `picture`.
    """
    height, width = values.shape
    cell = min(0.5, 12 / width), min(0.3, 16 / height)  # inches
    inches = max(3.5, width * cell[0] + 1.6), max(2.4, height * cell[1] + 0.9)
    with picture(path, *inches) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        _number(axes.xaxis, [str(column) for column in range(width)], cell[0], 0.25)
        _number(axes.yaxis, rows, cell[1], 0.16)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        color_bar(figure, image, axes, names[2])
        if cell[0] >= _CELL[0] and cell[1] >= _CELL[1]:
            for (row, column), value in np.ndenumerate(values):
                axes.text(
                    column,
                    row,
                    f"{value:.0f}" if value >= 9.95 or not value else f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black"
                    if _luminance(np.array(image.to_rgba(value)[:3])) > 0.179
                    else "white",
                )


def _luminance(color: np.ndarray) -> float:
    """WCAG 2's relative luminance of an sRGB colour; at 0.179 black and white contrast alike."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def color_bar(figure: "Figure", image: Any, axes: Any, label: str) -> None:
    """Add a bar that tells what colours mean, equally wide in pictures of any size.

    Args:
        figure: the picture.
        image: what is coloured.
        axes: one or several, beside which it stands.
        label: what is measured.
    """
    width, height = figure.get_size_inches()
    figure.colorbar(image, ax=axes, label=label, fraction=0.2 / width, aspect=height / 0.15)


def _number(axis: "Axis", names: Sequence[str], cell: float, room: float) -> None:
    """Name the cells along an axis, or every so many of them, since a name needs some inches."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if step * cell >= room)
    axis.set_ticks(range(0, len(names), step), names[::step])
