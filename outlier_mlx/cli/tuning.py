"""The command that trains a tier: tune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.loading import load_beside, load_checked, refuse_paging
from outlier_mlx.cli.options import (
    Force,
    Json,
    Loading,
    Quiet,
    TextFile,
    TierModel,
    Window,
    Windows,
)

if TYPE_CHECKING:
    from outlier_mlx.measure.tuning import Tuned

ALL = "alphas,rows,routers,base"


@command("Make", "tune ./tier --teacher ./unquantized --text book.txt --out ./tuned")
def tune(
    model: TierModel,
    text: TextFile,
    loading: Loading,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.json",
            help="Tier to write, or a file of alphas. Default: ./NAME-tuned.",
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to train: alphas; rows: scales of the experts' rows; routers; base: its"
            " scales, biases and norms.",
        ),
    ] = ALL,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Learn this model's predictions, not the text's tokens."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.1, help="Divides the logits of both, with --teacher.")
    ] = 4.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Windows whose gradients make a step.")] = 4,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Learning rate of Adam, for a number of size 1.")
    ] = 0.002,
    window: Window = 256,
    windows: Windows = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train the numbers of a tier that are not codes; a fifth of the text decides what is kept."""
    from outlier_mlx.engine.loading import load_tokenizer
    from outlier_mlx.measure import perplexity
    from outlier_mlx.measure.tuning import kept_tokens, plan_tuning
    from outlier_mlx.measure.tuning import tune as train
    from outlier_mlx.models.config import raw_config
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import progress_bar, size

    names = _parts(parts)
    target = out if out is not None else Path(f"{Path(model).name}-tuned")
    _check_target(target, names, force=force, sources=[model, teacher, text])
    loading = refuse_paging(loading, "a tier is trained through all experts")
    content = read_utf8(text)
    source = resolve(model, loading.revision)
    tokenizer = load_tokenizer(source.folder, raw_config(source.folder))
    texts = perplexity.windows(tokenizer, content, window, windows)
    kept = 0 if teacher is None else kept_tokens(texts, epochs)
    plan = plan_tuning(source.folder, names, len(texts[0]), teacher=teacher is not None, kept=kept)
    loaded, _ = load_checked(
        source, loading, window, beside=teacher, logits=window, more=plan.nbytes, quiet=quiet
    )
    if not quiet:
        say(f"{plan.numbers:,} numbers to train, with {size(plan.nbytes)} more memory at most")
    other = load_beside(teacher, loading, quiet=quiet)[0] if teacher is not None else None
    perplexity.warn_of_context(loaded, texts)
    with progress_bar("tuning", "windows", quiet=quiet) as progress:
        tuned = train(
            loaded,
            texts,
            names,
            teacher=other,
            temperature=temperature,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            dtypes=plan.dtypes,
            progress=progress,
        )
    if not quiet:
        say(f"peak memory: {size(tuned.peak)}")
    if as_json:
        print_json(tuned.as_json())
    else:
        _print(tuned)
    tuned.check_better()
    how = {
        "parts": names,
        "text": text.name,
        "teacher": None if teacher is None else Path(teacher).name,
    }
    _save(tuned, source.folder, target, how, [text, teacher], force=force)
    say(f"wrote {target}")


def _parts(given: str) -> list[str]:
    known = ALL.split(",")
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--parts"
            )
    return [name for name in known if name in names]


def _check_target(target: Path, names: list[str], *, force: bool, sources: list) -> None:
    from outlier_mlx.storage.output import check_writable
    from outlier_mlx.writing.folders import check_free

    if target.suffix != ".json":
        check_free(target, force=force, sources=sources)
        return
    if names != ["alphas"]:
        raise typer.BadParameter(
            "a .json file holds alphas only: add --parts alphas, or name a folder",
            param_hint="--out",
        )
    check_writable(target, force=force, sources=sources)


def _save(
    tuned: "Tuned", tier: Path, target: Path, how: dict[str, Any], inputs: list, *, force: bool
) -> None:
    if target.suffix == ".json":
        from outlier_mlx.storage.output import write_json

        write_json(target, tuned.alphas())
        return
    from outlier_mlx.tiers.tuned import write_tuned

    write_tuned(tier, target, tuned.tensors, how, inputs=inputs, force=force)


def _print(tuned: "Tuned") -> None:
    before, after = tuned.before, tuned.after
    print(f"held-out perplexity before: {before.perplexity:.4f}")
    print(f"held-out perplexity after: {after.perplexity:.4f}")
    if before.kl is not None and after.kl is not None:
        print(f"KL from the teacher before: {before.kl:.5f} nats")
        print(f"KL from the teacher after: {after.kl:.5f} nats")
