"""Commands that measure models and tune them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import app, say
from outlier_mlx.cli.models import load_visibly
from outlier_mlx.cli.options import Debug, DType, Force, IgnoreMemory, Quiet
from outlier_mlx.measure.pictures import Format

Text = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="A text file, UTF-8.", show_default=False)
]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Windows = Annotated[int | None, typer.Option(min=1, help="Windows at most. Default: all.")]


@app.command(epilog="Example: `outlier-mlx perplexity ./tier --text book.txt --against ./other`")
def perplexity(
    model: Annotated[str, typer.Argument(help="Folder or hub repository of a model.")],
    text: Text,
    against: Annotated[
        str | None, typer.Option(help="Another model, to measure the distance to.")
    ] = None,
    window: Window = 512,
    windows: Windows = None,
    dtype: Annotated[DType | None, typer.Option(help="Of activations.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep it in the tier; `push` puts it into the card.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on a text, and the distance from another model."""
    from outlier_mlx.measure import measured
    from outlier_mlx.measure import perplexity as compare
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import counting_bar

    folder = measured.require_tier(model) if record else None
    loaded, tokenizer = load_visibly(model, dtype, quiet=quiet)
    content = read_utf8(text)
    other = None
    if against is not None:
        other, other_tokenizer = load_visibly(against, dtype, quiet=quiet)
        compare.same_tokens(tokenizer, other_tokenizer, content)
    texts = compare.windows(tokenizer, content, window, windows)
    with counting_bar("measuring", "tokens", quiet=quiet) as progress:
        found = compare.compare(loaded, texts, other, progress)
    if folder is not None:
        new = measured.describe(
            text, found, loaded, window=window, windows=windows, against=against
        )
        measured.record(folder, new)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    print(f"perplexity: {found.perplexity:.4f}")
    print(f"loss: {found.loss:.4f} +- {found.standard_error:.4f} nats, {found.tokens} tokens")
    if found.kl is not None and found.agreement is not None:
        print(f"KL divergence: {found.kl:.5f} nats")
        print(f"same likeliest token: {100 * found.agreement:.2f} %")


@app.command(epilog="Example: `outlier-mlx routing ./tier --text book.txt --out routing`")
def routing(
    model: Annotated[str, typer.Argument(help="Folder or hub repository of a tier.")],
    text: Text,
    out: Annotated[
        Path | None, typer.Option(help="Write routing.json and routing.png into this folder.")
    ] = None,
    plots: Annotated[Format, typer.Option(help="File format of the picture.")] = "png",
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no picture.")] = False,
    window: Window = 512,
    windows: Windows = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which experts serve a text, layer by layer."""
    from outlier_mlx.cli.tables import print_routing
    from outlier_mlx.measure import perplexity as compare
    from outlier_mlx.measure.pictures import require_matplotlib
    from outlier_mlx.measure.routing import FILES, draw, observe_routing
    from outlier_mlx.storage.output import check_folder, clear_folder, write_whole
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import counting_bar

    if out is not None:
        check_folder(out, FILES, force=force)
        if not no_plots:
            require_matplotlib(", or --no-plots")
    loaded, tokenizer = load_visibly(model, quiet=quiet)
    texts = compare.windows(tokenizer, read_utf8(text), window, windows)
    with counting_bar("routing", "tokens", quiet=quiet) as progress:
        layers = observe_routing(loaded, texts, progress)
    report = json.dumps([layer.as_json() for layer in layers], indent=2)
    if out is not None:
        clear_folder(out, FILES)
        write_whole(out / "routing.json", report + "\n")
        if not no_plots:
            draw(layers, out / f"routing.{plots}")
    if as_json:
        print(report)
    else:
        print_routing(layers)


@app.command(epilog="Example: `outlier-mlx tune-alpha ./tier --text book.txt --out alpha.json`")
def tune_alpha(
    model: Annotated[str, typer.Argument(help="Folder or hub repository of a tier.")],
    text: Text,
    out: Annotated[Path, typer.Option(help="The alpha.json to write.")] = Path("alpha.json"),
    teacher: Annotated[
        str | None, typer.Option(help="Learn this model's predictions, not the text's tokens.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Adam's.")] = 0.02,
    window: Window = 256,
    windows: Windows = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the alphas alone; a fifth of the text is held out to judge them."""
    from outlier_mlx.measure import perplexity as compare
    from outlier_mlx.measure.alphas import save_alphas, tune_alphas
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import counting_bar

    loaded, tokenizer = load_visibly(model, quiet=quiet)
    other = load_visibly(teacher, quiet=quiet)[0] if teacher is not None else None
    texts = compare.windows(tokenizer, read_utf8(text), window, windows)
    with counting_bar("tuning", "windows", quiet=quiet) as progress:
        tuned = tune_alphas(
            loaded,
            texts,
            teacher=other,
            epochs=epochs,
            learning_rate=learning_rate,
            progress=progress,
        )
    print(f"held-out perplexity before: {tuned.before.perplexity:.4f}")
    print(f"held-out perplexity after: {tuned.after.perplexity:.4f}")
    if tuned.before.kl is not None and tuned.after.kl is not None:
        print(f"KL from the teacher before: {tuned.before.kl:.5f} nats")
        print(f"KL from the teacher after: {tuned.after.kl:.5f} nats")
    save_alphas(tuned, out, force=force)
    print(f"wrote {out}")


@app.command(epilog="Example: `outlier-mlx bench --model ./tier -p 512 -g 128`")
def bench(
    model: Annotated[str, typer.Option(help="Folder or hub repository of a tier.")],
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, help="Length of the prompt.")
    ] = 512,
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=2, help="Length of what is written.")
    ] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts at a time.")
    ] = 1,
    num_trials: Annotated[
        int, typer.Option("--num-trials", "-n", min=1, help="Runs that are timed.")
    ] = 5,
    prefill_step_size: Annotated[
        int, typer.Option(min=1, help="Prompt tokens processed at a time.")
    ] = 2048,
    delay: Annotated[int, typer.Option(min=0, help="Seconds between runs.")] = 0,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time the decode kernels' variants instead.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="With --kernels: use the best from now on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of activations. Default: the tier's; float32 on the CPU.")
    ] = None,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory; the flags are those of `mlx_lm.benchmark`."""
    from outlier_mlx.engine.memory import check_fits
    from outlier_mlx.measure.bench import BenchOptions, bench_model
    from outlier_mlx.measure.bench_kernels import bench_kernels, kernels_run_here, save_best
    from outlier_mlx.measure.bench_tables import print_kernels, print_result
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.terminal import counting_bar

    if save and not kernels:
        raise typer.BadParameter(
            "keeps what --kernels finds, so it goes with it", param_hint="--save"
        )
    if kernels and not kernels_run_here(required=save):
        say("no Metal here, so there are no kernels to time: this is the plain path in MLX alone")
    source = resolve(model, revision)
    if not ignore_memory:
        check_fits(source.folder, batch_size * (prompt_tokens + generation_tokens))
    loaded, tokenizer = load_visibly(source, dtype, quiet=quiet)
    with counting_bar("measuring", "runs", quiet=quiet) as progress:
        if kernels:
            timed = bench_kernels(loaded, num_trials, batch_size, progress)
        else:
            options = BenchOptions(
                prompt_tokens, generation_tokens, batch_size, num_trials, prefill_step_size, delay
            )
            result = bench_model(loaded, tokenizer, options, progress)
    if as_json:
        found = timed.as_json() if kernels else result.as_json()
        print(json.dumps({"model": source.name} | found, indent=2))
    elif kernels:
        print_kernels(source.name, timed)
    else:
        print_result(source.name, result)
    if kernels:
        for error in timed.errors:
            say(error)
        if save:
            say(f"saved the best variants in {save_best(timed)}")
        if timed.errors:
            raise typer.Exit(1)
