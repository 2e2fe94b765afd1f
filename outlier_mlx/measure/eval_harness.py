"""Running lm-evaluation-harness on a model, without its output."""

import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from lm_eval.tasks.manager import TaskDict

from outlier_mlx.engine.distributed.launcher import is_lost
from outlier_mlx.engine.distributed.ranks import loaded as loaded_everywhere
from outlier_mlx.engine.generate import activation_dtype, described
from outlier_mlx.engine.loading import load
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.plan import Plan
from outlier_mlx.errors import OutlierError, one_line
from outlier_mlx.measure.environment import dtype_name, versions
from outlier_mlx.measure.eval_model import HarnessModel
from outlier_mlx.measure.eval_results import Evaluation, Result
from outlier_mlx.measure.eval_tasks import Working, is_path, load_tasks, sandboxed
from outlier_mlx.models.sizes import context_length
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.hub_errors import hush_hub
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Stages, quiet_transformers

#: Resamples for standard errors that have no closed form. The harness takes a hundred times as
#: many, in several processes; these give two digits, in one process.
BOOTSTRAP_ITERS = 1000
#: Context length of models that do not state theirs; the same as in mlx-lm's adapter.
_MAX_LENGTH = 8192


@dataclass(frozen=True)
class EvalOptions:
    """Settings that change scores.

    Attributes:
        limit: number of documents of each task, at most.
        num_fewshot: examples before each question; None: the task's own number.
        batch_size: number of texts generated together.
        apply_chat_template: ask questions with the model's chat template.
        max_tokens: tokens of an answer, at most; None: the task's own limit.
        seed: seed of all random choices, mainly of few-shot examples.
        dtype: activation dtype, as `load` takes it.
        expert_skip: as `load` takes it. With more than 0, scores depend on the experts' memory.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    max_tokens: int | None = None
    seed: int = 1234
    dtype: str | None = None
    expert_skip: float = 0.0


class Noted(logging.Handler):
    """Collects the harness's warnings, each text once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Add the text of a log record."""
        self.add(record.getMessage())

    def add(self, text: str) -> None:
        """Add a warning, unless it is there already."""
        line = one_line(text)[:300]
        if line not in self.texts:
            self.texts.append(line)


def evaluate(
    source: Source,
    tasks: Sequence[str],
    options: EvalOptions,
    stages: Stages,
    working: Working,
    *,
    trust_tasks: bool = False,
    run_generated_code: bool = False,
    memory: ExpertMemory | Plan | None = None,
) -> tuple[Evaluation, list[str]]:
    """Load a model and evaluate it; tasks are loaded first, since they may be wrong.

    Args:
        source: a tier, or another model that `load` takes.
        tasks: as `load_tasks` takes them.
        options: settings that change scores.
        stages: shows progress.
        working: shows a text while something runs.
        trust_tasks: run Python that task files bring along.
        run_generated_code: run tasks that execute what the model writes.
        memory: what routed experts may take, or the plan that says it; default: all are loaded.
            Scores do not depend on it.

    Returns:
        The scores, and the harness's warnings.

    Raises:
        OutlierError: a task or the model is invalid, or the model does not support the task.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    noted = Noted()
    with _noting(noted), sandboxed(trust_tasks):
        with redirect_stdout(sys.stderr):
            loaded = load_tasks(tasks, working, trust=trust_tasks)
        _prepare(loaded, options, noted)
        how: Any = {"dtype": options.dtype, "expert_skip": options.expert_skip}
        with working(f"loading {source.name}"):
            model, tokenizer = load(source.folder, expert_memory=memory, **how)
        loaded_everywhere()
        if options.apply_chat_template and not tokenizer.chat_template:
            raise OutlierError(f"{source.name}: its tokenizer has no chat template to apply")
        with _silenced(stages) as shown:
            adapter = HarnessModel(
                model,
                tokenizer,
                max_length=_max_length(model),
                batch_size=options.batch_size,
                max_tokens=options.max_tokens,
                chat=options.apply_chat_template,
                stages=shown,
            )
            found = _run(adapter, loaded, options, run_generated_code)
    dtype = dtype_name(activation_dtype(model))
    return _evaluation(source, tasks, options, date, dtype, found), noted.texts


def _prepare(loaded: TaskDict, options: EvalOptions, noted: Noted) -> None:
    """Give tasks their few-shot examples, as the harness's own `simple_evaluate` does."""
    random.seed(options.seed)
    np.random.seed(options.seed)
    mx.random.seed(options.seed)
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own == 0 and options.num_fewshot != 0:
            noted.add(f"{name} is always asked without examples; --num-fewshot is ignored")
        elif options.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
        asked = task.get_config("generation_kwargs") or {}
        if asked.get("do_sample") or asked.get("temperature"):
            noted.add(f"{name} asks for sampled answers; they are greedy here")


def _run(
    adapter: HarnessModel, loaded: TaskDict, options: EvalOptions, run_generated_code: bool
) -> Mapping[str, Any]:
    try:
        found = lm_eval.evaluate(
            adapter,
            loaded,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            confirm_run_unsafe_code=run_generated_code,
        )
    except (OutlierError, OSError, MemoryError):
        raise
    except Exception as error:  # tasks and their metrics may raise anything
        if is_lost(error):
            raise
        raise OutlierError(_failure(error)) from error
    assert found is not None  # it is None only in processes other than the first
    return found


def _max_length(model: nn.Module) -> int:
    """The model's context length in tokens."""
    length = context_length(described(model))
    return length if length is not None and length > 1 else _MAX_LENGTH


def _failure(error: Exception) -> str:
    if "marked as unsafe" in str(error):
        name = str(error).partition("task: ")[2].partition(" ")[0]
        return f"task {name} runs code that the model writes; --run-generated-code allows it"
    return f"the evaluation failed: {type(error).__name__}: {error}"


def _evaluation(
    source: Source,
    tasks: Sequence[str],
    options: EvalOptions,
    date: str,
    dtype: str,
    found: Mapping[str, Any],
) -> Evaluation:
    """What the harness found, with the settings that it depends on."""
    # Names of files without their folders: no path of this machine.
    names = [Path(task).name if is_path(task) else task for task in tasks]
    return Evaluation(
        model=source.name,
        revision=source.revision,
        bytes_in_memory=sum(tensor.nbytes for tensor in read_shards(source.folder).values()),
        device="cpu" if mx.default_device() == mx.cpu else "gpu",
        date=date,
        versions=versions("lm-eval"),
        config={"tasks": names}
        | asdict(options)
        | {"dtype": dtype, "bootstrap_iters": BOOTSTRAP_ITERS},
        results=list(_results(found)),
    )


def _results(found: Mapping[str, Any]) -> Iterator[Result]:
    """The rows of the harness's table."""
    for task, values in found["results"].items():
        directions = found["higher_is_better"].get(task) or {}
        task_version = found["versions"].get(task)
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            yield Result(
                task=task,
                metric=metric,
                filter=name,
                value=_finite(value),
                stderr=_finite(values.get(f"{metric}_stderr,{name}")),
                n=int(values["sample_len"]),
                higher_is_better=directions.get(metric),
                fewshot=found["n-shot"].get(task),
                task_version=None if task_version is None else str(task_version),
            )


def _finite(value: Any) -> float | None:
    """The value as a float; None if it is not a finite number, such as "N/A"."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


@contextmanager
def _noting(noted: Noted) -> Iterator[None]:
    """Collect what the harness and `datasets` log instead of printing it."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "mlx_lm")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    # Without any handler, the first message of mlx-lm would add one that prints.
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    hush_hub()
    bars = datasets.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers = [noted]
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers
        root.removeHandler(nothing)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _silenced(stages: Stages) -> Iterator[Stages]:
    """Keep the harness from printing; yields stages that still show progress."""
    terminal = sys.stderr
    pools = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"

    @contextmanager
    def shown(title: str, unit: str) -> Iterator[Any]:
        with redirect_stderr(terminal), stages(title, unit) as advance:
            yield advance

    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
            quiet_transformers(),
        ):
            yield shown
    finally:
        if pools is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = pools
