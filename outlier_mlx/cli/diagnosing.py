"""The command that examines a machine: doctor."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.loading import import_engine, use_of
from outlier_mlx.cli.options import (
    ExpertMemory,
    Json,
    KVCache,
    Loading,
    PrefillStep,
    Quiet,
    Revision,
)

if TYPE_CHECKING:
    from outlier_mlx.measure.doctor import Report

# Speeds of more are no disk's or memory's, and less is none.
_rate = {"min": 0.001, "max": 1e5}


@command("Measure", 'doctor ./tier --ram 16 --chip "M2 Pro" --disk 3.0')
def doctor(
    cache: KVCache,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub repository of a tier or other model. Default: only the machine.",
            show_default=False,
        ),
    ] = "",
    ram: Annotated[
        float | None,
        typer.Option(min=1, max=1e5, help="Answer for another Mac, with this many GB of memory."),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Answer for another Mac, with this chip: M2 Pro, M3 Max 40."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(**_rate, help="Memory bandwidth in GB/s, if it is not known.")
    ] = None,
    disk: Annotated[
        float | None, typer.Option(**_rate, help="GB/s that the disk reads, in place of measuring.")
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens in the KV cache of the conversation.")
    ] = 4096,
    prefill_step_size: PrefillStep = 2048,
    expert_memory: ExpertMemory = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Examine this machine, and say whether a model fits and how fast it can be."""
    import_engine()
    from outlier_mlx.engine.paging.budget import ExpertMemory as Parsed
    from outlier_mlx.errors import OutlierError
    from outlier_mlx.measure.doctor import Given, examine
    from outlier_mlx.terminal import progress_bar

    given = Given(ram, chip, bandwidth, disk)
    if chip is not None:
        from outlier_mlx.engine.chips import named_chip

        try:
            named_chip(chip, None if ram is None else round(ram))
        except OutlierError as error:
            raise typer.BadParameter(str(error), param_hint="--chip") from None
    if model and given.elsewhere and ram is None:
        raise typer.BadParameter("the plan needs the memory of that Mac", param_hint="--ram")

    use = use_of(Loading(), context, cache, step=prefill_step_size)
    memory = Parsed.parse(expert_memory)
    stages = partial(progress_bar, quiet=quiet, at_once=False)
    report = examine(model or None, given, use, memory, revision, stages)
    if as_json:
        print_json(report.as_json())
    else:
        _print(report)
    for problem in report.problems:
        say(f"error: {problem}")
    if report.problems:
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    """Print findings with their sources, names in a column."""
    from outlier_mlx.errors import one_line
    from outlier_mlx.terminal import print_heading, stdout

    console = stdout()
    width = max(len(finding.name) for finding in (*report.machine, *report.model)) + 2
    for title, findings in ((report.where, report.machine), (report.name, report.model)):
        if title is not None:
            print_heading(console, title, "")
        for found in findings:
            name = f"{found.name}:".ljust(width)
            console.print(f"  {name}{one_line(found.line)}", soft_wrap=True)
