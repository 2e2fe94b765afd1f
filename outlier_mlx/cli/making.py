"""Commands that make and check tiers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import app, say
from outlier_mlx.cli.options import (
    BaseBits,
    Debug,
    DType,
    Experts,
    ExportFormat,
    Force,
    GroupSize,
    Quiet,
    Tier,
)
from outlier_mlx.cli.sharing import push_converted, require_pushable


@app.command(
    epilog="Example: `outlier-mlx convert ./overlay --base Qwen/Qwen2.5-7B-Instruct --out ./tier`"
)
def convert(
    overlay: Annotated[str, typer.Argument(help="Folder or hub repository of the overlay.")],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub repository of the base, if the overlay holds none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make. Default: ./NAME-RECIPE.")
    ] = None,
    tier: Annotated[
        Tier, typer.Option(help="Recipe; auto takes the best that fits this machine.")
    ] = "q4",
    base_bits: Annotated[
        BaseBits | None, typer.Option(help="Bits a weight of the base; none: unquantized.")
    ] = None,
    group_size: Annotated[
        GroupSize | None, typer.Option(help="Weights of the base that share a scale.")
    ] = None,
    experts: Annotated[Experts | None, typer.Option(help="Format of the experts.")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of activations and scales. Default: the checkpoint's.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="A model that mlx-lm loads without this package.")
    ] = False,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|original",
            help="Alphas that win over the overlay's (JSON); original: without alpha_overlay.pt.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The overlay's revision on the hub.")] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="The base's revision on the hub.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Fetch one file of a repository at a time, then delete it."),
    ] = False,
    upload_repo: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push the tier to the hub; see `push`."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn an overlay and its base into a tier."""
    from outlier_mlx.cli.tables import print_report
    from outlier_mlx.terminal import progress_bar
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.presets import make_recipe

    if upload_repo is not None:
        require_pushable(upload_repo)
    name: str = tier
    if tier == "auto":
        from outlier_mlx.tiers.choose import best, list_choices

        choices = list_choices(overlay, base, revision=revision, base_revision=base_revision)
        name = best(*choices)
    recipe = make_recipe(
        name,
        base_bits=base_bits,
        group_size=int(group_size) if group_size else None,
        experts=experts,
        dtype=dtype,
        portable=portable,
    )
    with progress_bar("converting", quiet=quiet) as progress:
        report = convert_tier(
            overlay,
            base,
            out,
            recipe=recipe,
            alpha=alpha,
            force=force,
            revision=revision,
            base_revision=base_revision,
            stream=stream,
            progress=progress,
        )
    if not quiet:
        print_report(report)
    if upload_repo is not None:
        push_converted(report.path, upload_repo, quiet=quiet)


@app.command(epilog="Example: `outlier-mlx tiers ./overlay --base ./base --ram 32`")
def tiers(
    overlay: Annotated[str, typer.Argument(help="Folder or hub repository of the overlay.")],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub repository of the base, if the overlay holds none."),
    ] = None,
    ram: Annotated[
        float | None, typer.Option(min=1, help="Choose for a Mac with so many GB of memory.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The overlay's revision on the hub.")] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="The base's revision on the hub.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the recipes: size, memory at two lengths of context, and what fits."""
    from outlier_mlx.tiers.choose import as_json_object, list_choices

    choices, available = list_choices(
        overlay, base, ram_gb=ram, revision=revision, base_revision=base_revision
    )
    if as_json:
        print(json.dumps(as_json_object(choices, available), indent=2))
        return
    from outlier_mlx.cli.tables import print_choices

    print_choices(choices, available)


@app.command(epilog="Example: `outlier-mlx verify ./tier`")
def verify(
    tier: Annotated[Path, typer.Argument(help="Folder of a tier, or of an imported model.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every file, shape and byte range of a tier; the first damage is named."""
    from outlier_mlx.terminal import progress_bar, size
    from outlier_mlx.tiers.verify import verify_tier

    with progress_bar("verifying", quiet=quiet) as progress:
        found = verify_tier(tier, progress)
    print(f"{tier}: whole: {found.files} files, {found.tensors} tensors, {size(found.nbytes)}")


@app.command(epilog="Example: `outlier-mlx export ./tier --format packed --out ./packed`")
def export(
    tier: Annotated[str, typer.Argument(help="Folder or hub repository of a tier.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        ExportFormat, typer.Option(help="V3.2 overlay, packed directory, or GGUF tensors.")
    ] = "overlay",
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a tier's experts, routers and alphas for other tools, exactly as they are."""
    from outlier_mlx.checkpoints.export import export_tier
    from outlier_mlx.terminal import progress_bar, size

    with progress_bar("exporting", quiet=quiet) as progress:
        written = export_tier(tier, out, format, revision=revision, progress=progress)
    if not quiet:
        base = f"without the base ({written.base})" if written.base else "with the base"
        say(f"{written.path}: {written.format}, {size(written.nbytes)}, {base}")
