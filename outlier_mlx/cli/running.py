"""Commands that run models and say what they are."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import app
from outlier_mlx.cli.models import load_visibly
from outlier_mlx.cli.options import Alpha, Debug, DType, Force, IgnoreMemory, Quiet
from outlier_mlx.errors import OutlierError


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
    alpha: Alpha = None,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text from a prompt: the text on stdout, speed and memory on stderr."""
    options_given = {
        name: value
        for name, value in locals().items()
        if name
        not in ("model", "prompt", "revision", "dtype", "alpha", "ignore_memory", "quiet", "debug")
    }
    from outlier_mlx.cli.markdown import PlainWriter
    from outlier_mlx.cli.tables import print_statistics
    from outlier_mlx.engine.generate import Options, stream
    from outlier_mlx.engine.memory import check_fits
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.terminal import after_reading, stdout

    options = Options(**options_given)
    text = _read_stdin() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    source = resolve(model, revision)
    if not ignore_memory:
        # A token of English is about four characters; three are on the safe side.
        check_fits(source.folder, max_kv_size or len(text) // 3 + max_tokens, kv_bits)
    loaded, tokenizer = load_visibly(source, dtype, alpha, quiet=quiet)
    responses = after_reading(
        lambda progress: stream(loaded, tokenizer, text, options, progress), quiet=quiet
    )
    writer, response = PlainWriter(stdout()), None
    try:
        for response in responses:
            writer.write(response.text)
    finally:
        # What ends the text early is said on a line of its own.
        if response is not None:
            print()
    if response is not None and not quiet:
        print_statistics(response)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OutlierError(f"stdin: the prompt is not UTF-8 text: {error.reason}") from None


@app.command(epilog="Example: `outlier-mlx info Qwen/Qwen2.5-7B-Instruct --json`")
def info(
    path_or_repo: Annotated[str, typer.Argument(help="Folder or hub repository.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a tier, overlay or model is, how large, and what memory it needs."""
    from outlier_mlx.checkpoints.info import inspect
    from outlier_mlx.terminal import counting_bar

    with counting_bar("reading headers", "files", quiet=False, at_once=False) as progress:
        found = inspect(path_or_repo, revision, progress)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from outlier_mlx.cli.tables import print_info

    print_info(found)


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
    from outlier_mlx.cli.showcase import run

    run(out, full=full, force=force, quiet=quiet)
