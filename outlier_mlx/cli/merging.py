"""The command that merges dense models."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

import typer

from outlier_mlx.cli.app import app
from outlier_mlx.cli.options import Debug, DType, Force, GroupSize, Quiet


@app.command(epilog="Example: `outlier-mlx merge recipe.yaml --out ./merged`")
def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe: YAML as mergekit-moe takes it.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    bits: Annotated[
        Literal["4", "8"] | None,
        typer.Option(help="Quantize, into an MLX folder. Default: floats by Hugging Face's names."),
    ] = None,
    group_size: Annotated[
        GroupSize, typer.Option(help="Weights that share a scale, with --bits.")
    ] = "64",
    dtype: Annotated[
        DType | None, typer.Option(help="Of what is not quantized. Default: the recipe's.")
    ] = None,
    no_positive: Annotated[
        Literal["error", "bos", "zero"] | None,
        typer.Option(help="What an expert without positive prompts means."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="YAML: for each expert a list of prompts to measure routing on."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Run the merged model on prompts to measure its routing.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of random routers, and of noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge dense models into a mixture of experts (a frankenMoE)."""
    from outlier_mlx.merge import merge as merge_models
    from outlier_mlx.merge.report import as_json as report_of
    from outlier_mlx.merge.tables import print_merged
    from outlier_mlx.terminal import Progress, counting_bar, progress_bar

    def stages(title: str, unit: str) -> AbstractContextManager[Progress]:
        return counting_bar(title, unit, quiet=quiet) if unit else progress_bar(title, quiet=quiet)

    result = merge_models(
        recipe,
        out,
        bits=int(bits) if bits else None,
        group_size=int(group_size),
        dtype=dtype,
        no_positive=no_positive,
        held_out=held_out,
        seed=seed,
        measure=measure,
        force=force,
        stages=stages,
    )
    if as_json:
        print(json.dumps(report_of(result), indent=2))
    elif not quiet:
        print_merged(result)
