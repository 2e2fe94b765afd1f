"""The command line: parse, call, print. No logic."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from outlier_mlx import __version__
from outlier_mlx.errors import OutlierError


class OneLineErrors(TyperGroup):
    """Ends a command in one clear line on stderr: exit code 1, or 130 after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; `--debug` shows the traceback of what ended it."""
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (OutlierError, OSError, MemoryError) as error:
            if ctx.meta.get("debug"):
                raise
            _say(f"error: {_one_line(error)}")
            raise typer.Exit(1) from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {_one_line(message) if isinstance(message, Warning) else message}")


def _say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().meta["debug"] = value
    return value


def _print_version(value: bool) -> None:
    if value:
        print(f"outlier-mlx {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no statistics.")]
IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Load the model even if it does not fit.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

Tier = Literal["auto", "q4", "q4-mixed", "q8", "bf16", "f16", "f32"]
BaseBits = Literal["4", "8", "none", "16", "32"]
GroupSize = Literal["32", "64", "128"]
Experts = Literal["tq1_0", "affine2"]
DType = Literal["bfloat16", "float16", "float32"]
ExportFormat = Literal["overlay", "packed", "gguf"]

app = typer.Typer(
    name="outlier-mlx",
    cls=OneLineErrors,
    help="Outlier models on Apple silicon: an int4 base plus ternary experts, in MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Outlier models on Apple silicon: an int4 base plus ternary experts, in MLX."""


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
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn an overlay and its base into a tier."""
    from outlier_mlx.terminal import print_report, progress_bar
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.presets import make_recipe

    name: str = tier
    if tier == "auto":
        from outlier_mlx.tiers.choose import best, list_choices

        name = best(*list_choices(overlay, base, revision=revision, base_revision=base_revision))
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
            progress=progress,
        )
    if not quiet:
        print_report(report)


@app.command(
    epilog='Example: `outlier-mlx generate --model ./tier --prompt "Once upon a time" --temp 0.7`'
)
def generate(
    model: Annotated[str, typer.Option(help="Folder or hub repository of a tier.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The prompt; - reads it from stdin.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate at most.")
    ] = 256,
    temp: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Minimum probability.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest; 0: all.")] = 0,
    xtc_probability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability of XTC sampling.")
    ] = 0.0,
    xtc_threshold: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Threshold of XTC sampling.")
    ] = 0.1,
    min_tokens_to_keep: Annotated[int, typer.Option(min=1, help="Tokens that min-p keeps.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="System prompt for the chat template.")
    ] = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the answer begins, in the chat template.")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Use the prompt as it is.")
    ] = False,
    max_kv_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache holds at most.")
    ] = None,
    prefill_step_size: Annotated[
        int, typer.Option(min=1, help="Prompt tokens processed at a time.")
    ] = 2048,
    kv_bits: Annotated[int | None, typer.Option(help="Bits of the KV cache: 2 to 6, or 8.")] = None,
    kv_group_size: Annotated[int, typer.Option(help="Group size of the KV cache.")] = 64,
    quantized_kv_start: Annotated[
        int, typer.Option(min=0, help="Quantize the KV cache from this token on.")
    ] = 5000,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of activations. Default: the tier's; float32 on the CPU.")
    ] = None,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text from a prompt: the text on stdout, speed and memory on stderr."""
    options_given = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "prompt", "revision", "dtype", "ignore_memory", "quiet", "debug")
    }
    from outlier_mlx.generate import Options, stream
    from outlier_mlx.loading import load
    from outlier_mlx.memory import check_fits
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.terminal import print_statistics

    text = sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    folder = resolve(model, revision).folder
    if not ignore_memory:
        # A token of English is about four characters; three are on the safe side.
        check_fits(folder, max_kv_size or len(text) // 3 + max_tokens, kv_bits)
    loaded, tokenizer = load(folder, dtype=dtype)
    response = None
    for response in stream(loaded, tokenizer, text, Options(**options_given)):
        print(response.text, end="", flush=True)
    print()
    if response is not None and not quiet:
        print_statistics(response)


@app.command(epilog="Example: `outlier-mlx info Qwen/Qwen2.5-7B-Instruct --json`")
def info(
    path_or_repo: Annotated[str, typer.Argument(help="Folder or hub repository.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a tier, overlay or model is, how large, and what memory it needs."""
    from outlier_mlx.info import inspect

    found = inspect(path_or_repo, revision)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from outlier_mlx.terminal import print_info

    print_info(found)


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
    from outlier_mlx.terminal import print_choices

    print_choices(choices, available)


@app.command(epilog="Example: `outlier-mlx verify ./tier`")
def verify(
    tier: Annotated[Path, typer.Argument(help="Folder of a tier.")],
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
    from outlier_mlx.exports import export_tier
    from outlier_mlx.terminal import progress_bar, size

    with progress_bar("exporting", quiet=quiet) as progress:
        written = export_tier(tier, out, format, revision=revision, progress=progress)
    if not quiet:
        base = f"without the base ({written.base})" if written.base else "with the base"
        _say(f"{written.path}: {written.format}, {size(written.nbytes)}, {base}")


@app.command(epilog="Example: `outlier-mlx demo --out ./demo-tier`")
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the converted tier in this folder.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Measure on all held-out documents.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert the embedded pair, measure it, and write a text with it."""
    from outlier_mlx.showcase import run

    run(out, full=full, force=force, quiet=quiet)


def main() -> None:
    """The entry point of `outlier-mlx`."""
    app(prog_name="outlier-mlx")
