"""Commands that talk: chat on a terminal, serve over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from outlier_mlx.cli.app import app, say
from outlier_mlx.cli.models import load_model, load_visibly
from outlier_mlx.cli.options import Alpha, Debug, DType, IgnoreMemory, Quiet

Model = Annotated[str, typer.Option(help="Folder or hub repository of a tier.")]
Revision = Annotated[str | None, typer.Option(help="Revision on the hub.")]
ActivationDType = Annotated[
    DType | None, typer.Option(help="Of activations. Default: the tier's; float32 on the CPU.")
]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k likeliest; 0: all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Minimum probability.")]
PrefillStep = Annotated[int, typer.Option(min=1, help="Prompt tokens processed at a time.")]
KVBits = Annotated[int | None, typer.Option(help="Bits of the KV cache: 2 to 6, or 8.")]
KVGroupSize = Annotated[int, typer.Option(help="Group size of the KV cache.")]
KVStart = Annotated[int, typer.Option(min=0, help="Quantize the KV cache from this token on.")]


@app.command(epilog='Example: `outlier-mlx chat --model ./tier --system-prompt "Be brief."`')
def chat(
    model: Model,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Tokens that a reply has at most.")
    ] = 2048,
    temp: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")] = 0.7,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    top_k: TopK = 0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Go on where this file ends if it exists; keep conversation and KV cache in it.",
        ),
    ] = None,
    max_kv_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache holds at most.")
    ] = None,
    prefill_step_size: PrefillStep = 2048,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    quantized_kv_start: KVStart = 5000,
    revision: Revision = None,
    dtype: ActivationDType = None,
    alpha: Alpha = None,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model: on a terminal, or a message a line from a pipe."""
    from outlier_mlx.cli.repl import Chat
    from outlier_mlx.engine.conversation import Conversation
    from outlier_mlx.engine.generate import Options
    from outlier_mlx.engine.memory import check_fits
    from outlier_mlx.engine.sessions import SUFFIX, identity
    from outlier_mlx.storage.hub import resolve

    if prompt_cache is not None and prompt_cache.suffix != SUFFIX:
        raise typer.BadParameter(f"its name must end in {SUFFIX}", param_hint="--prompt-cache")
    options = Options(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        seed=seed,
        system_prompt=system_prompt,
        max_kv_size=max_kv_size,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    source = resolve(model, revision)
    if not ignore_memory:
        check_fits(source.folder, max_kv_size or 4096 + max_tokens, kv_bits)
    loaded, tokenizer = load_visibly(source, dtype, alpha, quiet=quiet)
    conversation = Conversation(loaded, tokenizer, options)
    Chat(conversation, identity(source.folder, dtype, alpha), prompt_cache, quiet=quiet).run()


@app.command(epilog="Example: `outlier-mlx serve --model ./tier --port 8080`")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OUTLIER_MLX_API_KEY",
            show_envvar=True,
            help="What requests must carry. Better set as variable: others see arguments.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may ask; *: any. Repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name of this server. Repeatable.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Tokens that an answer has at most.")
    ] = 4096,
    max_context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer. Default: as the model has it."),
    ] = None,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="MB that a request's body may have.")
    ] = 4.0,
    max_clients: Annotated[int, typer.Option(min=1, help="Connections at a time.")] = 64,
    temp: Annotated[float, typer.Option(min=0.0, help="Temperature if a request has none.")] = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    decode_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Answers generated together. Default: what fits, 32 at most."),
    ] = None,
    prompt_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts read together. Default: a quarter of that."),
    ] = None,
    prompt_cache_size: Annotated[
        int, typer.Option(min=1, help="Conversations whose KV cache is kept.")
    ] = 10,
    prompt_cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes that these may take. Default: what is left.")
    ] = None,
    prefill_step_size: PrefillStep = 2048,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    quantized_kv_start: KVStart = 5000,
    revision: Revision = None,
    dtype: ActivationDType = None,
    alpha: Alpha = None,
    ignore_memory: IgnoreMemory = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model to programs that speak OpenAI's API; to this machine alone unless told."""
    from dataclasses import asdict, replace
    from functools import partial

    from outlier_mlx import serve as server
    from outlier_mlx.serve.capacity import Capacity, find_capacity
    from outlier_mlx.storage.hub import resolve

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
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        prefill_step_size=prefill_step_size,
        prompt_cache_size=prompt_cache_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    source = resolve(model, revision)
    requested = decode_concurrency, prompt_concurrency, prompt_cache_bytes
    capacity = Capacity(decode_concurrency or 32, prompt_concurrency or 8, prompt_cache_bytes)
    note = ""
    if not ignore_memory:
        tokens = max_context or 4096 + max_tokens
        capacity, conversations = find_capacity(
            source.folder, tokens, *requested, kv_bits=kv_bits, clients=max_clients
        )
        note = f"memory for {conversations} conversations of {tokens} tokens at a time"
    load = partial(load_model, source.folder, dtype, alpha)
    options = replace(options, **asdict(capacity))
    server.serve(source.name, load, options, say, note=note, quiet=quiet)
