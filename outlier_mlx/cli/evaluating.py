"""Commands that evaluate models on tasks and compare the results: eval, compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.loading import planned_memory, use_of
from outlier_mlx.cli.options import Force, Json, Loading, Model, Quiet
from outlier_mlx.cli.ranks import join
from outlier_mlx.errors import OutlierError


@command("Measure", "eval ./tier --tasks arc_easy,./my.yaml --out q4.json", name="eval")
def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,...", help="Tasks of the harness, task files, and folders of them."
        ),
    ],
    loading: Loading,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task, at most. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. Default: the task's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated together.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer, at most. Default: the task's.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="Seed, mainly for the choice of few-shot examples."
        ),
    ] = 1234,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the results to this file.")
    ] = None,
    trust_tasks: Annotated[
        bool, typer.Option("--trust-tasks", help="Run Python code that task files contain.")
    ] = False,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Run code that the model writes.")
    ] = False,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model with lm-evaluation-harness: scores, and scores per GB of memory."""
    from functools import partial

    from outlier_mlx.engine.distributed.ranks import ranks
    from outlier_mlx.measure import eval_results as results
    from outlier_mlx.measure.eval_tables import print_evaluation
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.storage.output import check_writable
    from outlier_mlx.terminal import progress_bar, working

    names = _task_names(tasks)
    if out is not None and ranks().leads:
        check_writable(out, force=force, sources=[model, *names])
    harness = _harness(quiet=quiet)
    source = resolve(model, loading.revision)
    join(source.folder)
    use = use_of(loading, 2048, conversations=batch_size, prompts=batch_size)
    memory = planned_memory(source, loading, use, quiet=quiet)
    options = harness.EvalOptions(
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        max_tokens=max_tokens,
        seed=seed,
        dtype=loading.dtype,
        expert_skip=loading.expert_skip,
    )
    evaluation, noted = harness.evaluate(
        source,
        names,
        options,
        partial(progress_bar, quiet=quiet),
        partial(working, quiet=quiet),
        trust_tasks=trust_tasks,
        run_generated_code=run_generated_code,
        memory=memory,
    )
    for text in noted if not quiet else ():
        say(f"warning: {text}")
    if out is not None and ranks().leads:
        results.save(evaluation, out, force=force)
    if as_json:
        print(results.dumps(evaluation))
    else:
        print_evaluation(evaluation)


def _task_names(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("names no task", param_hint="--tasks")
    return names


def _harness(*, quiet: bool) -> Any:
    """The module that needs lm-evaluation-harness, which takes seconds to import."""
    from outlier_mlx.terminal import working
    from outlier_mlx.upstream import pip_install

    try:
        with working("starting lm-evaluation-harness", quiet=quiet):
            from outlier_mlx.measure import eval_harness
    except ImportError as error:
        raise OutlierError(
            f"eval needs lm-evaluation-harness: {pip_install('outlier-mlx[eval]')} ({error})"
        ) from error
    return eval_harness


def _check_picture_name(path: Path | None) -> Path | None:
    from outlier_mlx.measure.pictures import check_suffix

    try:
        if path is not None:
            check_suffix(path)
    except OutlierError as error:
        raise typer.BadParameter(str(error)) from None
    return path


@command("Measure", "compare q4.json q8.json base.json --out scores.png")
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE.json", help="Files that `eval --out` wrote."),
    ],
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Show only this task.")] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Show only this metric.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw a picture: FILE.png, FILE.svg or FILE.pdf.",
            callback=_check_picture_name,
        ),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Show scores of models against the memory they take."""
    from dataclasses import asdict

    from outlier_mlx.measure.eval_charts import charts, differences
    from outlier_mlx.measure.eval_draw import check_number, draw
    from outlier_mlx.measure.eval_results import read
    from outlier_mlx.measure.eval_tables import print_charts
    from outlier_mlx.measure.pictures import check_picture

    if out is not None:
        check_picture(out, force=force, sources=files)
    evaluations = [read(file) for file in files]
    found = charts([file.stem for file in files], evaluations, task=task, metric=metric)
    if out is not None:
        check_number(found)
    if not quiet:
        for difference in differences(evaluations, found):
            say(f"warning: {difference}")
    if out is not None:
        draw(found, out)
    if as_json:
        print_json([asdict(chart) for chart in found])
    else:
        print_charts(found)
