"""What all pictures share: their files, style and scales, and labels that do not overlap.

matplotlib is imported when something is drawn. A command that will draw calls `check_picture` or
`require_matplotlib` before it measures anything.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, get_args

from outlier_mlx.errors import OutlierError, listed, one_line
from outlier_mlx.storage.output import check_writable, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: File formats of pictures, and how their files' names end.
Format = Literal["png", "svg", "pdf"]
SUFFIXES = tuple(f".{name}" for name in get_args(Format))
# Characters of a name in a picture.
_LONGEST = 60
_STYLE: dict[Any, Any] = {
    # A dollar sign in a name would begin a formula.
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "grid.alpha": 0.3,
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
            f"pictures need matplotlib: pip install 'outlier-mlx[plots]'{instead}"
        ) from None


def check_suffix(path: Path) -> None:
    """Check that a picture's file name ends as one of `SUFFIXES`.

    Raises:
        OutlierError: it does not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutlierError(f"{path}: a picture's name must end in {listed(SUFFIXES, last='or')}")


def check_picture(path: Path, *, force: bool) -> None:
    """Check that a picture can be drawn and written, before hours are spent on what it will show.

    Raises:
        OutlierError: its name ends in something else than `SUFFIXES`, it exists and `force` is not
            set, its folder is missing, or matplotlib is not installed.
    """
    check_suffix(path)
    check_writable(path, force=force)
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
    with rc_context(_STYLE), warnings.catch_warnings():
        # Names may have characters of any script, fonts have some: boxes are drawn for others.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        yield figure
        with whole_file(path) as part:
            figure.savefig(part, format=kind, metadata=undated)


def drawable(text: str, columns: int = _LONGEST) -> str:
    """Text of others, cut to what there is room for, in lines of so many columns."""
    line = one_line(text)
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return "\n".join(wrap(line, columns)) or line


def log_scale(axes: "Axes", which: Literal["x", "y"], low: float, high: float) -> None:
    """Give an axis a log scale that shows plain numbers, however narrow or wide it is.

    Args:
        axes: of a picture.
        which: the axis.
        low: where it begins, above 0.
        high: where it ends, above `low`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    if high / low < 12:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
