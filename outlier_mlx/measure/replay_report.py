"""What `bench --trace` prints and draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outlier_mlx.engine.paging.policies import DEFAULT_POLICY, POLICIES
from outlier_mlx.measure.pictures import drawable, picture
from outlier_mlx.measure.replay import BELADY
from outlier_mlx.measure.replay_run import Arm, LookAhead, Replays
from outlier_mlx.terminal import print_columns, print_heading, size, stdout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A policy and a kind of look-ahead.
Kind = tuple[str, LookAhead]
#: Heading of a column, its arms, and what is shown of an arm.
Column = tuple[str, Kind, Callable[[Arm], str]]
# Names and lines in pictures.
_LINES = {
    "lru": ("LRU", "tab:orange"),
    "lfu": ("LFU", "tab:green"),
    "least-stale": ("least-stale", "tab:purple"),
    "least-likely": ("least-likely", "tab:blue"),
    BELADY: ("best possible (Belady)", "0.4"),
}
_STYLES: dict[LookAhead, str] = {"off": "-", "recorded": "--", "perfect": ":"}


def print_replays(found: Replays) -> None:
    """Print hit rates by budget and policy, and tokens/s if there is a machine to have them."""
    console, about, trace = stdout(), found.trace.about, found.trace
    shape = f"{len(about.layers)} MoE layers of {about.experts} experts"
    shape += f", {size(about.expert_bytes)} each"
    print_heading(console, about.model, f" on {about.text}: {len(trace.experts)} tokens, {shape}")
    if found.kept is not None:
        kept = f"{found.kept:.0%} of a token's experts are needed by the next token, too"
        console.print(f"{kept} (at random {about.top_k / about.experts:.0%})", soft_wrap=True)
    if trace.recall is not None:
        console.print(f"recorded look-ahead foresees {trace.recall:.0%}", soft_wrap=True)
    decoded = found.arms[0].hit_rate is not None
    policies: list[Kind] = [(name, "off") for name in POLICIES]
    ahead: list[Kind] = [(DEFAULT_POLICY, look) for look in found.look_aheads]
    of = "decoded tokens" if decoded else "prompts"
    kinds: list[Kind] = [*policies, (BELADY, "off")]
    _table(
        f"Hit rate of {of}, %",
        found,
        [(_policy(kind), kind, lambda arm: f"{100 * _rate(arm, decoded):.1f}") for kind in kinds],
    )
    if not decoded:
        return
    columns: list[Column] = [(f"hits, %\n{look}", (name, look), _hits) for name, look in ahead]
    columns += [(f"read\n{look}", (name, look), _read) for name, look in ahead]
    _table(f"Look-ahead, and bytes read for a token, with {DEFAULT_POLICY}", found, columns)
    if found.machine is None:
        return
    rates = f"{found.machine.bandwidth_gb_s:g} GB/s, disk {found.machine.disk_gb_s:g} GB/s"
    columns = [(_policy(kind), kind, _speed) for kind in policies]
    columns += [(f"{_policy(kind)}\n+ {kind[1]}", kind, _speed) for kind in ahead[1:]]
    _table(f"Tokens/s at most on {found.machine.name}, {rates}", found, columns)
    speed = _per_second(found.resident_tokens_per_s)
    console.print(f"with all experts in memory: {speed} tokens/s at most", soft_wrap=True)


def _table(title: str, found: Replays, columns: Sequence[Column]) -> None:
    """Print a table with a row for each budget."""
    rows = []
    for slots in found.slots:
        cells = [cell(found.arm(kind[0], slots, kind[1])) for _, kind, cell in columns]
        memory = size(slots * found.trace.about.expert_bytes)
        rows.append([f"{memory} ({slots / found.total:.0%})", *cells])
    stdout().print()
    print_columns(stdout(), ["experts\nin memory", *(c[0] for c in columns)], rows, title=title)


def _policy(kind: Kind) -> str:
    return "best\npossible" if kind[0] == BELADY else kind[0].replace("-", "-\n")


def _hits(arm: Arm) -> str:
    return f"{100 * (arm.hit_rate or 0):.1f}"


def _read(arm: Arm) -> str:
    return size(round(arm.read_bytes or 0))


def _speed(arm: Arm) -> str:
    return _per_second(arm.tokens_per_s)


def _per_second(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:.1f}" if tokens < 100 else f"{tokens:.0f}"


def draw_replays(found: Replays, path: Path) -> None:
    """Draw hit rates over budgets, and tokens/s beside them if there is a machine to have them.

    Args:
        found: replays of a trace.
        path: the picture to write; its suffix is the format.

    Raises:
        OutlierError: as `picture`.
    """
    decoded = found.arms[0].hit_rate is not None
    speeds = decoded and found.machine is not None
    with picture(path, 11 if speeds else 6, 4.2) as figure:
        grid = figure.subplots(1, 2 if speeds else 1, squeeze=False)[0]
        kinds: list[Kind] = [(name, "off") for name in (*POLICIES, BELADY)]
        of = "decoded tokens" if decoded else "prompts"
        _lines(grid[0], found, kinds, lambda arm: 100 * _rate(arm, decoded), f"hit rate of {of}, %")
        grid[0].set_ylim(0, 102)
        about = found.trace.about
        figure.suptitle(drawable(f"{about.model} on {about.text}"), fontsize=10)
        if not speeds or found.machine is None:
            return
        kinds = [(name, "off") for name in POLICIES]
        kinds += [(DEFAULT_POLICY, look) for look in found.look_aheads if look != "off"]
        machine = f"{found.machine.name}, disk {found.machine.disk_gb_s:g} GB/s"
        label = f"tokens/s at most\n({drawable(machine)})"
        _lines(grid[1], found, kinds, lambda arm: arm.tokens_per_s or 0.0, label)
        grid[1].set_ylim(bottom=0)


def _rate(arm: Arm, decoded: bool) -> float:
    return (arm.hit_rate if decoded else arm.prompt_hit_rate) or 0.0


def _lines(
    axes: "Axes",
    found: Replays,
    kinds: list[Kind],
    value: Callable[[Arm], float],
    label: str,
) -> None:
    shares = [100 * slots / found.total for slots in found.slots]
    for policy, look_ahead in kinds:
        name, color = _LINES[policy]
        name += "" if look_ahead == "off" else f", {look_ahead} look-ahead"
        ys = [value(found.arm(policy, slots, look_ahead)) for slots in found.slots]
        axes.plot(
            shares, ys, _STYLES[look_ahead], marker="o", ms=3, lw=1.3, color=color, label=name
        )
    axes.set_xlabel("experts in memory, % of all")
    axes.set_ylabel(label)
    axes.grid()
    axes.legend(loc="best")
