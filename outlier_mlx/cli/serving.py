"""The command that serves a model over HTTP: serve."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlier_mlx.cli.app import command, say
from outlier_mlx.cli.drafting import check_draft_model, load_draft_model
from outlier_mlx.cli.loading import expert_memory, load_model, prepare, tell_plan, use_of
from outlier_mlx.cli.options import (
    Alpha,
    Drafting,
    KVCache,
    Loading,
    MaxTokens,
    Model,
    PrefillStep,
    Quiet,
    Sampling,
)
from outlier_mlx.cli.ranks import join, tell_user
from outlier_mlx.storage.hub import Source, resolve

if TYPE_CHECKING:
    from outlier_mlx.engine.paging.budget import ExpertMemory
    from outlier_mlx.engine.plan import Plan
    from outlier_mlx.serve import ServeOptions
    from outlier_mlx.serve.cache_dir import CacheDir
    from outlier_mlx.serve.capacity import Capacity


@dataclass(frozen=True)
class Address:
    """Where a model is served, and to whom."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to serve at.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="OUTLIER_MLX_API_KEY",
            show_envvar=True,
            help="Key that requests must carry. Better set as an environment variable: others can"
            " see the arguments of a program.",
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web origin that may send requests; *: any. Repeatable."
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Host name of this server. Repeatable."),
    ] = None


@dataclass(frozen=True)
class Requests:
    """Which requests are answered."""

    max_tokens: MaxTokens = 4096
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of prompt and answer together, at most. Default: the model's limit."
        ),
    ] = None
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Size of a request's body in MB, at most.")
    ] = 4.0
    max_clients: Annotated[
        int, typer.Option(min=1, help="Requests answered at a time, at most.")
    ] = 64
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse requests with parameters that would have no effect."),
    ] = False


@dataclass(frozen=True)
class Together:
    """What is done, and kept in memory, at the same time; None: by the memory there is."""

    decode_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers generated together. Default: as many as fit, 32 at most."
        ),
    ] = None
    prompt_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts read together. Default: a quarter as many as answers."),
    ] = None
    prompt_cache_size: Annotated[
        int | None,
        typer.Option(min=1, help="Conversations whose KV cache is kept. Default: any number."),
    ] = None
    prompt_cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Bytes that kept KV caches may take. Default: the memory that is left.",
        ),
    ] = None


@dataclass(frozen=True)
class OnDisk:
    """KV caches that outlast the server."""

    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep KV caches in this folder, too, for the next start."),
    ] = None
    cache_dir_size: Annotated[
        float, typer.Option(metavar="GB", min=0.001, help="What that folder may take on the disk.")
    ] = 20.0


@command("Run", "serve ./tier --port 8080")
def serve(
    model: Model,
    sampling: Sampling,
    cache: KVCache,
    drafting: Drafting,
    loading: Loading,
    address: Address,
    requests: Requests,
    together: Together,
    on_disk: OnDisk,
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
    from outlier_mlx import serve as server
    from outlier_mlx.engine.distributed.ranks import ranks
    from outlier_mlx.serve.capacity import common_capacity

    options = server.ServeOptions(
        **_listening(address, requests),
        **vars(sampling),
        **vars(cache),
        prompt_lookup=drafting.prompt_lookup,
        num_draft_tokens=drafting.num_draft_tokens,
        prompt_cache_size=together.prompt_cache_size,
        prefill_step_size=prefill_step_size,
        idle_unload=idle_unload,
    )
    source = resolve(model, loading.revision)
    join(source.folder, alpha)
    check_draft_model(source, drafting)
    draft = None if drafting.draft_model is None else resolve(drafting.draft_model)
    room = _room(source, draft, loading, options, cache, together, quiet=quiet)
    options = replace(
        options,
        **asdict(common_capacity(room.capacity)),
        cache_dir=_cache_dir(on_disk, source, loading, alpha, cache),
    )
    how = loading.dtype, alpha, room.memory, loading.expert_skip, loading.keep_warm
    load = partial(load_model, source.folder, *how)
    if not ranks().leads:
        from outlier_mlx.serve.over_ranks import follow

        follow(source.name, load, options, tell_user)
    server.serve(
        source.name,
        load,
        options,
        say,
        load_draft=None if draft is None else partial(load_draft_model, draft.folder, loading),
        note=room.note,
        quiet=quiet,
    )


def _listening(address: Address, requests: Requests) -> dict[str, Any]:
    """The server's options that say where it is, and which requests it answers."""
    given = vars(address) | vars(requests)
    for name in ("allow_origin", "allow_host"):
        given[f"{name}s"] = tuple(given.pop(name) or ())
    return given | {"max_body": int(requests.max_body * 1e6)}


@dataclass(frozen=True)
class _Room:
    """What there is memory for.

    Attributes:
        capacity: what is done at the same time.
        memory: by what the model is to be loaded; see `cli.loading.load_model`.
        note: what the user is told of it.
    """

    capacity: "Capacity"
    memory: "ExpertMemory | Plan"
    note: str = ""


def _room(
    source: Source,
    draft: Source | None,
    loading: Loading,
    options: "ServeOptions",
    cache: KVCache,
    together: Together,
    *,
    quiet: bool,
) -> _Room:
    """Divide the memory, unless it is to be ignored."""
    from outlier_mlx.engine.distributed.ranks import ranks
    from outlier_mlx.serve.capacity import Capacity, find_capacity, usual_tokens
    from outlier_mlx.terminal import size

    responses, prompts = together.decode_concurrency, together.prompt_concurrency
    if loading.ignore_memory:
        capacity = Capacity(responses or 32, prompts or 8, together.prompt_cache_bytes)
        return _Room(capacity, expert_memory(loading))
    tokens = options.max_context or usual_tokens(source.folder, options.max_tokens)
    capacity, conversations, memory = find_capacity(
        source.folder,
        use_of(loading, tokens, cache, step=options.prefill_step_size),
        responses,
        prompts,
        together.prompt_cache_bytes,
        clients=options.max_clients,
        memory=expert_memory(loading),
        draft=None if draft is None else draft.folder,
    )
    # A server's caches take all that is left, so only paging is worth telling.
    told = memory.slots is not None or ranks().size > 1
    tell_plan(memory, loading, quiet=quiet or not told)
    note = f"memory for {conversations} conversations of {tokens} tokens at a time"
    if draft is not None:
        note += f", beside {size(memory.beside.nbytes)} for the draft model {draft.name}"
    return _Room(capacity, memory, note)


def _cache_dir(
    on_disk: OnDisk, source: Source, loading: Loading, alpha: Path | None, cache: KVCache
) -> "CacheDir | None":
    """Where KV caches are kept on disk, if anywhere."""
    if on_disk.cache_dir is None:
        return None
    from outlier_mlx.serve.cache_dir import cache_dir

    nbytes, kept = int(on_disk.cache_dir_size * 1e9), (vars(cache), loading.expert_skip)
    return cache_dir(on_disk.cache_dir, nbytes, source.folder, loading.dtype, alpha, *kept)
