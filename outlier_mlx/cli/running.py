"""Commands that run models: generate, chat, serve."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlier_mlx.cli.app import command, say
from outlier_mlx.cli.loading import (
    expert_memory,
    load_checked,
    load_model,
    prepare,
    tell_plan,
    use_of,
)
from outlier_mlx.cli.options import (
    Alpha,
    Drafting,
    Generation,
    KVCache,
    Loading,
    MaxTokens,
    Model,
    PrefillStep,
    Quiet,
    Sampling,
    Xtc,
)
from outlier_mlx.cli.ranks import join
from outlier_mlx.errors import OutlierError

if TYPE_CHECKING:
    from outlier_mlx.engine.generate import Options
    from outlier_mlx.engine.paging.budget import ExpertMemory
    from outlier_mlx.engine.plan import Plan

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
    from outlier_mlx.cli.drafting import check_draft_model, load_drafting
    from outlier_mlx.cli.tables import print_statistics
    from outlier_mlx.cli.writers import PlainWriter
    from outlier_mlx.engine.generate import generate_text
    from outlier_mlx.engine.paging.paged import statistics_of
    from outlier_mlx.storage.hub import resolve
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
    # With a limit, the cache is not quantized, and holds as much of a prompt as the limit allows.
    limit = options.max_kv_size
    read = " ".join(filter(None, (options.system_prompt, text, prefill_response)))
    source = resolve(model, loading.revision)
    check_draft_model(source, drafting)
    loaded, tokenizer = load_checked(
        source,
        loading,
        limit or options.max_tokens,
        prompt="" if limit else read,
        cache=None if limit else cache,
        alpha=alpha,
        draft=drafting.draft_model,
        step=options.prefill_step_size,
        quiet=quiet,
    )
    drafts = load_drafting(loaded, drafting, loading, quiet=quiet)
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
    from outlier_mlx.cli.drafting import check_draft_model, load_drafting
    from outlier_mlx.cli.repl import Chat
    from outlier_mlx.engine.conversation import Conversation
    from outlier_mlx.engine.sessions import SUFFIX, identity
    from outlier_mlx.storage.hub import resolve

    if prompt_cache is not None and prompt_cache.suffix != SUFFIX:
        raise typer.BadParameter(f"its name must end in {SUFFIX}", param_hint="--prompt-cache")
    options = generation_options(generation, sampling, cache)
    source = resolve(model, loading.revision)
    check_draft_model(source, drafting)
    tokens = options.max_kv_size or 4096 + options.max_tokens
    kept = None if options.max_kv_size else cache
    loaded, tokenizer = load_checked(
        source,
        loading,
        tokens,
        cache=kept,
        alpha=alpha,
        draft=drafting.draft_model,
        step=options.prefill_step_size,
        quiet=quiet,
    )
    drafts = load_drafting(loaded, drafting, loading, quiet=quiet)
    conversation = Conversation(loaded, tokenizer, options, drafts)
    named = identity(source.folder, loading.dtype, alpha)
    Chat(conversation, named, prompt_cache, quiet=quiet).run()


@command("Run", "serve ./tier --port 8080")
def serve(
    model: Model,
    sampling: Sampling,
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to serve at.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="OUTLIER_MLX_API_KEY",
            show_envvar=True,
            help="Key that requests must carry. Better set as an environment variable: others can"
            " see the arguments of a program.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web origin that may send requests; *: any. Repeatable."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Host name of this server. Repeatable."),
    ] = None,
    max_tokens: MaxTokens = 4096,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of prompt and answer together, at most. Default: the model's limit."
        ),
    ] = None,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Size of a request's body in MB, at most.")
    ] = 4.0,
    max_clients: Annotated[
        int, typer.Option(min=1, help="Requests answered at a time, at most.")
    ] = 64,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse requests with parameters that would have no effect."),
    ] = False,
    decode_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers generated together. Default: as many as fit, 32 at most."
        ),
    ] = None,
    prompt_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts read together. Default: a quarter as many as answers."),
    ] = None,
    prompt_cache_size: Annotated[
        int | None,
        typer.Option(min=1, help="Conversations whose KV cache is kept. Default: any number."),
    ] = None,
    prompt_cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Bytes that kept KV caches may take. Default: the memory that is left.",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep KV caches in this folder, too, for the next start."),
    ] = None,
    cache_dir_size: Annotated[
        float, typer.Option(metavar="GB", min=0.001, help="What that folder may take on the disk.")
    ] = 20.0,
    prefill_step_size: PrefillStep = 2048,
    idle_unload: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0.01,
            help="Unload the model after so long without a request; the next one loads it again.",
        ),
    ] = None,
    alpha: Alpha = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model to programs of OpenAI's and Anthropic's APIs, and to a browser."""
    prepare(model, loading.revision)
    from dataclasses import asdict, replace
    from functools import partial

    from outlier_mlx import serve as server
    from outlier_mlx.cli.drafting import check_draft_model, load_draft_model
    from outlier_mlx.engine.distributed.ranks import ranks
    from outlier_mlx.serve.cache_dir import cache_dir as at_disk
    from outlier_mlx.serve.capacity import Capacity, common_capacity, find_capacity
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.terminal import size

    options = server.ServeOptions(
        host=host,
        port=port,
        api_key=api_key,
        allow_origins=tuple(allow_origin or ()),
        allow_hosts=tuple(allow_host or ()),
        max_tokens=max_tokens,
        max_body=int(max_body * 1e6),
        max_context=max_context,
        max_clients=max_clients,
        strict=strict,
        idle_unload=idle_unload,
        prefill_step_size=prefill_step_size,
        prompt_lookup=drafting.prompt_lookup,
        num_draft_tokens=drafting.num_draft_tokens,
        prompt_cache_size=prompt_cache_size,
        **vars(sampling),
        **vars(cache),
    )
    source = resolve(model, loading.revision)
    join(source.folder)
    check_draft_model(source, drafting)
    draft = None if drafting.draft_model is None else resolve(drafting.draft_model)
    requested = decode_concurrency, prompt_concurrency, prompt_cache_bytes
    capacity = Capacity(decode_concurrency or 32, prompt_concurrency or 8, prompt_cache_bytes)
    note = ""
    memory: ExpertMemory | Plan = expert_memory(loading)
    if not loading.ignore_memory:
        tokens, wide = max_context or 4096 + max_tokens, loading.dtype == "float32"
        capacity, conversations, memory = find_capacity(
            source.folder,
            use_of(tokens, cache, step=prefill_step_size, wide=wide),
            *requested,
            memory=expert_memory(loading),
            clients=max_clients,
            draft=None if draft is None else draft.folder,
        )
        # A server's caches take all that is left, so only paging is worth telling.
        told = memory.slots is not None or ranks().size > 1
        tell_plan(memory, loading, quiet=quiet or not told)
        note = f"memory for {conversations} conversations of {tokens} tokens at a time"
        if draft is not None:
            note += f", beside {size(memory.beside.nbytes)} for the draft model {draft.name}"
    how = loading.dtype, alpha, memory, loading.expert_skip, loading.keep_warm
    load = partial(load_model, source.folder, *how)
    options = replace(options, **asdict(common_capacity(capacity)))
    if cache_dir is not None:
        kept = vars(cache), loading.expert_skip
        where = at_disk(cache_dir, int(cache_dir_size * 1e9), source.folder, *how[:2], *kept)
        options = replace(options, cache_dir=where)
    if not ranks().leads:
        from outlier_mlx.serve.over_ranks import follow

        follow(source.name, load, options)
    load_draft = None if draft is None else partial(load_draft_model, draft.folder, loading)
    server.serve(source.name, load, options, say, load_draft=load_draft, note=note, quiet=quiet)
