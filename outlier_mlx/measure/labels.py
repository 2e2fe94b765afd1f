"""Names beside the points of a chart, placed so that nothing overlaps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Around a point, first to the right; each is tried nearer and farther.
_ANGLES = np.arange(24) * (2 * np.pi / 24) + np.pi / 8
#: Distances between a point and its name, in points of 1/72 inch. Beyond the first a line joins
#: the two.
_DISTANCES = (6, 11, 17, 24, 32, 42, 54, 68, 84)
# Half the width of a point's mark, and room around a name, in points of 1/72 inch.
_MARK, _ROOM = 4.0, 1.5
# Inches of a line of a list below a chart, and where the first begins, in points of 1/72 inch.
_LINE, _BELOW = 0.15, 34
_FIGURE_SPACE = "\u2007"  # as wide as a digit


@dataclass(frozen=True)
class Placed:
    """Where names go.

    Attributes:
        boxes: (n, 4), left, bottom, right and top.
        clash: (n,), whether a name found no room and overlaps something.
        joined: (n,), whether it is so far from its point that a line should join them.
    """

    boxes: np.ndarray
    clash: np.ndarray
    joined: np.ndarray


def arrange(
    points: np.ndarray,
    sizes: np.ndarray,
    field: Sequence[float],
    marks: np.ndarray,
    lines: np.ndarray,
) -> Placed:
    """Find room for names, one after another, each as near to its point as may be.

    All lengths are in one unit, points of 1/72 inch.

    Args:
        points: (n, 2), what is named.
        sizes: (n, 2), width and height of the names.
        field: left, bottom, right and top of where names may be.
        marks: (m, 2), all points that are drawn, these and others.
        lines: (k, 2), places on lines, which names only avoid where they can.
    """
    taken = np.hstack([marks - _MARK, marks + _MARK])  # (m, 4)
    threads = np.empty((0, 2))  # on lines from points to their names
    boxes, clash, joined = [], [], []
    for point, size in zip(points, sizes, strict=True):
        near = np.repeat(_DISTANCES, len(_ANGLES))
        angle = np.tile(_ANGLES, len(_DISTANCES))
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        # The middle of the box, whose nearest side or corner is `near` away in that direction.
        middle = point + direction * near[:, None] + np.clip(1.5 * direction, -1, 1) * size / 2
        tried = np.hstack([middle - size / 2, middle + size / 2])  # (tries, 4)
        roomy = tried + np.array([-_ROOM, -_ROOM, _ROOM, _ROOM])
        hits = _overlaps(roomy, taken).sum(1) + _inside(roomy, threads).sum(1)
        hits += (roomy[:, :2] < field[:2]).any(1) * 9 + (roomy[:, 2:] > field[2:]).any(1) * 9
        paths = _paths(point, tried)  # (tries, places, 2)
        far = near > _DISTANCES[0]
        others = taken[~_inside(taken, point[None]).any(1)]
        for row in np.flatnonzero(far & (hits == 0)):
            hits[row] += _inside(others, paths[row]).any()
        elsewhere = marks[np.abs(marks - point).max(1) > 0.5]
        # A name that is nearer to another point would be taken for that one's.
        misleading = (_distances(tried, elsewhere) < near[:, None] + 3).sum(1)
        cost = 1000.0 * hits + near + 15.0 * misleading + 3.0 * _inside(roomy, lines).sum(1)
        best = int(cost.argmin())
        boxes.append(tried[best])
        clash.append(hits[best] > 0)
        joined.append(far[best])
        taken = np.vstack([taken, tried[best]])
        if far[best]:
            threads = np.vstack([threads, paths[best]])
    return Placed(np.array(boxes), np.array(clash), np.array(joined))


def _paths(point: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Places on the straight lines from a point to the nearest places of boxes: (boxes, 12, 2)."""
    ends = np.clip(point, boxes[:, :2], boxes[:, 2:])
    return point + np.linspace(0.0, 0.95, 12)[:, None] * (ends - point)[:, None]


def _distances(boxes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How far places (m, 2) are from boxes (n, 4): (n, m)."""
    a, b = boxes[:, None], places[None]
    return np.linalg.norm(np.maximum(a[..., :2] - b, 0) + np.maximum(b - a[..., 2:], 0), axis=-1)


def _overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Whether boxes (n, 4) and boxes (m, 4) overlap: (n, m)."""
    a, b = ours[:, None], theirs[None]
    return np.all((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1)


def _inside(boxes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether places (m, 2) are in boxes (n, 4): (n, m)."""
    a, b = boxes[:, None], places[None]
    return np.all((a[..., :2] < b) & (b < a[..., 2:]), axis=-1)


@dataclass(frozen=True)
class Labels:
    """Names of points.

    Attributes:
        points: (n, 2), in the units of the axes.
        names: a text for each.
        size: font size in points.
        color: color of the text.
    """

    points: np.ndarray
    names: Sequence[str]
    size: float = 8
    color: str = "0.1"


@dataclass
class Named:
    """Axes whose points get names.

    Attributes:
        axes: with everything drawn but the names.
        labels: names of the important points.
        others: names of less important points; left out where there is no room.
        marks: (m, 2), further points that are drawn and have no names.
        lines: (2 or more, 2) each, the ends of straight lines, which names avoid where they can.
    """

    axes: Any
    labels: Labels
    others: Labels | None = None
    marks: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    lines: Sequence[np.ndarray] = ()

    @property
    def _scale(self) -> float:
        """Points of 1/72 inch in a pixel."""
        return 72 / self.axes.get_figure(root=True).dpi

    def fits(self) -> bool:
        """Whether there is room for the names that matter."""
        return not self._arrange(self.labels).clash.any()

    def use_numbers(self) -> None:
        """Write numbers in place of names, and below the axes which number is which name."""
        names = self.labels.names
        numbers = [str(number) for number in range(1, len(names) + 1)]
        width = len(numbers[-1])
        lines = [
            f"{number.rjust(width, _FIGURE_SPACE)}  {name}"
            for number, name in zip(numbers, names, strict=True)
        ]
        self.labels = replace(self.labels, names=numbers)
        self.axes.annotate(
            "\n".join(lines),
            (0, 0),
            (0, -_BELOW),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=8,
        )

    def write(self) -> None:
        """Write the names; a thin line joins those that are far from their points with them."""
        groups = [self.labels, *([self.others] if self.others else [])]
        placed = self._arrange(*groups)
        each = [(label, at) for label in groups for at in range(len(label.names))]
        rows = zip(each, placed.boxes, placed.clash, placed.joined, strict=True)
        for (label, at), box, clash, joined in rows:
            if clash and label is self.others:
                continue
            start = self._place(label.points[at])[0]
            line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
            end = (np.clip(start, box[:2], box[2:]) - box[:2]) / (box[2:] - box[:2])
            written = self.axes.annotate(
                label.names[at],
                label.points[at],
                tuple(box[:2] - start),
                textcoords="offset points",
                ha="left",
                va="bottom",
                fontsize=label.size,
                color=label.color,
                zorder=4,
                arrowprops=line | {"relpos": tuple(end)} if joined else None,
            )
            written.set_in_layout(False)

    def _arrange(self, *groups: Labels) -> Placed:
        everything = [label.points for label in (self.labels, self.others) if label]
        return arrange(
            self._place(np.concatenate([label.points for label in groups])),
            np.array([self._size(name, label.size) for label in groups for name in label.names]),
            self.axes.get_window_extent().extents * self._scale,
            self._place(np.concatenate([*everything, self.marks])),
            self._along_lines(),
        )

    def _place(self, data: np.ndarray) -> np.ndarray:
        """Where data are in the figure, in points of 1/72 inch: (n, 2)."""
        return self.axes.transData.transform(np.reshape(data, (-1, 2))) * self._scale

    def _size(self, name: str, size: float) -> tuple[float, float]:
        """Width and height of a text in points of 1/72 inch."""
        text = self.axes.text(0, 0, name, fontsize=size)
        box = text.get_window_extent()
        text.remove()
        return box.width * self._scale, box.height * self._scale

    def _along_lines(self) -> np.ndarray:
        """Places on the lines: (k, 2)."""
        steps = np.linspace(0, 1, 40)[:, None]
        ends = [self._place(line) for line in self.lines]
        pieces = [a + steps * (b - a) for line in ends for a, b in pairwise(line)]
        return np.concatenate([np.empty((0, 2)), *pieces])


def write_names(figure: "Figure", charts: Sequence[Named], rows: int = 1) -> None:
    """Write the names of all points of a figure, and settle where its axes are.

    Args:
        figure: with everything drawn but the names.
        charts: its axes.
        rows: number of rows of axes. Where a chart has no room for its names, each row becomes
            higher, for a list.
    """
    figure.draw_without_rendering()  # which places the axes
    crowded = [chart for chart in charts if not chart.fits()]
    for chart in crowded:
        chart.use_numbers()
    lines = max((len(chart.labels.names) for chart in crowded), default=0)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LINE * rows * lines)
    figure.draw_without_rendering()
    for chart in charts:
        chart.write()
    figure.set_layout_engine("none")
