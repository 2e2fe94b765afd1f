"""Scores of several models against the memory that they take."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.measure.eval_results import Evaluation

#: Settings that change scores. The batch size only changes how sums are rounded.
_SETTINGS = ("limit", "num_fewshot", "apply_chat_template", "max_tokens", "seed", "dtype")


@dataclass(frozen=True)
class Point:
    """A model in a chart.

    Attributes:
        label: its name, made unique.
        gb: its memory in GB of 10^9 bytes.
        value: its score.
        stderr: standard error of the score; None if the harness has none.
        n: number of scored documents.
        score_per_gb: None unless higher is better.
        on_front: whether it is on the Pareto front: no other model is both as small and as good,
            and smaller or better.
    """

    label: str
    gb: float
    value: float
    stderr: float | None
    n: int
    score_per_gb: float | None
    on_front: bool | None


@dataclass(frozen=True)
class Chart:
    """The scores of all models in one metric of one task; the best is first."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    points: list[Point]

    @property
    def title(self) -> str:
        """Task, metric and filter; the filter "none" is left out."""
        name = f"{self.task}, {self.metric}"
        return name if self.filter == "none" else f"{name} ({self.filter})"

    @property
    def direction(self) -> str:
        """Whether higher or lower scores are better, in words."""
        known = {True: "higher is better", False: "lower is better"}
        return known.get(self.higher_is_better, "better is not known")  # type: ignore[arg-type]


def charts(
    stems: Sequence[str],
    evaluations: Sequence[Evaluation],
    *,
    task: str | None = None,
    metric: str | None = None,
) -> list[Chart]:
    """Make a chart of each score that all evaluations have.

    Args:
        stems: the files' stems, to tell models of the same name apart.
        evaluations: in the same order.
        task: use only this task.
        metric: use only this metric.

    Raises:
        OutlierError: they have no score in common, or none of this task and metric.
    """
    labels = _labels(stems, evaluations)
    scores = [{r.key: r for r in e.results if r.value is not None} for e in evaluations]
    common = [key for key in scores[0] if all(key in other for other in scores)]
    if not common:
        raise OutlierError("the files have no score in common: no task and metric is in all")
    chosen = [k for k in common if task in (None, k[0]) and metric in (None, k[1])]
    if not chosen:
        known = sorted({f"{name} {measure}" for name, measure, _ in common})
        raise OutlierError(f"no such score; in all files are: {listed(known)}")
    found = []
    for key in chosen:
        better = scores[0][key].higher_is_better
        rows = list(zip(labels, evaluations, [s[key] for s in scores], strict=True))
        places = [(e.gb, _goodness(r.value or 0.0, better)) for _, e, r in rows]
        points = [
            Point(
                label=label,
                gb=evaluation.gb,
                value=result.value or 0.0,
                stderr=result.stderr,
                n=result.n,
                score_per_gb=evaluation.score_per_gb(result),
                on_front=None if better is None else on_front(place, places),
            )
            for place, (label, evaluation, result) in zip(places, rows, strict=True)
        ]
        points.sort(key=lambda p: (-_goodness(p.value, better), p.gb, p.label))
        found.append(Chart(*key, better, points))
    return found


def _goodness(value: float, higher_is_better: bool | None) -> float:
    return -value if higher_is_better is False else value


def on_front(place: tuple[float, float], places: Sequence[tuple[float, float]]) -> bool:
    """Whether a place (GB, goodness) is on the Pareto front."""
    gb, good = place
    return not any(
        other_gb <= gb and other >= good and (other_gb, other) != place
        for other_gb, other in places
    )


def _labels(stems: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """Unique names: the models', if needed with the file's stem, if needed with a number."""
    names = Counter(e.model for e in evaluations)
    labels = [
        e.model if names[e.model] == 1 else f"{e.model} ({stem})"
        for stem, e in zip(stems, evaluations, strict=True)
    ]
    again = Counter(labels)
    return [
        label if again[label] == 1 else f"{label} {number}"
        for number, label in enumerate(labels, start=1)
    ]


def differences(evaluations: Sequence[Evaluation], found: Sequence[Chart]) -> list[str]:
    """Differences in how the evaluations were run, a line each; they limit comparisons."""
    named: dict[str, list[Any]] = {
        "lm-eval version": [e.versions.get("lm-eval") for e in evaluations],
        "mlx-lm version": [e.versions.get("mlx-lm") for e in evaluations],
        "device": [e.device for e in evaluations],
    }
    for name in _SETTINGS:
        named[name] = [e.config.get(name) for e in evaluations]
    # Older files do not have it.
    named["expert_skip"] = [e.config.get("expert_skip", 0.0) for e in evaluations]
    for key in sorted({(chart.task, chart.metric, chart.filter) for chart in found}):
        rows = [next(r for r in e.results if r.key == key) for e in evaluations]
        named[f"examples before a question of {key[0]}"] = [r.fewshot for r in rows]
        named[f"version of {key[0]}"] = [r.task_version for r in rows]
        named[f"documents of {key[0]}"] = [r.n for r in rows]
    lines = []
    for name, values in named.items():
        texts = [json.dumps(value) for value in values]
        if len(set(texts)) > 1:
            lines.append(f"not run alike: {name.replace('_', ' ')}: {', '.join(texts)}")
    return lines
