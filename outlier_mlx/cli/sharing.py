"""Commands that share tiers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlier_mlx.cli.app import app, say
from outlier_mlx.cli.options import Debug, Quiet

if TYPE_CHECKING:
    from outlier_mlx.tiers.push_card import Publication


@app.command(epilog="Example: `outlier-mlx push ./tier my-name/my-tier --private`")
def push(
    tier: Annotated[Path, typer.Argument(help="Folder of a tier.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only into a private repository; a new one will be.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="Licence of sources whose model cards state none."
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Model card to push instead of our own."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Scores for the card, as `eval --out` wrote them; any number of times."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch; made if there is none.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; list the files and print the card.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another tier, or add to other files.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a tier to the hub: verified, with a model card and its licences, in one commit."""
    from outlier_mlx.measure.eval_results import read
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import progress_bar, size
    from outlier_mlx.tiers.push import check_login
    from outlier_mlx.tiers.push_card import prepare

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
            tier,
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
    from outlier_mlx.errors import OutlierError
    from outlier_mlx.tiers.push_card import check_repo_name

    try:
        check_repo_name(repo)
    except OutlierError as error:
        raise typer.BadParameter(str(error)) from None


def require_pushable(repo: str) -> None:
    """Refuse before hours of work what could not be pushed after it: a bad name, or no login."""
    from outlier_mlx.tiers.push import check_login

    require_repo_name(repo)
    check_login(repo)


def push_converted(tier: Path, repo: str, *, quiet: bool) -> None:
    """Push a tier that was just written; if that fails, say that the tier itself is there."""
    from outlier_mlx.errors import OutlierError
    from outlier_mlx.terminal import progress_bar
    from outlier_mlx.tiers.push_card import prepare

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
