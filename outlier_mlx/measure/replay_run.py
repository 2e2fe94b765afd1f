"""`bench --trace`: one trace, replayed over policies, budgets and look-ahead."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from outlier_mlx.engine.paging.policies import DEFAULT_POLICY, POLICIES
from outlier_mlx.measure.expert_trace import Trace
from outlier_mlx.measure.replay import (
    BELADY,
    Counts,
    LookAhead,
    Needs,
    budget_slots,
    guesses_of,
    needs_of,
    replay,
    replay_belady,
    sizes_of,
)
from outlier_mlx.measure.replay_speed import decode_seconds
from outlier_mlx.terminal import Progress, no_progress

PERCENTS = range(10, 101, 10)


@dataclass(frozen=True)
class Machine:
    """A machine that a trace is replayed for.

    Attributes:
        name: of its chip.
        bandwidth_gb_s: GB/s of memory.
        disk_gb_s: GB/s of the disk, in reads of the size of an expert.
    """

    name: str
    bandwidth_gb_s: float
    disk_gb_s: float


@dataclass(frozen=True)
class Arm:
    """One replay.

    Attributes:
        policy: its name, or `BELADY`.
        look_ahead: which experts were read early.
        slots: experts that fit into memory.
        hit_rate: share of the needed experts of decoded tokens that were not waited for from the
            start, that is in memory or being read; None if no token was decoded.
        prompt_hit_rate: the same for passes of several tokens; None if there was none.
        read_bytes: bytes that were read for a decoded token on average, also in vain.
        tokens_per_s: decoded tokens/s at most, see `replay_speed`; None without a machine.
    """

    policy: str
    look_ahead: LookAhead
    slots: int
    hit_rate: float | None
    prompt_hit_rate: float | None
    read_bytes: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class Replays:
    """All replays of a trace.

    Attributes:
        trace: the trace.
        machine: what the speeds are for, if any.
        arms: policies, budgets and look-ahead.
        kept: of the experts of a decoded token, the share that the next token needs, too; None if
            no two tokens were decoded one after the other.
        resident_tokens_per_s: tokens/s at most with all experts in memory; None without a machine.
    """

    trace: Trace
    machine: Machine | None
    arms: list[Arm]
    kept: float | None
    resident_tokens_per_s: float | None

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return len(self.trace.about.layers) * self.trace.about.experts

    @property
    def slots(self) -> list[int]:
        """Budgets, ascending."""
        return sorted({arm.slots for arm in self.arms})

    @property
    def look_aheads(self) -> list[LookAhead]:
        """Kinds of look-ahead, none first."""
        return list(dict.fromkeys(arm.look_ahead for arm in self.arms))

    def arm(self, policy: str, slots: int, look_ahead: LookAhead = "off") -> Arm:
        """One of the replays."""
        wanted = policy, slots, look_ahead
        return next(a for a in self.arms if (a.policy, a.slots, a.look_ahead) == wanted)

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        about = asdict(self.trace.about) | {"layers": list(self.trace.about.layers)}
        return {
            "trace": about
            | {
                "tokens": len(self.trace.experts),
                "passes": len(self.trace.passes),
                "kept_by_next_token": self.kept,
                "look_ahead_recall": self.trace.recall,
            },
            "machine": None if self.machine is None else asdict(self.machine),
            "default_policy": DEFAULT_POLICY,
            "resident_tokens_per_s": self.resident_tokens_per_s,
            "replays": [
                asdict(arm) | {"expert_memory_bytes": arm.slots * self.trace.about.expert_bytes}
                for arm in self.arms
            ],
        }


def replay_all(
    trace: Trace, machine: Machine | None = None, progress: Progress = no_progress
) -> Replays:
    """Replay a trace over policies, budgets and look-ahead; a replay begins with empty slots.

    Args:
        trace: the trace.
        machine: what tokens/s are computed for.
        progress: called with replays done so far, and in all.
    """
    needs = needs_of(trace)
    looks: list[LookAhead] = ["off", "perfect"]
    if trace.foreseen is not None:
        looks.insert(1, "recorded")
    guesses = {look_ahead: guesses_of(trace, look_ahead) for look_ahead in looks}
    budgets = sorted({budget_slots(trace.about, percent) for percent in PERCENTS})
    jobs: list[tuple[str, LookAhead, int]] = [
        (policy, look_ahead, slots)
        for look_ahead in guesses
        for policy in (*POLICIES, *([BELADY] if look_ahead == "off" else []))
        for slots in budgets
    ]
    arms = []
    for done, (policy, look_ahead, slots) in enumerate(jobs):
        progress(done, len(jobs))
        if policy == BELADY:
            counts = replay_belady(needs, slots)
        else:
            made, layers = POLICIES[policy](), trace.about.layers
            counts = replay(needs, slots, made, guesses[look_ahead], layers)
        arms.append(_arm(trace, counts, machine, policy, look_ahead, slots))
    progress(len(jobs), len(jobs))
    none = np.zeros((len(needs), len(needs[0])), np.uint16)
    resident = Counts(sizes_of(needs), none, none, none)
    speed = _tokens_per_s(trace, resident, machine)
    return Replays(trace, machine, arms, _kept(trace, needs), speed)


def _arm(
    trace: Trace,
    counts: Counts,
    machine: Machine | None,
    policy: str,
    look_ahead: LookAhead,
    slots: int,
) -> Arm:
    decoded = trace.passes == 1
    experts = (counts.missed + counts.early)[decoded].sum() / max(1, decoded.sum())
    return Arm(
        policy=policy,
        look_ahead=look_ahead,
        slots=slots,
        hit_rate=counts.hit_rate(decoded),
        prompt_hit_rate=counts.hit_rate(~decoded),
        read_bytes=float(experts * trace.about.expert_bytes) if decoded.any() else None,
        tokens_per_s=_tokens_per_s(trace, counts, machine),
    )


def _tokens_per_s(trace: Trace, counts: Counts, machine: Machine | None) -> float | None:
    decoded = trace.passes == 1
    if machine is None or not decoded.any():
        return None
    rates = machine.bandwidth_gb_s, machine.disk_gb_s
    return float(1 / decode_seconds(counts, trace.about, *rates)[decoded].mean())


def _kept(trace: Trace, needs: Needs) -> float | None:
    """Of the experts of a decoded token, the share that the next one needs, too."""
    again = seen = 0
    for number, (first, second) in enumerate(pairwise(trace.passes.tolist())):
        if first == second == 1:
            for before, after in zip(needs[number], needs[number + 1], strict=True):
                seen += len(before)
                again += len(set(before) & set(after))
    return again / seen if seen else None
