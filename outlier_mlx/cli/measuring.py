"""Commands that describe and measure models: info, bench, perplexity, routing."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import command, print_json, say
from outlier_mlx.cli.loading import load_beside, load_checked
from outlier_mlx.cli.options import (
    Force,
    Json,
    Loading,
    Model,
    NoPlots,
    Plots,
    PrefillStep,
    Quiet,
    Revision,
    TextFile,
    TierModel,
    Window,
    Windows,
)
from outlier_mlx.cli.replaying import check_given, replay_trace
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress

_replaying = partial(typer.Option, rich_help_panel="Replaying a trace")


@command("Measure", "info Qwen/Qwen2.5-7B-Instruct --json")
def info(
    model: Model,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="NAME.gguf", help="Which GGUF file of the folder or repository to read."
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Read the weights, too, to tell which are ternary."),
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Describe a tier, overlay or model: its parts, its size, and the memory it needs."""
    from outlier_mlx.checkpoints.info import inspect
    from outlier_mlx.terminal import progress_bar, size, stderr

    headers = ExitStack()

    @contextmanager
    def reading(nbytes: int, remote: bool) -> Iterator[Progress]:
        headers.close()  # a terminal shows one bar at a time
        if nbytes and remote:
            stderr().print(f"reading up to {size(nbytes)} of weights from the hub", soft_wrap=True)
        with progress_bar("reading weights", quiet=False) as progress:
            yield progress

    with headers:
        progress = headers.enter_context(
            progress_bar("reading headers", "files", quiet=False, at_once=False)
        )
        found = inspect(model, revision, progress, file=file, deep=deep, reading=reading)
    if as_json:
        print_json(found.as_json())
        return
    from outlier_mlx.cli.tables import print_info

    print_info(found)


@command("Measure", "bench ./tier -p 512 -g 128")
def bench(
    ctx: typer.Context,
    loading: Loading,
    model: Model = "",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, help="Length of the prompt.")
    ] = 512,
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=2, help="Number of tokens to generate.")
    ] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts at a time.")
    ] = 1,
    num_trials: Annotated[
        int, typer.Option("--num-trials", "-n", min=1, help="Number of timed runs.")
    ] = 5,
    prefill_step_size: PrefillStep = 2048,
    delay: Annotated[int, typer.Option(min=0, help="Seconds between runs.")] = 0,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time the variants of the decode kernels instead.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="With --kernels: use the best variants from now on.")
    ] = False,
    settings: Annotated[
        bool,
        typer.Option("--settings", help="Compare sizes of MLX's command buffers on this machine."),
    ] = False,
    trace: Annotated[
        Path | None,
        _replaying(metavar="FILE", help="Replay what `routing --trace` recorded; takes no MODEL."),
    ] = None,
    chip: Annotated[
        str | None,
        _replaying(metavar="NAME", help="Chip for tokens/s, such as 'M2 Pro'. Default: this one."),
    ] = None,
    disk: Annotated[
        float | None,
        _replaying(metavar="GB/S", min=1e-3, max=1e3, help="Speed of the disk, for tokens/s."),
    ] = None,
    out: Annotated[
        Path | None,
        _replaying(metavar="FILE", help="Also draw a picture: FILE.png, FILE.svg or FILE.pdf."),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory; the flags are those of `mlx_lm.benchmark`."""
    if trace is not None:
        check_given(ctx, {"trace", "chip", "disk", "out", "as_json", "force", "quiet"})
        replay_trace(trace, chip, disk, out, as_json=as_json, force=force, quiet=quiet)
        return
    given = {"--chip": chip, "--disk": disk, "--out": out, "--force": force or None}
    for option in (name for name, value in given.items() if value is not None):
        raise typer.BadParameter("is for --trace alone", param_hint=option)
    if not model:
        ctx.fail("no model is given: name one, as argument MODEL or by --model MODEL")
    if settings and kernels:
        raise typer.BadParameter("compares speeds of a model, not kernels", param_hint="--settings")
    if save and not kernels:
        raise typer.BadParameter(
            "saves what --kernels finds, so it needs --kernels", param_hint="--save"
        )
    from outlier_mlx.cli import benching
    from outlier_mlx.measure.bench import BenchOptions

    options = BenchOptions(
        prompt_tokens, generation_tokens, batch_size, num_trials, prefill_step_size, delay
    )
    if settings:
        benching.bench_settings(model, loading, options, as_json=as_json, quiet=quiet)
    elif kernels:
        benching.bench_kernels(model, loading, options, save=save, as_json=as_json, quiet=quiet)
    else:
        benching.bench_speed(model, loading, options, as_json=as_json, quiet=quiet)


@command("Measure", "perplexity ./tier --text book.txt --against ./other")
def perplexity(
    model: Model,
    text: TextFile,
    loading: Loading,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, to measure the KL divergence from."),
    ] = None,
    window: Window = 512,
    windows: Windows = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Save the result with the model, for `push` and its card."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on a text, and the distance from another model."""
    from outlier_mlx.engine.distributed.ranks import ranks, shared
    from outlier_mlx.engine.paging.paged import statistics_of
    from outlier_mlx.measure import measured
    from outlier_mlx.measure import perplexity as compare
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import progress_bar

    if record and loading.expert_skip:
        raise OutlierError("--record: with --expert-skip the result depends on memory")
    folder = measured.require_recordable(model) if record else None
    loaded, tokenizer = load_checked(
        model, loading, window, beside=against, logits=window, quiet=quiet
    )
    content = str(shared(read_utf8(text) if ranks().leads else None))
    other = None
    if against is not None:
        other, other_tokenizer = load_beside(against, loading, quiet=quiet)
        compare.same_tokens(tokenizer, other_tokenizer, content)
    texts = compare.windows(tokenizer, content, window, windows)
    compare.warn_of_context(loaded, texts)
    with progress_bar("measuring", "tokens", quiet=quiet) as progress:
        found = compare.compare(loaded, texts, other, progress)
    paging = statistics_of(loaded)
    if paging is not None and not quiet:
        say(str(paging))
    if folder is not None and ranks().leads:
        new = found.measured(loaded, text, window=window, windows=windows, against=against)
        measured.record(folder, new)
    if as_json:
        of_paging = {} if paging is None else {"paging": paging.as_json()}
        print_json(found.as_json() | of_paging)
        return
    print(f"perplexity: {found.perplexity:.4f}")
    print(f"loss: {found.loss:.4f} +- {found.standard_error:.4f} nats, {found.tokens} tokens")
    if found.kl is not None and found.agreement is not None:
        print(f"KL divergence: {found.kl:.5f} nats")
        print(f"same likeliest token: {100 * found.agreement:.2f} %")


@command("Measure", "routing ./tier --text book.txt --out routing")
def routing(
    model: TierModel,
    text: TextFile,
    loading: Loading,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write routing.json and a picture into this folder."),
    ] = None,
    plots: Plots = "png",
    no_plots: NoPlots = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record each token's experts, for `bench --trace`."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --trace: tokens of each window that are a prompt, read at once; the others"
            " are decoded. [default: 0]",
        ),
    ] = None,
    window: Window = 512,
    windows: Windows = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Show which experts the tokens of a text use, layer by layer."""
    if prompt_tokens is not None and trace is None:
        raise typer.BadParameter("is for --trace alone", param_hint="--prompt-tokens")
    from outlier_mlx.measure import perplexity as compare
    from outlier_mlx.measure.expert_recorder import recording, trace_about
    from outlier_mlx.measure.expert_trace import write_trace
    from outlier_mlx.measure.pictures import require_matplotlib
    from outlier_mlx.measure.routing import FILES, draw, observe_routing, print_routing
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.storage.output import check_folder, check_writable, clear_folder, write_whole
    from outlier_mlx.storage.texts import read_utf8
    from outlier_mlx.terminal import progress_bar

    if out is not None:
        check_folder(out, FILES, force=force, sources=[model, text])
        if not no_plots:
            require_matplotlib(", or --no-plots")
    if trace is not None:
        check_writable(trace, force=force, sources=[model, text])
    source = resolve(model, loading.revision)
    loaded, tokenizer = load_checked(source, loading, window, logits=window, quiet=quiet)
    texts = compare.windows(tokenizer, read_utf8(text), window, windows)
    compare.warn_of_context(loaded, texts)
    with progress_bar("routing", "tokens", quiet=quiet) as progress, ExitStack() as watching:
        recorder = None if trace is None else watching.enter_context(recording(loaded))
        layers = observe_routing(loaded, texts, progress)
    if recorder is not None and trace is not None:
        described = trace_about(source, loaded, text.name, len(texts[0]) // 2)
        write_trace(recorder.trace(described).decoded(prompt_tokens or 0), trace)
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
