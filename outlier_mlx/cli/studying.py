"""The command that studies activations: outliers."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.options import (
    ActivationDType,
    ExpertMemory,
    Force,
    IgnoreMemory,
    Json,
    NoPlots,
    OutFolder,
    Plots,
    Quiet,
    TextFile,
)

if TYPE_CHECKING:
    from outlier_mlx.measure.outlier_counts import Hold

HoldName = Literal["bf16", "f16", "f32"]
_HOLDS: "dict[HoldName | None, Hold | None]" = {
    None: None,
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
}


@command("Measure", "outliers ./tier ./base --text book.txt --out ./found")
def outliers(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders or hub repositories of models."),
    ],
    text: TextFile,
    out: OutFolder,
    sequences: Annotated[int, typer.Option(min=1, help="Number of windows, at most.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    overlap: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Fraction of a window that the next one repeats."),
    ] = 0.0,
    threshold: Annotated[
        float, typer.Option(min=0, max=1e6, help="Magnitude from which a value is an outlier.")
    ] = 6.0,
    min_layers: Annotated[
        float,
        typer.Option(min=0, max=1, help="Fraction of the layers that a feature must occur in."),
    ] = 0.25,
    min_seq: Annotated[
        float,
        typer.Option(min=0, max=1, help="Fraction of the positions that it must occur at."),
    ] = 0.06,
    hold: Annotated[
        HoldName | None,
        typer.Option(help="Round values to this dtype before comparing. Default: no rounding."),
    ] = None,
    per_expert: Annotated[
        bool, typer.Option("--per-expert", help="Also report which experts get outlier tokens.")
    ] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Also describe the residual stream.")
    ] = False,
    plots: Plots = "png",
    no_plots: NoPlots = False,
    dtype: ActivationDType = None,
    ignore_memory: IgnoreMemory = False,
    expert_memory: ExpertMemory = "auto",
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Find outlier features: dimensions with huge values in many layers, at many positions."""
    from outlier_mlx.engine.paging.budget import ExpertMemory as Parsed
    from outlier_mlx.measure.outlier_definitions import Thresholds
    from outlier_mlx.measure.outlier_report import Study
    from outlier_mlx.measure.outlier_run import study_models
    from outlier_mlx.measure.outlier_tables import print_outliers
    from outlier_mlx.measure.outliers import Options

    thresholds = Thresholds(threshold, min_layers, min_seq)
    study = Study(
        text=text,
        sequences=sequences,
        length=length,
        overlap=overlap,
        options=Options(thresholds, _HOLDS[hold], residual=residual, per_expert=per_expert),
        dtype=dtype,
        plots=None if no_plots else plots,
        check_memory=not ignore_memory,
        memory=Parsed.parse(expert_memory),
    )
    entries = study_models(models, study, out, force=force, quiet=quiet)
    if as_json:
        print_json(entries)
    else:
        print_outliers(entries)
    if not quiet:
        say(f"wrote {out}")
