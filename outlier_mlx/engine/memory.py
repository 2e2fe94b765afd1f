"""Refuse to load what does not fit into memory, and say what helps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from outlier_mlx.engine.machine import FREE_ON_MAC, THIS_GPU, Budget, budget
from outlier_mlx.engine.needs import Needs, Use, needs_of
from outlier_mlx.engine.paging.budget import ALL, AUTO, ExpertMemory
from outlier_mlx.engine.plan import SHORTER_STEPS, Plan, plan
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.attention import fitting_group
from outlier_mlx.terminal import size

#: Tokens of a text that a draft model reads at a time, at most.
DRAFT_STEP = 512


def check_fits(
    folder: Path,
    use: Use,
    available: Budget | None = None,
    *,
    memory: ExpertMemory = ALL,
    cures: Sequence[str] = (),
    may_quantize: bool = True,
    beside: Path | None = None,
    draft: Path | None = None,
    more: int = 0,
) -> Plan:
    """Refuse to load a model that does not fit, before the machine swaps.

    Args:
        folder: a tier or a plain MLX model.
        use: how it is going to be used.
        available: available memory; None: that of this machine.
        memory: how much its experts may take.
        cures: more remedies to name in the message.
        may_quantize: whether the user could have the KV cache quantized.
        beside: another model that will be in memory at the same time, without a KV cache.
        draft: a draft model, which has a KV cache for each conversation, too.
        more: bytes that something else takes at the same time.

    Returns:
        The plan by which the model is to be loaded.

    Raises:
        OutlierError: it does not fit; the message says what can be done. Or see `plan`.
    """
    available = available or budget()
    other, tokens = more, use.tokens
    if beside is not None:
        other += needs_of(beside, available.on_cpu, wide=use.wide).weights
    if draft is not None:
        loaded, cache = draft_nbytes(draft, use, available)
        other += loaded + use.conversations * cache
    found = plan(folder, use, memory, available, beside=other)
    if found.fits:
        return found
    helps = list(cures)
    if use.kv_bits is None and may_quantize:
        freed = (found.kv_cache, found.activations, found.mlx_cache)
        room = available.nbytes - found.needed + sum(part.nbytes for part in freed)
        needs = needs_of(folder, available.on_cpu, wide=use.wide)
        helps += _shortening(needs, room, use) or _quantizing(needs, room, use)
    helps.append("a smaller recipe (`outlier-mlx tiers OVERLAY` lists them)")
    if available.whose == THIS_GPU:
        megabytes = -(-found.needed // 2**20)
        helps.append(f"a higher limit (sudo sysctl iogpu.wired_limit_mb={megabytes})")
    elif available.whose == FREE_ON_MAC:
        helps.append("ending other programs")
    names = f"{folder.name} needs"
    if second_model := beside or draft:
        names = f"{folder.name} and {second_model.name} need"
    many = use.conversations > 1
    whose = f" of {use.conversations} conversations of {tokens} tokens" if many else ""
    experts = ""
    if found.slots is not None and found.paged is not None:
        experts = f" with {found.slots} of {found.paged.total} experts in memory"
        if found.slots == found.paged.floor:
            experts += ", the least"
        elif memory != AUTO:
            helps.insert(0, "--expert-memory auto")
    raise OutlierError(
        f"{names} {size(found.needed)}{experts}, {size(found.kv_cache.nbytes)} of it for the KV"
        f" cache{whose}; {available}."
        f" What helps: {', or '.join(helps)}; --ignore-memory loads it anyway"
    )


def draft_nbytes(folder: Path, use: Use, available: Budget) -> tuple[int, int]:
    """Bytes of a draft model with what it computes, and those of its KV cache of a conversation.

    Args:
        folder: the draft model's.
        use: how the model that it drafts for is going to be used.
        available: available memory.
    """
    needs = needs_of(folder, available.on_cpu, wide=use.wide)
    working = needs.working(Use(use.tokens, step=DRAFT_STEP))
    return needs.weights + working, needs.cache(use.tokens)


def _shortening(needs: Needs, room: int, use: Use) -> list[str]:
    """The option that makes a model fit by reading prompts in shorter steps; see `_quantizing`."""
    cache = use.conversations * needs.cache(use.tokens)
    for step in (n for n in SHORTER_STEPS if n < use.step):
        if cache + needs.working(replace(use, step=step)) - needs.converted <= room:
            return [f"--prefill-step-size {step}"]
    return []


def _quantizing(needs: Needs, room: int, use: Use) -> list[str]:
    """The options that make KV caches fit by quantizing them, if there are any.

    Args:
        needs: what the model takes.
        room: bytes for KV caches, and for what is computed, beside everything else.
        use: how the model was to be used.
    """
    group = fitting_group(needs.config, use.kv_group_size)
    if group is None or needs.cache(use.tokens) == 0:
        return []
    options = "--kv-bits 4" + (f" --kv-group-size {group}" if group != use.kv_group_size else "")
    for start, more in ((use.kv_start, ""), (0, " --quantized-kv-start 0")):
        # MLX's attention to a quantized cache keeps its scores, which take less in shorter steps.
        for step in (use.step, 512, 128, 32):
            less = replace(use, kv_bits=4, kv_group_size=group, kv_start=start, step=step)
            cache = use.conversations * needs.cache(use.tokens, 4, group, start)
            if step <= use.step and cache + needs.working(less) - needs.converted <= room:
                steps = f" --prefill-step-size {step}" if step < use.step else ""
                return [options + more + steps]
    return []
