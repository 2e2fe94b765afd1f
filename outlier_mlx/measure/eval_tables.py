"""The output of `eval` and `compare`, on stdout."""

from collections.abc import Sequence
from string import ascii_lowercase

from rich.table import Table
from rich.text import Text

from outlier_mlx.errors import one_line
from outlier_mlx.measure.eval_charts import Chart, Point
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.terminal import plain_table, print_heading, size, stdout

#: Lines and columns of a plot without its frame.
_HEIGHT, _WIDTH = 12, 64
#: Columns beside a plot: figures of the scale, and a line with room beside it.
_FRAME = 13
#: Columns of a terminal from which all figures fit beside names.
_ROOMY = 56


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a model's scores, and scores per GB."""
    console = stdout()
    print_heading(console, evaluation.model, f": {size(evaluation.bytes_in_memory)} in memory")
    filters = any(result.filter != "none" for result in evaluation.results)
    table = plain_table()
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    if filters:
        table.add_column("filter", overflow="fold")
    roomy = console.width >= _ROOMY
    for name in ("n", "score", "stderr", "per GB") if roomy else ("score", "per GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in evaluation.results:
        cells: list[str | Text] = [_shown(result.task), _shown(result.metric)]
        cells += [_shown(result.filter)] if filters else []
        cells += [str(result.n)] if roomy else []
        cells += [_figure(result.value)]
        cells += [_figure(result.stderr)] if roomy else []
        table.add_row(*cells, _per_gb(evaluation.score_per_gb(result)))
    console.print(table)
    console.print(_how(evaluation), soft_wrap=True)


def _how(evaluation: Evaluation) -> str:
    """The settings that the scores depend on, in one line."""
    config = evaluation.config
    parts = [f"lm-eval {evaluation.versions.get('lm-eval')}", evaluation.date]
    parts.append(f"{evaluation.device.upper()}, {config.get('dtype')}")
    shots = sorted({r.fewshot for r in evaluation.results if r.fewshot is not None})
    parts.append(f"few-shot: {', '.join(map(str, shots)) or '?'}")
    if config.get("limit"):
        parts.append(f"at most {config['limit']} documents a task")
    if config.get("apply_chat_template"):
        parts.append("chat template")
    return one_line("; ".join(parts))


def _figure(value: float | None) -> str:
    """A score with four decimals; large numbers with fewer."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"


def _per_gb(value: float | None) -> str:
    """A score per GB with four digits, whatever the model's size."""
    return "-" if value is None else f"{value:.4g}"


def _shown(text: str) -> Text:
    return Text(one_line(text))


def print_charts(found: Sequence[Chart]) -> None:
    """Print each chart as a table and, for more than one model, as a plot."""
    console = stdout()
    for number, chart in enumerate(found):
        if number:
            console.print()
        print_heading(console, chart.title, f" ({chart.direction})")
        marks = _marks(chart.points)
        console.print(_table(chart, marks, roomy=console.width >= _ROOMY))
        if len(chart.points) > 1:
            width = max(16, min(_WIDTH, console.width - _FRAME))
            console.print("\n".join(plot(chart.points, marks, width)), soft_wrap=True)
    if any(point.on_front for chart in found for point in chart.points):
        legend = "*, capital letter: no other model is both smaller and better"
        console.print(legend, soft_wrap=True)


def _marks(points: Sequence[Point]) -> list[str]:
    """A letter for each point, capital on the Pareto front; dots from the 27th point on."""
    letters = [*ascii_lowercase, *("." for _ in points)]
    return [
        letter.upper() if point.on_front else letter
        for letter, point in zip(letters, points, strict=False)
    ]


def _table(chart: Chart, marks: Sequence[str], *, roomy: bool) -> Table:
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("model", overflow="fold")
    for name in ("memory", "score", "stderr", "per GB") if roomy else ("memory", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for point, mark in zip(chart.points, marks, strict=True):
        cells = [_memory(point.gb), _figure(point.value)]
        cells += [_figure(point.stderr), _per_gb(point.score_per_gb)] if roomy else []
        star = "*" if point.on_front else ""
        table.add_row(mark + star, _shown(point.label), *cells)
    return table


def _memory(gb: float) -> str:
    return size(round(gb * 1e9))


def plot(points: Sequence[Point], marks: Sequence[str], width: int) -> list[str]:
    """Draw scores (up) against GB (right) in plain characters.

    Args:
        points: at least one.
        marks: a character for each.
        width: columns of the field; the frame takes some more.

    Returns:
        Lines without colours. A score's standard error is a bar; of points in one place the first
        is seen.
    """
    bounds = [p.value + sign * (p.stderr or 0.0) for p in points for sign in (-1, 1)]
    low, high = _spread(min(bounds), max(bounds))
    left, right = _spread(min(p.gb for p in points), max(p.gb for p in points))
    field = [[" "] * width for _ in range(_HEIGHT)]

    def row(value: float) -> int:
        return round((high - value) / (high - low) * (_HEIGHT - 1))

    places = [(round((p.gb - left) / (right - left) * (width - 1)), row(p.value)) for p in points]
    for point, (column, _) in zip(points, places, strict=True):
        error = point.stderr or 0.0
        for line in range(row(point.value + error), row(point.value - error) + 1):
            field[line][column] = "|"
    for mark, (column, line) in reversed(list(zip(marks, places, strict=True))):
        field[line][column] = mark
    scale = {0: f"{high:.4g}", _HEIGHT - 1: f"{low:.4g}"}
    lines = [f"{scale.get(n, ''):>9} | {''.join(cells)}".rstrip() for n, cells in enumerate(field)]
    ends = _memory(left), _memory(right)
    lines.append(" " * 10 + "+" + "-" * (width + 2))
    lines.append(" " * 12 + ends[0] + ends[1].rjust(width - len(ends[0])))
    return lines


def _spread(low: float, high: float) -> tuple[float, float]:
    """The bounds, moved apart if they are equal."""
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room
