"""Commands that make models: convert, import, merge, tiers, demo."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.options import (
    Base,
    BaseBits,
    BaseRevision,
    DType,
    Experts,
    Force,
    GroupSize,
    Json,
    OutFolder,
    Overlay,
    OverlayRevision,
    Quiet,
    Recipe,
    Revision,
)
from outlier_mlx.cli.sharing import push_converted, require_repo_name
from outlier_mlx.models.quantization import DEFAULT_GROUP_SIZE


@command("Make", "convert ./overlay --base Qwen/Qwen2.5-7B-Instruct --out ./tier")
def convert(
    overlay: Overlay,
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to write. Default: ./NAME-RECIPE."),
    ] = None,
    tier: Annotated[
        Recipe, typer.Option(help="Recipe; auto takes the best one that fits this machine.")
    ] = "q4",
    base_bits: Annotated[
        BaseBits | None,
        typer.Option(help="Bits a weight of the base; none, 16 and 32: unquantized."),
    ] = None,
    group_size: Annotated[
        GroupSize | None, typer.Option(help="Weights of the base that share a scale.")
    ] = None,
    experts: Annotated[Experts | None, typer.Option(help="Format of the experts.")] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Dtype of activations and scales. Default: the checkpoint's."),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Write a model that mlx-lm loads without this package."),
    ] = False,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|original",
            help="Alphas to use instead of the overlay's; original: those without"
            " alpha_overlay.pt.",
        ),
    ] = None,
    revision: OverlayRevision = None,
    base_revision: BaseRevision = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Download one file of a repository at a time, and delete it after use."
        ),
    ] = False,
    upload_repo: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push the tier to this repository on the hub."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn an overlay and its base into a tier."""
    from outlier_mlx.cli.tables import print_report
    from outlier_mlx.terminal import progress_bar
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.plan import Plan
    from outlier_mlx.tiers.presets import make_recipe
    from outlier_mlx.tiers.push import check_login

    if upload_repo is not None:
        # Refuse before hours of work what could not be pushed after it.
        require_repo_name(upload_repo)
        check_login(upload_repo)
    changes: dict[str, Any] = {
        "base_bits": base_bits,
        "group_size": group_size,
        "experts": experts,
        "dtype": dtype,
        "portable": portable,
    }
    name: str = tier
    if tier == "auto":
        from outlier_mlx.tiers.choose import best, list_choices

        revisions: dict[str, Any] = {"revision": revision, "base_revision": base_revision}
        name = best(*list_choices(overlay, base, **revisions, changes=changes))
    recipe = make_recipe(name, **changes)

    def tell(plan: Plan) -> None:
        for note in () if quiet else plan.notes:
            say(note)

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
            planned=tell,
            progress=progress,
        )
    if not quiet:
        print_report(report)
    if upload_repo is not None:
        push_converted(report.path, upload_repo, quiet=quiet)


@command("Make", "import ./Confinus-2x7B-AWQ --out ./confinus", name="import")
def import_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, .gguf file or hub repository of an AWQ, GGUF or ternary model.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write. Default: ./NAME-mlx.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            help="Dtype of scales and biases; float16 is smaller, but rounds: errors are reported."
        ),
    ] = None,
    bits: Annotated[
        Literal[4, 5] | None,
        typer.Option(help="AWQ: bits a weight; 5 is exact with scales and biases in float16."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="NAME.gguf", help="GGUF: which file of the folder or repository to read."
        ),
    ] = None,
    k_quants: Annotated[
        Literal["8bit", "float16", "float32"] | None,
        typer.Option(help="GGUF: how Q2_K, Q3_K and Q6_K are stored. Default: 8bit."),
    ] = None,
    experts: Annotated[
        Experts | None,
        typer.Option(
            help="GGUF: how ternary weights, experts or not, are stored; affine2 is for stock"
            " mlx-lm. Default: tq1_0."
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Ternary models: refuse quantized matrices that are not ternary."
        ),
    ] = False,
    revision: Revision = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn an AWQ, GGUF or ternary model into an MLX folder."""
    if bits == 5 and dtype == "float32":
        raise typer.BadParameter(
            "5 is for scales in float16: in float32, 4 bits are exact", param_hint="--bits"
        )
    from outlier_mlx.cli.tables import print_imported
    from outlier_mlx.imports import import_model
    from outlier_mlx.terminal import progress_bar

    name = Path(model).resolve().name if Path(model).exists() else model.rsplit("/", 1)[-1]
    with progress_bar("importing", quiet=quiet) as progress:
        written = import_model(
            model,
            out if out is not None else Path(f"{name.removesuffix('.gguf')}-mlx"),
            dtype=dtype,
            bits=bits,
            file=file,
            k_quants=k_quants,
            experts=experts,
            strict=strict,
            revision=revision,
            force=force,
            progress=progress,
        )
    if not quiet:
        print_imported(written)


@command("Make", "merge merge.yaml --out ./merged")
def merge(
    merge_config: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.yaml", help="Merge configuration, in the format of mergekit-moe."
        ),
    ],
    out: OutFolder,
    bits: Annotated[
        Literal[4, 8] | None,
        typer.Option(
            help="Quantize and write an MLX folder. Default: unquantized, with Hugging Face's"
            " tensor names."
        ),
    ] = None,
    group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help=f"Weights that share a scale, with --bits. Default: {DEFAULT_GROUP_SIZE}."
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Dtype of unquantized weights. Default: the configuration's."),
    ] = None,
    no_positive: Annotated[
        Literal["error", "bos", "zero"] | None,
        typer.Option(help="How to treat an expert without positive prompts."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="For each expert, a list of prompts to measure routing on."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Run the merged model on prompts to measure its routing.")
    ] = True,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Seed of random routers and noise.")
    ] = 0,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Merge dense models into a mixture of experts (a frankenMoE)."""
    from outlier_mlx.merge import merge as merge_models
    from outlier_mlx.merge.report import as_json as report_of
    from outlier_mlx.merge.tables import print_merged
    from outlier_mlx.terminal import progress_bar

    if group_size is not None and bits is None:
        raise typer.BadParameter("only --bits makes groups", param_hint="--group-size")

    result = merge_models(
        merge_config,
        out,
        bits=bits,
        group_size=group_size or DEFAULT_GROUP_SIZE,
        dtype=dtype,
        no_positive=no_positive,
        held_out=held_out,
        seed=seed,
        measure=measure,
        force=force,
        stages=partial(progress_bar, quiet=quiet),
    )
    if as_json:
        print_json(report_of(result))
    elif not quiet:
        print_merged(result)


@command("Make", "tiers ./overlay --base ./base --ram 32")
def tiers(
    overlay: Overlay,
    base: Base = None,
    ram: Annotated[
        float | None,
        typer.Option(
            min=1, help="Choose for a Mac with this many GB of memory. Default: this machine."
        ),
    ] = None,
    revision: OverlayRevision = None,
    base_revision: BaseRevision = None,
    as_json: Json = False,
) -> None:
    """List the recipes: size, memory at two lengths of context, and what fits."""
    from outlier_mlx.cli.tables import print_choices
    from outlier_mlx.tiers.choose import as_json_object, list_choices

    choices, available = list_choices(
        overlay, base, ram_gb=ram, revision=revision, base_revision=base_revision
    )
    if as_json:
        print_json(as_json_object(choices, available))
    else:
        print_choices(choices, available)


@command("Make", "demo --out ./demo-tier")
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the converted tier in this folder.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Measure on all held-out documents.")
    ] = False,
    files: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Only copy the embedded models, texts and tasks into this folder.",
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Convert the embedded pair, measure it, and let it write."""
    from outlier_mlx.cli.showcase import put_files, run

    if files is not None:
        if out is not None or full or force:
            raise typer.BadParameter(
                "cannot be used with --out, --full or --force", param_hint="--files"
            )
        print(*put_files(files), sep="\n")
        return
    run(out, full=full, force=force, quiet=quiet)
