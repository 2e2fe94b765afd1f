"""The short way to run a model, and commands for what is on the disk: run, list, rm."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.options import (
    Drafting,
    Generation,
    Json,
    KVCache,
    Loading,
    Model,
    Quiet,
    Sampling,
    Xtc,
)
from outlier_mlx.cli.running import CHAT_GENERATION, CHAT_SAMPLING, chat, generate


@command("Run", 'run ./tier "How do I find Vega?"')
def run(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]", help="What to answer; - reads it from stdin. Without it: a chat."
        ),
    ] = None,
    *,
    generation: Generation = CHAT_GENERATION,
    sampling: Sampling = CHAT_SAMPLING,
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    quiet: Quiet = False,
) -> None:
    """Answer a prompt, as `generate` does, or talk, as `chat` does if there is no prompt."""
    if not prompt:
        chat(
            model,
            generation=generation,
            sampling=sampling,
            cache=cache,
            drafting=drafting,
            loading=loading,
            quiet=quiet,
        )
        return
    generate(
        model,
        " ".join(prompt),
        generation=generation,
        sampling=sampling,
        xtc=Xtc(),
        cache=cache,
        drafting=drafting,
        loading=loading,
        quiet=quiet,
    )


@command("Run", "list ./tiers", name="list")
def list_models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]", help="A model's folder, or one that holds several."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models in the hub's cache, and in folders: size, form, and last use."""
    from outlier_mlx.checkpoints.inventory import in_cache, in_folder

    found = [model for folder in folders or () for model in in_folder(folder)] + in_cache()
    if as_json:
        print_json([model.as_json() for model in found])
        return
    from outlier_mlx.errors import one_line
    from outlier_mlx.terminal import print_columns, size, stdout

    if not found:
        more = "" if folders else "; name folders to look in, such as: outlier-mlx list ."
        say(f"no models in the hub's cache{' and in these folders' if folders else more}")
        return
    now = time.time()
    rows = [
        (one_line(model.name), one_line(model.form), size(model.nbytes), _ago(now - model.used))
        for model in found
    ]
    print_columns(stdout(), ["name", "form", "size", "last use"], rows, left=2)


@command("Run", "rm ./tier")
def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folder that outlier-mlx wrote, or repository in the hub's cache."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Remove models from the disk: tiers and imported models, and what came from the hub."""
    from outlier_mlx.checkpoints.inventory import remove_from_cache, size_in_cache
    from outlier_mlx.storage.hub import local_source
    from outlier_mlx.storage.paths import files_below, named
    from outlier_mlx.terminal import size
    from outlier_mlx.writing.folders import check_removable, remove_folder

    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("is needed, since nobody can be asked here", param_hint="--yes")
    folders = {model: None if local_source(model) is None else named(model) for model in models}
    sizes = {}
    for model, folder in folders.items():  # nothing is removed if one of them may not be
        if folder is None:
            sizes[model] = size_in_cache(model)
        else:
            check_removable(folder)
            sizes[model] = sum(path.stat().st_size for path in files_below(folder, hidden=True))
    for model, folder in folders.items():
        what = "from the hub's cache, which other programs use, too" if folder is None else ""
        question = " ".join(filter(None, ("Remove", model, what, f"({size(sizes[model])})?")))
        if not yes and not typer.confirm(question, err=True):
            say(f"{model}: not removed")
            continue
        if folder is None:
            remove_from_cache(model)
        else:
            remove_folder(folder)
        if not quiet:
            say(f"{model}: removed, {size(sizes[model])}")


def _ago(seconds: float) -> str:
    """A time in the past, such as "3 days ago"."""
    for unit, length in (("year", 31557600), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if (number := int(seconds // length)) >= 1:
            return f"{number} {unit}{'s' * (number > 1)} ago"
    return "just now"
