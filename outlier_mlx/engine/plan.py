"""The plan: what a model will take of memory, part by part, against what the machine gives."""

from dataclasses import dataclass, replace
from pathlib import Path

from outlier_mlx.engine.distributed.ranks import ranks
from outlier_mlx.engine.machine import Budget, budget
from outlier_mlx.engine.needs import Needs, Use, needs_of
from outlier_mlx.engine.paging.budget import ALL, AUTO, ExpertMemory, Experts
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.terminal import size

#: Steps in which prompts are read if longer ones take too much memory.
SHORTER_STEPS = (1024, 512, 256, 128)


@dataclass(frozen=True)
class Part:
    """A part of the memory that is needed.

    Attributes:
        nbytes: its size.
        source: where the number comes from.
    """

    nbytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """What a model takes, against what the machine gives.

    Attributes:
        name: name of the model's folder.
        weights: weights without routed experts.
        experts: routed experts that are loaded, or the slots that they are paged into.
        copies: ternary matrices in MLX's 2-bit format, on a CPU, but those of slots.
        kv_cache: the KV caches of all conversations.
        activations: what is computed from a chunk of a prompt; see `Needs.activations`.
        converted: what a GPU converts of a projection for a long prompt, and drops.
        mlx_cache: freed memory that MLX keeps for what comes next; its cache is bounded by this.
        beside: another model in memory at the same time.
        available: what the machine gives.
        paged: the experts, if they can be paged.
        slots: number of slots; None: all experts are loaded, and nothing is paged.
        step: tokens of a prompt that are to be processed at a time, at most.
        replicated: of the weights, stored bytes of those that every rank has; 0: there is one.
    """

    name: str
    weights: Part
    experts: Part
    copies: Part
    kv_cache: Part
    activations: Part
    converted: Part
    mlx_cache: Part
    beside: Part
    available: Budget
    paged: Experts | None = None
    slots: int | None = None
    step: int = 2048
    replicated: int = 0

    @property
    def parts(self) -> dict[str, Part]:
        """All parts by name, in the order of a table."""
        return {
            "weights": self.weights,
            "experts": self.experts,
            "affine copies": self.copies,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "converted projections": self.converted,
            "MLX's cache": self.mlx_cache,
            "another model": self.beside,
        }

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def loaded(self) -> int:
        """Bytes that are taken before anything is computed."""
        return self.weights.nbytes + self.experts.nbytes + self.copies.nbytes

    @property
    def fits(self) -> bool:
        """Whether the machine gives that much."""
        return self.needed <= self.available.nbytes

    @property
    def expert_memory(self) -> ExpertMemory:
        """What `load` is to be told, so that it does what was planned."""
        return ALL if self.slots is None else ExpertMemory(slots=self.slots)

    def __str__(self) -> str:
        """The sum in a line."""
        work = self.activations.nbytes + self.converted.nbytes + self.mlx_cache.nbytes
        kept = self.weights.nbytes + self.copies.nbytes
        parts = [f"{size(kept)} of weights"]
        if self.slots is not None and self.paged is not None:
            share = f"{self.slots} of {self.paged.total} experts"
            parts.append(f"{size(self.experts.nbytes)} for {share}")
        elif self.experts.nbytes:
            parts.append(f"{size(self.experts.nbytes)} of experts")
        parts += [f"{size(self.kv_cache.nbytes)} of KV cache", f"{size(work)} to compute with"]
        if self.beside.nbytes:
            parts.append(f"{size(self.beside.nbytes)} for another model")
        return f"memory: {size(self.needed)}: {', '.join(parts)}; {self.available}"


def plan(
    folder: Path,
    use: Use | None = None,
    memory: ExpertMemory = AUTO,
    available: Budget | None = None,
    *,
    beside: int = 0,
) -> Plan:
    """Plan the memory of the model in a folder: a tier, or a plain MLX model.

    If a model does not fit whatever is done, this is the smallest plan, whose `fits` is false.

    Args:
        folder: the model's.
        use: how it is going to be used; None: one conversation of 4096 tokens.
        memory: how much its experts may take. `AUTO`: all are loaded if everything fits;
            otherwise, as many have slots as fit beside everything else and the headroom. Prompts
            are read in shorter steps if not even the least number of slots would fit.
        available: what the machine gives; None: what this one gives now.
        beside: bytes of another model that is in memory at the same time.

    Raises:
        OutlierError: the model has no experts that can be paged, and `memory` is neither `ALL` nor
            `AUTO`; or `memory` is less than they need.
    """
    use, available = use or Use(), available or budget()
    needs = needs_of(folder, available.on_cpu, wide=use.wide)
    whole = _plan(folder.name, needs, use, available, beside, None)
    if memory == ALL or (memory == AUTO and (whole.fits or needs.experts is None)):
        return whole
    if needs.experts is None and ranks().pipeline:  # those of the model are in others' layers
        return whole
    if needs.experts is None:
        raise OutlierError(
            f"--expert-memory {memory}: {folder.name} has no experts that can be paged: only those"
            " of tiers in packed rows can"
        )
    experts = needs.experts
    fixed = experts.floor if memory == AUTO else memory.slots_for(experts)
    least = _shortened(folder.name, needs, use, available, beside, fixed)
    if memory != AUTO:
        return least
    if least.needed >= whole.needed:  # few small experts, which it takes more to page than to load
        return whole
    use = replace(use, step=least.step)
    room = available.nbytes - available.headroom - (least.needed - least.experts.nbytes)
    slots = min(experts.total - 1, max(experts.floor, room // experts.slot_nbytes))
    return _plan(folder.name, needs, use, available, beside, slots)


def _shortened(
    name: str, needs: Needs, use: Use, available: Budget, beside: int, slots: int | None
) -> Plan:
    """A plan that fits, with steps as short as that takes; or the one with the shortest steps."""
    found = _plan(name, needs, use, available, beside, slots)
    for step in SHORTER_STEPS if slots is not None else ():
        if found.fits:
            break
        if step < use.step:
            found = _plan(name, needs, replace(use, step=step), available, beside, slots)
    return found


def _plan(
    name: str, needs: Needs, use: Use, available: Budget, beside: int, slots: int | None
) -> Plan:
    experts, headers = needs.experts, "headers of the files"
    routed, copies, converted = Part(needs.routed, headers), needs.routed_copies, needs.converted
    if slots is not None and experts is not None:
        source = f"{slots} slots of {size(experts.slot_nbytes)}, for {experts.total} experts"
        routed, copies = Part(slots * experts.slot_nbytes, source), 0
        converted += needs.gathered
    return Plan(
        name=name,
        weights=Part(needs.plain, headers + (", 16 bits as 32" if needs.wide else "")),
        experts=routed,
        copies=Part(needs.copies + copies, "shapes of the ternary matrices"),
        kv_cache=_kv_cache(needs, use),
        activations=Part(needs.activations(use), f"shapes, {_chunk(needs, use)} at a time"),
        converted=Part(converted, "shapes of the ternary matrices"),
        mlx_cache=Part(needs.mlx_cache(use), "its limit: as much as a layer's activations"),
        beside=Part(beside, headers),
        available=available,
        paged=experts,
        slots=slots,
        step=use.step,
        replicated=needs.replicated,
    )


def _chunk(needs: Needs, use: Use) -> str:
    """What is read of a prompt at a time, which is no longer than its context."""
    tokens = min(use.tokens, needs.step(use.step))
    return f"{tokens} token{'s' if tokens != 1 else ''}"


def _kv_cache(needs: Needs, use: Use) -> Part:
    kept = needs.cache(use.tokens, use.kv_bits, use.kv_group_size, use.kv_start)
    if kv_bytes(needs.config, 1) is None:
        return Part(0, "not known for this kind of attention")
    times = f"{use.conversations} conversations of " if use.conversations > 1 else ""
    return Part(use.conversations * kept, f"shapes, {times}{use.tokens} tokens")
