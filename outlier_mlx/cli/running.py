"""Commands that run models: generate, chat."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlier_mlx.cli.app import command
from outlier_mlx.cli.loading import load_checked, prepare
from outlier_mlx.cli.options import (
    Alpha,
    Drafting,
    Generation,
    KVCache,
    Loading,
    Model,
    Quiet,
    Sampling,
    Xtc,
)
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.hub import Source, resolve

if TYPE_CHECKING:
    from outlier_mlx.engine.generate import Options

# Replies are usually sampled; texts, and answers over HTTP, only if asked.
CHAT_SAMPLING = Sampling(temp=0.7, top_p=0.9)
CHAT_GENERATION = Generation(max_tokens=2048)


def generation_options(
    generation: Generation,
    sampling: Sampling,
    cache: KVCache,
    xtc: Xtc | None = None,
    **more: Any,
) -> "Options":
    """The engine's options of a generation; `more` are options that only one command has.

    Raises:
        OutlierError: the KV cache cannot be quantized like that.
    """
    from outlier_mlx.engine.generate import Options

    # Each group's fields are called as the engine's options are.
    groups = (generation, sampling, xtc or Xtc(), cache)
    given = {name: value for group in groups for name, value in vars(group).items()}
    return Options(**given, **more)


def _load(
    source: Source,
    tokens: int,
    options: "Options",
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    *,
    prompt: str = "",
    alpha: Path | None,
    quiet: bool,
) -> Any:
    """A model that fits into memory, its tokenizer, and what drafts for it.

    Args:
        source: where the model is.
        tokens: tokens in its KV cache besides those of the prompt, if the cache has no limit.
        options: of the generation.
        cache: how the KV cache is quantized.
        drafting: what drafts.
        loading: how the model is loaded.
        prompt: text that will be read.
        alpha: see `cli.loading.load_model`.
        quiet: show nothing.
    """
    from outlier_mlx.cli.drafting import check_draft_model, load_drafting

    check_draft_model(source, drafting)
    # With a limit, the cache is not quantized, and holds as much of a prompt as the limit allows.
    limit = options.max_kv_size
    model, tokenizer = load_checked(
        source,
        loading,
        limit or tokens,
        prompt="" if limit else prompt,
        cache=None if limit else cache,
        alpha=alpha,
        draft=drafting.draft_model,
        step=options.prefill_step_size,
        quiet=quiet,
    )
    return model, tokenizer, load_drafting(model, drafting, loading, quiet=quiet)


@command("Run", 'generate ./tier --prompt "Once upon a time" --temp 0.7')
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The prompt; - reads it from stdin.")
    ],
    generation: Generation,
    sampling: Sampling,
    xtc: Xtc,
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the answer begins, for the chat template.")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Use the prompt as it is.")
    ] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="A JSON schema in a file; the text is a JSON value of it."),
    ] = None,
    alpha: Alpha = None,
    quiet: Quiet = False,
) -> None:
    """Generate text from a prompt: the text on stdout, speed and memory on stderr."""
    prepare(model, loading.revision)
    from outlier_mlx.cli.tables import print_statistics
    from outlier_mlx.cli.writers import PlainWriter
    from outlier_mlx.engine.generate import generate_text
    from outlier_mlx.engine.paging.paged import statistics_of
    from outlier_mlx.terminal import after_reading, stdout

    options = generation_options(
        generation,
        sampling,
        cache,
        xtc,
        prefill_response=prefill_response,
        ignore_chat_template=ignore_chat_template,
        json_schema=_read_schema(json_schema, prefill_response),
    )
    text = _read_stdin() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    read = " ".join(filter(None, (options.system_prompt, text, prefill_response)))
    source, tokens = resolve(model, loading.revision), options.max_tokens
    how = options, cache, drafting, loading
    loaded, tokenizer, drafts = _load(source, tokens, *how, prompt=read, alpha=alpha, quiet=quiet)
    responses = after_reading(
        lambda progress: generate_text(loaded, tokenizer, text, options, progress, drafts),
        quiet=quiet,
    )
    console, response = stdout(), None
    writer = PlainWriter(console)
    try:
        for response in responses:
            writer.write(response.text)
    finally:
        # A message about what ended the text early begins on a new line.
        if response is not None:
            print()
    if response is not None and not quiet:
        print_statistics(response, statistics_of(loaded))


def _read_schema(file: Path | None, prefill_response: str | None) -> dict[str, Any] | None:
    """A JSON schema, checked before a model is loaded."""
    if file is None:
        return None
    if prefill_response is not None:
        raise OutlierError("--json-schema and --prefill-response exclude each other")
    from outlier_mlx.engine.schemas import SchemaError, checked_schema
    from outlier_mlx.storage.texts import read_json

    schema = read_json(file)
    try:
        checked_schema(schema)
    except SchemaError as error:
        raise OutlierError(f"{file}: {error}") from None
    return schema


def _read_stdin() -> str:
    from outlier_mlx.engine.distributed.ranks import ranks

    if ranks().size > 1:
        raise OutlierError("--prompt -: mlx.launch does not tell where stdin ends; give the text")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OutlierError(f"stdin: the prompt is not UTF-8 text: {error.reason}") from None


@command("Run", 'chat ./tier --system-prompt "Be brief."')
def chat(
    model: Model,
    *,
    generation: Generation = CHAT_GENERATION,
    sampling: Sampling = CHAT_SAMPLING,
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Keep the conversation and its KV cache in this file; resume it if it exists.",
        ),
    ] = None,
    alpha: Alpha = None,
    quiet: Quiet = False,
) -> None:
    """Talk with a model on a terminal; in a pipe, each line is a message."""
    prepare(model, loading.revision)
    from outlier_mlx.cli.repl import Chat
    from outlier_mlx.engine.conversation import Conversation
    from outlier_mlx.engine.sessions import SUFFIX, identity

    if prompt_cache is not None and prompt_cache.suffix != SUFFIX:
        raise typer.BadParameter(f"its name must end in {SUFFIX}", param_hint="--prompt-cache")
    options = generation_options(generation, sampling, cache)
    source, tokens = resolve(model, loading.revision), 4096 + options.max_tokens
    how = options, cache, drafting, loading
    loaded, tokenizer, drafts = _load(source, tokens, *how, alpha=alpha, quiet=quiet)
    conversation = Conversation(loaded, tokenizer, options, drafts)
    named = identity(source.folder, loading.dtype, alpha)
    Chat(conversation, named, prompt_cache, quiet=quiet).run()
