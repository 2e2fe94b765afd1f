"""Commands that check and share models: verify, export, push."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from outlier_mlx.cli.app import command, say
from outlier_mlx.cli.command import GENERAL
from outlier_mlx.cli.options import DType, Force, ModelFolder, OutFolder, Quiet, Revision
from outlier_mlx.errors import OutlierError

if TYPE_CHECKING:
    from outlier_mlx.tiers.publication import Publication


@command("Share", "verify ./tier")
def verify(model: ModelFolder, quiet: Quiet = False) -> None:
    """Check every file, shape and byte range of a tier; the first damage is named."""
    from outlier_mlx.storage.paths import named
    from outlier_mlx.terminal import progress_bar, size
    from outlier_mlx.tiers.verify import verify_tier

    model = named(model)
    with progress_bar("verifying", quiet=quiet) as progress:
        found = verify_tier(model, progress)
    print(f"{model}: whole: {found.files} files, {found.tensors} tensors, {size(found.nbytes)}")


@command("Share", "export ./tier --format packed --out ./packed")
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub repository of a tier or a ternary model; of an overlay, for its"
            " experts alone.",
        ),
    ],
    out: OutFolder,
    format: Annotated[
        Literal["overlay", "packed", "gguf", "gguf-experts", "transformers", "mlx2"],
        typer.Option(
            metavar="FORMAT",
            help="overlay: V3.2. packed: a directory. gguf: a whole model for llama.cpp."
            " gguf-experts: its experts alone. transformers: a whole model for it. mlx2, of a"
            " ternary model: a 2-bit pack for stock mlx-lm.",
        ),
    ] = "overlay",
    experts: Annotated[
        Literal["tq2_0", "tq1_0", "q4_0"] | None,
        typer.Option(
            help="gguf: how trits are stored, in 2.1, 1.7 or 4.5 bits. Default: tq2_0.",
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="transformers: dtype of the weights. Default: float32; the others round.",
        ),
    ] = None,
    revision: Revision = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a tier, experts alone, or a ternary model for other tools."""
    from outlier_mlx.checkpoints.export import GGUF, MLX2, export_tier
    from outlier_mlx.checkpoints.export_transformers import TRANSFORMERS
    from outlier_mlx.engine.loading import open_model
    from outlier_mlx.terminal import progress_bar, size
    from outlier_mlx.writing.parts import Parts

    if dtype is not None and format != TRANSFORMERS:
        raise typer.BadParameter("only --format transformers has it", param_hint="--dtype")

    def tell(tensors: Parts) -> None:
        if format == TRANSFORMERS and not quiet:
            say(f"{out}: {size(tensors.nbytes)} of weights in {dtype or 'float32'}")

    if experts is not None and format != GGUF:
        raise typer.BadParameter("only --format gguf has it", param_hint="--experts")
    with progress_bar("exporting", quiet=quiet) as progress:
        written = export_tier(
            model,
            out,
            format,
            dtype=dtype or "float32",
            revision=revision,
            force=force,
            planned=tell,
            progress=progress,
            experts=experts or "tq2_0",
            opened=open_model,
        )
    if not quiet:
        base = f", without the base ({written.base})" if written.base else ", with the base"
        more = "" if format in (GGUF, MLX2, TRANSFORMERS) else base
        for note in written.notes:
            say(note)
        say(f"{written.path}: {written.format}, {size(written.nbytes)}{more}")


@command("Share", "push ./tier my-name/my-tier --private")
def push(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a tier, ternary model or own overlay."),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Push only to a private repository; make a new one private."
        ),
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="Licence of sources whose model cards state none."
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md",
            exists=True,
            dir_okay=False,
            help="Model card to push instead of the generated one.",
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.json",
            help="Scores for the card, as `eval --out` wrote them. Repeatable.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch to push to; made if it does not exist."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; list the files and print the card.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace another tier, or add to other files.",
            rich_help_panel=GENERAL,
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Upload a tier, ternary model or own overlay: verified, with a model card, in one commit."""
    from outlier_mlx.measure.eval_results import read
    from outlier_mlx.storage.paths import named
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import progress_bar, size
    from outlier_mlx.tiers.publication import prepare
    from outlier_mlx.tiers.push import check_login

    require_repo_name(repo)
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", licence):
        raise typer.BadParameter(
            f"{licence!r} is no identifier of a licence, such as apache-2.0", param_hint="--license"
        )
    if not dry_run:
        check_login(repo)
    evaluations = [read(path) for path in results or ()]
    with progress_bar("verifying", quiet=quiet) as progress:
        publication = prepare(
            named(model),
            repo,
            private=private,
            licence=licence,
            card=read_utf8(card) if card is not None else None,
            evaluations=evaluations,
            progress=progress,
        )
    if dry_run:
        for upload in publication.uploads.values():
            say(f"{upload.name}  {size(upload.nbytes)}")
        say(f"{repo}: {len(publication.uploads)} files, {size(publication.nbytes)}; nothing sent")
        print(publication.card, end="")
        return
    send(publication, revision=revision, message=message, force=force, quiet=quiet)


def require_repo_name(repo: str) -> None:
    """End in a usage error unless `repo` is a name that repositories on the hub have."""
    from outlier_mlx.tiers.publication import check_repo_name

    try:
        check_repo_name(repo)
    except OutlierError as error:
        raise typer.BadParameter(str(error)) from None


def push_converted(tier: Path, repo: str, *, quiet: bool) -> None:
    """Push a tier that was just written; if that fails, say that the tier itself is there."""
    from outlier_mlx.terminal import progress_bar
    from outlier_mlx.tiers.publication import prepare

    try:
        with progress_bar("verifying", quiet=quiet) as progress:
            publication = prepare(tier, repo, progress=progress)
        send(publication, quiet=quiet)
    except OutlierError:
        say(f"{tier} is written; `outlier-mlx push` sends it")
        raise


def send(
    publication: "Publication",
    *,
    revision: str | None = None,
    message: str | None = None,
    force: bool = False,
    quiet: bool,
) -> None:
    """Publish, and print where it is."""
    from outlier_mlx.terminal import size
    from outlier_mlx.tiers.push import publish

    repo = publication.repo
    try:
        published = publish(
            publication, revision=revision, message=message, force=force, quiet=quiet
        )
    except KeyboardInterrupt:
        say(f"{repo}: what is there is either as it was or all new: commits are atomic")
        raise
    if not quiet:
        same = len(publication.uploads) - len(published.sent)
        removed = f", {len(published.removed)} removed" if published.removed else ""
        say(
            f"{repo}: {len(published.sent)} files sent ({size(published.nbytes)}),"
            f" {same} already there{removed}"
        )
    print(published.url)
