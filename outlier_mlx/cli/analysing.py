"""Commands that look inside models."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from outlier_mlx.cli.app import app, say
from outlier_mlx.cli.options import Debug, DType, Force, IgnoreMemory, Quiet
from outlier_mlx.measure.pictures import Format

if TYPE_CHECKING:
    from outlier_mlx.measure.outlier_accumulate import Hold

HoldName = Literal["bf16", "f16", "f32"]
_HOLDS: "dict[HoldName | None, Hold | None]" = {
    None: None,
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
}


@app.command(epilog="Example: `outlier-mlx outliers ./tier ./base --text book.txt --out ./found`")
def outliers(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders or hub repositories of models.", show_default=False),
    ],
    text: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="A text file, UTF-8.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for JSON and pictures.", show_default=False)],
    sequences: Annotated[int, typer.Option(min=1, help="Windows of the text, at most.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    overlap: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of a window that the next one repeats.")
    ] = 0.0,
    threshold: Annotated[
        float, typer.Option(min=0, max=1e6, help="Magnitude of an outlier.")
    ] = 6.0,
    min_layers: Annotated[
        float, typer.Option(min=0, max=1, help="Share of layers that a feature is in.")
    ] = 0.25,
    min_seq: Annotated[
        float, typer.Option(min=0, max=1, help="Share of positions that it is at.")
    ] = 0.06,
    hold: Annotated[
        HoldName | None,
        typer.Option(help="Round values to this before comparing. Default: as computed."),
    ] = None,
    per_expert: Annotated[
        bool, typer.Option("--per-expert", help="Also tell which experts get outlier tokens.")
    ] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Also describe the residual stream.")
    ] = False,
    plots: Annotated[Format, typer.Option(help="File format of the pictures.")] = "png",
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")] = False,
    dtype: Annotated[
        DType | None, typer.Option(help="Of activations. Default: the model's; float32 on the CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Force = False,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find outlier features: dimensions with huge values in many layers, at many positions."""
    from outlier_mlx.measure.outlier_definitions import Thresholds
    from outlier_mlx.measure.outlier_run import Study, study_models
    from outlier_mlx.measure.outlier_table import print_outliers
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
    )
    entries = study_models(models, study, out, force=force, quiet=quiet)
    if as_json:
        print(json.dumps(entries, indent=2))
    else:
        print_outliers(entries)
    if not quiet:
        say(f"wrote {out}")
