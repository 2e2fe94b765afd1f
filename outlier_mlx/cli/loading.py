"""Loading a model for a command, with a spinner and perhaps with other alphas."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlier_mlx.cli.options import KVCache, Loading
from outlier_mlx.cli.ranks import join
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.hub import Source, local_source, resolve
from outlier_mlx.terminal import size

if TYPE_CHECKING:
    from outlier_mlx.engine.needs import Use
    from outlier_mlx.engine.paging.budget import ExpertMemory
    from outlier_mlx.engine.plan import Plan


def import_engine() -> None:
    """Import mlx-lm, without the garbage collector.

    Importing it makes some hundred thousand objects, and all of them stay. Searching them for
    garbage again and again took a tenth of the time of a short `generate`.
    """
    if "mlx_lm" in sys.modules:
        return
    gc.disable()
    try:
        import mlx_lm  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def prepare(model: str, revision: str | None) -> None:
    """Check a model's name, and import mlx-lm, which takes a second.

    Raises:
        CheckpointError: neither a folder nor the name of a repository.
    """
    local_source(model, revision)
    import_engine()


def load_model(
    folder: Path,
    dtype: str | None = None,
    alpha: Path | None = None,
    memory: "ExpertMemory | Plan | None" = None,
    skip: float = 0.0,
    warm: bool = False,
) -> Any:
    """A model and its tokenizer.

    Args:
        folder: the model's.
        dtype: see `engine.loading.load`.
        alpha: an alpha.json to use instead of a tier's own alphas.
        memory: what the experts may take, or the plan that says it; default: all are loaded.
        skip: see `expert_skip` of `engine.loading.load`.
        warm: keep the GPU warm while experts are read.

    Raises:
        OutlierError: there is no sound model, or the alphas do not suit it.
    """
    import_engine()
    from outlier_mlx.checkpoints.inventory import mark_used
    from outlier_mlx.engine.distributed.ranks import loaded
    from outlier_mlx.engine.loading import load

    mark_used(folder)
    model, tokenizer = load(folder, dtype=dtype, expert_memory=memory, expert_skip=skip)
    if warm:
        from outlier_mlx.engine.paging.keep_warm import keep_warm

        keep_warm(model)
    if alpha is not None:
        from outlier_mlx.measure.alphas import apply_alphas

        apply_alphas(model, alpha)
    loaded()
    return model, tokenizer


def load_checked(
    model: str | Source,
    loading: Loading,
    tokens: int,
    *,
    prompt: str = "",
    cache: KVCache | None = None,
    alpha: Path | None = None,
    beside: str | None = None,
    draft: str | None = None,
    step: int = 2048,
    logits: int = 1,
    more: int = 0,
    quiet: bool,
) -> Any:
    """Load a model if it fits into memory; a terminal shows that it takes time.

    Args:
        model: a folder or hub repository, or where it was found.
        loading: which version of it, and how.
        tokens: tokens that its KV cache will hold, besides those of the prompt.
        prompt: text that will be read.
        cache: how the KV cache is quantized; None: the command has no options for that.
        alpha: see `load_model`.
        beside: another model that will be loaded, too.
        draft: a draft model that will be loaded, too.
        step: tokens of a prompt that are processed at a time, at most.
        logits: tokens whose logits are in memory at the same time.
        more: bytes that will be taken beside that.
        quiet: show nothing.

    Raises:
        OutlierError: it does not fit, or is not valid.
    """
    source = model if isinstance(model, Source) else resolve(model, loading.revision)
    other = None if beside is None else resolve(beside).folder
    join(source.folder, other, alpha)
    memory = planned_memory(
        source,
        loading,
        use_of(loading, tokens, cache, step=step, logits=logits),
        prompt=prompt,
        quiet=quiet,
        more=more,
        may_quantize=cache is not None,
        beside=other,
        draft=None if draft is None else resolve(draft).folder,
    )
    return _load(source, loading, alpha, memory, quiet=quiet)


def planned_memory(
    source: Source,
    loading: Loading,
    use: "Use",
    *,
    prompt: str = "",
    may_quantize: bool = False,
    quiet: bool,
    **others: Any,
) -> "ExpertMemory | Plan":
    """The plan by which a model is to be loaded; the user is told of it.

    With `--ignore-memory` nothing is planned: this is what `--expert-memory` says.

    Args:
        source: where the model is.
        loading: how it is loaded.
        use: how it is going to be used, without the tokens of the prompt.
        prompt: see `load_checked`.
        may_quantize: see `engine.memory.check_fits`; so are `others`.
        quiet: tell nothing.

    Raises:
        OutlierError: it does not fit.
    """
    memory = expert_memory(loading)
    if loading.ignore_memory:
        return memory
    from outlier_mlx.engine.memory import check_fits

    how = others | {"memory": memory, "may_quantize": may_quantize}
    planned = _fit(source.folder, use, prompt, partial(check_fits, source.folder, **how))
    tell_plan(planned, loading, quiet=quiet)
    return planned


def use_of(loading: Loading, tokens: int, cache: KVCache | None = None, **more: Any) -> "Use":
    """A use with so many tokens in a KV cache; `more` are other fields of `Use`."""
    from outlier_mlx.engine.needs import Use

    kept, wide = cache or KVCache(), loading.dtype == "float32"
    bits, group, start = kept.kv_bits, kept.kv_group_size, kept.quantized_kv_start
    return Use(tokens, kv_bits=bits, kv_group_size=group, kv_start=start, wide=wide, **more)


def expert_memory(loading: Loading) -> "ExpertMemory":
    """What `--expert-memory` says; all, if nothing is said and memory is to be ignored."""
    from outlier_mlx.engine.paging.budget import ALL, AUTO, ExpertMemory

    said = ExpertMemory.parse(loading.expert_memory)
    return ALL if loading.ignore_memory and said == AUTO else said


def tell_plan(planned: "Plan", loading: Loading, *, quiet: bool) -> None:
    """Tell the user what a model will take, if its experts are paged or it takes half of memory."""
    from outlier_mlx.cli.app import say
    from outlier_mlx.engine.distributed.ranks import gathered, ranks
    from outlier_mlx.engine.paging.budget import AUTO

    if ranks().size > 1:
        everyone = [size(int(text)) for text in gathered(str(planned.needed))]
        if not quiet:
            by_rank = ", ".join(f"{told} for rank {rank}" for rank, told in enumerate(everyone))
            say(f"memory: {by_rank}; {size(planned.replicated)} of weights are on every rank")
    if quiet or (planned.slots is None and 2 * planned.needed < planned.available.nbytes):
        return
    say(str(planned))
    if planned.slots is not None and expert_memory(loading) == AUTO:
        say(
            f"{planned.name} does not fit as a whole: the other experts are read from the disk when"
            " a token needs them. How fast that is: outlier-mlx doctor, then the model"
        )


def refuse_paging(loading: Loading, why: str) -> Loading:
    """The same, with all experts loaded.

    Raises:
        OutlierError: `--expert-memory` or `--expert-skip` ask for something else; the message says
            why not.
    """
    from outlier_mlx.engine.paging.budget import ALL, AUTO

    if expert_memory(loading) not in (ALL, AUTO):
        raise OutlierError(f"--expert-memory {loading.expert_memory}: {why}")
    if loading.expert_skip:
        raise OutlierError(f"--expert-skip {loading.expert_skip:g}: {why}")
    return replace(loading, expert_memory="all")


def load_beside(model: str, loading: Loading, *, quiet: bool) -> Any:
    """Load the model that `load_checked` was told of with `beside` or `draft`."""
    return _load(resolve(model), replace(loading, expert_skip=0.0), quiet=quiet)


def _load(
    source: Source,
    loading: Loading,
    alpha: Path | None = None,
    memory: "ExpertMemory | Plan | None" = None,
    *,
    quiet: bool,
) -> Any:
    from outlier_mlx.terminal import working

    with working(f"loading {source.name}", quiet=quiet):
        how = alpha, memory, loading.expert_skip, loading.keep_warm
        return load_model(source.folder, loading.dtype, *how)


def _fit(folder: Path, use: "Use", prompt: str, check: "Callable[[Use], Plan]") -> "Plan":
    """The plan for a model with a prompt and more tokens, by `check`, which may refuse it."""
    try:
        # A tokenizer takes at least a byte for a token. Reading it takes time, so the tokens are
        # counted only where that many would not fit.
        found = check(replace(use, tokens=use.tokens + len(prompt.encode("utf-8", "replace"))))
        if not prompt or found.slots is None:
            return found
    except OutlierError:
        if not prompt:
            raise
    from outlier_mlx.engine.loading import load_tokenizer
    from outlier_mlx.models.config import raw_config
    from outlier_mlx.terminal import quiet_transformers

    tokenizer = load_tokenizer(folder, raw_config(folder))
    with quiet_transformers():
        count = len(tokenizer.encode(prompt))
    return check(replace(use, tokens=use.tokens + count))
