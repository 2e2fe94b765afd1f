"""`bench --trace`: no model, and options of its own."""

from pathlib import Path

import typer

from outlier_mlx.cli.app import print_json, say
from outlier_mlx.errors import OutlierError


def check_given(ctx: typer.Context, allowed: set[str]) -> None:
    """Refuse all options but some, and MODEL.

    Raises:
        BadParameter: another one was given.
    """
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if source is not None and source.name == "COMMANDLINE" and param.name not in allowed:
            hint = "MODEL" if param.param_type_name == "argument" else max(param.opts, key=len)
            raise typer.BadParameter("does not go with --trace", param_hint=hint)


def replay_trace(
    file: Path,
    chip: str | None,
    disk: float | None,
    out: Path | None,
    *,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Replay a trace, print what is found, and draw it into `out` if that is given.

    Raises:
        OutlierError: the trace cannot be replayed, no such chip is known, or `out` cannot be
            written.
        BadParameter: there is a chip, but no disk.
    """
    from outlier_mlx.engine.chips import named_chip, this_chip
    from outlier_mlx.measure.expert_trace import read_trace
    from outlier_mlx.measure.pictures import check_picture
    from outlier_mlx.measure.replay_report import draw_replays, print_replays
    from outlier_mlx.measure.replay_run import Machine, replay_all
    from outlier_mlx.terminal import progress_bar

    if out is not None:
        check_picture(out, force=force, sources=[file])
    if chip is not None and disk is None:
        raise typer.BadParameter("is missing: --chip needs the disk's speed", param_hint="--disk")
    machine = None
    if disk is not None:
        known = this_chip() if chip is None else named_chip(chip)
        if known.bandwidth_gb_s is None:
            raise OutlierError(f"{known.note}: name a chip with --chip")
        machine = Machine(known.name, known.bandwidth_gb_s, disk)
    trace = read_trace(file)
    with progress_bar("replaying", "replays", quiet=quiet) as progress:
        found = replay_all(trace, machine, progress)
    if out is not None:
        draw_replays(found, out)
    if as_json:
        print_json(found.as_json())
        return
    print_replays(found)
    if machine is None and not quiet:
        say("--disk GB/S and --chip NAME give tokens/s")
