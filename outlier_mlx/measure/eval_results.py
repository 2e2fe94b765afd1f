"""Results of an evaluation, as JSON: scores, standard errors, and the model's memory."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.output import check_writable, write_whole
from outlier_mlx.storage.texts import parse_json_object, read_bytes

#: Value of the field "format"; the number changes if the meaning of a field does.
FORMAT = "outlier-mlx evaluation 1"
# Sums and differences of smaller numbers are finite, too.
_MAX_NUMBER = 1e300


@dataclass(frozen=True)
class Result:
    """A score.

    Attributes:
        task: the harness's name of the task or group.
        metric: the metric's name.
        filter: how answers were processed before scoring; "none" if they were not.
        value: the score; None if it is not finite.
        stderr: the harness's standard error; None if it has none.
        n: number of scored documents.
        higher_is_better: None if the task does not say.
        fewshot: examples before each question; None for groups whose tasks differ.
        task_version: the task's own version.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    n: int
    higher_is_better: bool | None
    fewshot: int | None = None
    task_version: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies a score: two scores with the same key can be compared."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True)
class Evaluation:
    """All scores of a model.

    Attributes:
        model: the repository, or the folder's own name.
        revision: the commit on the hub; None for a folder.
        bytes_in_memory: bytes of all the model's tensors as they are stored, which is what they
            take on a GPU.
        device: "gpu" or "cpu".
        date: start of the run, UTC, ISO 8601.
        versions: versions of this package, the harness, mlx and mlx-lm.
        config: all settings that change scores.
        results: the scores, in the harness's order.
    """

    model: str
    revision: str | None
    bytes_in_memory: int
    device: str
    date: str
    versions: dict[str, str]
    config: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    @property
    def gb(self) -> float:
        """Memory in GB of 10^9 bytes."""
        return self.bytes_in_memory / 1e9

    def score_per_gb(self, result: Result) -> float | None:
        """Score per GB; None unless higher is better, since it would mean nothing otherwise."""
        if result.value is None or not result.higher_is_better:
            return None
        return result.value / self.gb

    def as_json(self) -> dict[str, Any]:
        """All of it, with the score per GB of each result."""
        rows = [asdict(r) | {"score_per_gb": self.score_per_gb(r)} for r in self.results]
        return {"format": FORMAT} | asdict(self) | {"gb": self.gb, "results": rows}


def save(evaluation: Evaluation, path: Path, *, force: bool = False) -> None:
    """Write an evaluation as JSON.

    Raises:
        OutlierError: as `check_writable`.
    """
    check_writable(path, force=force)
    write_whole(path, dumps(evaluation) + "\n")


def dumps(evaluation: Evaluation) -> str:
    """An evaluation as JSON text."""
    return json.dumps(evaluation.as_json(), indent=2, allow_nan=False)


def read(path: Path) -> Evaluation:
    """Read what `save` wrote.

    Raises:
        OutlierError: the file is not an evaluation, or of another version.
    """
    raw = parse_json_object(read_bytes(path), str(path))
    kind = raw.get("format")
    if kind != FORMAT:
        reason = "not a file that eval wrote"
        if isinstance(kind, str) and kind.startswith(FORMAT[:-1]):
            reason = f"{kind}; this version reads {FORMAT}"
        raise OutlierError(f"{path}: {reason}")
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise OutlierError(f"{path}: not a valid result of eval: {error}") from None


def _parse(raw: dict[str, Any]) -> Evaluation:
    evaluation = Evaluation(
        model=_get(raw, "model", str),
        revision=_get(raw, "revision", str, None),
        bytes_in_memory=_get(raw, "bytes_in_memory", int),
        device=_get(raw, "device", str),
        date=_get(raw, "date", str),
        versions=_get(raw, "versions", dict),
        config=_get(raw, "config", dict),
        results=[_parse_result(row) for row in _get(raw, "results", list)],
    )
    if not 0 < evaluation.bytes_in_memory < 2**63:
        raise ValueError("bytes_in_memory is not a number of bytes")
    if any(result.stderr is not None and result.stderr < 0 for result in evaluation.results):
        raise ValueError("stderr is negative")
    return evaluation


def _parse_result(raw: Any) -> Result:
    if not isinstance(raw, dict):
        raise TypeError("a result is not an object")
    return Result(
        task=_get(raw, "task", str),
        metric=_get(raw, "metric", str),
        filter=_get(raw, "filter", str),
        value=_number(raw, "value"),
        stderr=_number(raw, "stderr"),
        n=_get(raw, "n", int),
        higher_is_better=_get(raw, "higher_is_better", bool, None),
        fewshot=_get(raw, "fewshot", int, None),
        task_version=_get(raw, "task_version", str, None),
    )


def _get(raw: dict[str, Any], key: str, *kinds: Any) -> Any:
    value = raw[key]
    allowed = tuple(type(None) if kind is None else kind for kind in kinds)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{key} is {type(value).__name__}")
    return value


def _number(raw: dict[str, Any], key: str) -> float | None:
    value = _get(raw, key, int, float, None)
    if value is not None and not abs(value) < _MAX_NUMBER:
        raise ValueError(f"{key} is not finite, or too large")
    return None if value is None else float(value)
