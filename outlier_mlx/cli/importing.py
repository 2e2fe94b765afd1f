"""The command that imports models of other formats."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlier_mlx.cli.app import app
from outlier_mlx.cli.options import AwqBits, Debug, Experts, Force, KQuants, Quiet, ScaleDType

if TYPE_CHECKING:
    from outlier_mlx.imports import Imported


@app.command(
    name="import",
    epilog="Example: `outlier-mlx import ./Confinus-2x7B-AWQ --out ./confinus`",
)
def import_(
    source: Annotated[str, typer.Argument(help="Folder, .gguf file or hub repository.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: ./NAME-mlx.")] = None,
    dtype: Annotated[
        ScaleDType | None,
        typer.Option(help="Of scales and biases; float16 is smaller and tells what it loses."),
    ] = None,
    bits: Annotated[
        AwqBits | None,
        typer.Option(help="AWQ: bits a weight; 5 is exact with scales and biases in float16."),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Which .gguf file of the folder or repository.")
    ] = None,
    k_quants: Annotated[
        KQuants | None,
        typer.Option(help="GGUF: how Q2_K, Q3_K and Q6_K are stored. Default: 8bit."),
    ] = None,
    experts: Annotated[
        Experts | None,
        typer.Option(help="GGUF: how TQ1_0 and TQ2_0 experts are stored. Default: tq1_0."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn an AWQ or GGUF model into an MLX folder."""
    if bits == "5" and dtype == "float32":
        raise typer.BadParameter("--bits 5 is for float16: in float32, 4 bits lose nothing")
    from outlier_mlx.imports import import_model
    from outlier_mlx.terminal import progress_bar

    name = Path(source).resolve().name if Path(source).exists() else source.rsplit("/", 1)[-1]
    with progress_bar("importing", quiet=quiet) as progress:
        written = import_model(
            source,
            out if out is not None else Path(f"{name.removesuffix('.gguf')}-mlx"),
            dtype=dtype,
            bits=int(bits) if bits else None,
            file=file,
            k_quants=k_quants,
            experts=experts,
            revision=revision,
            force=force,
            progress=progress,
        )
    if not quiet:
        _print_imported(written)


def _print_imported(written: "Imported") -> None:
    """What an import wrote, and what of it is not exact; for people, on stderr."""
    from outlier_mlx.errors import one_line
    from outlier_mlx.terminal import parts_table, stderr

    console = stderr()
    console.print(parts_table(written.rows, one_line(f"{written.path.name}: from {written.form}")))
    for line in (*written.notes, f"wrote {written.path}"):
        console.print(one_line(line), soft_wrap=True)
