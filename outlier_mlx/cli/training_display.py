"""What a training shows: its texts before, its progress, and its perplexities at the end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from outlier_mlx.cli.app import message_of, say
from outlier_mlx.cli.signals import Ended
from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.terminal import print_columns, size, stderr, stdout, working

if TYPE_CHECKING:
    from outlier_mlx.train.plan import MemoryPlan
    from outlier_mlx.train.settings import Settings
    from outlier_mlx.train.texts import Corpora

# Seconds between two lines in a pipe, where there is no line that changes.
_PAUSE = 30.0
# Fewer different windows than these teach experts little.
_FEW = 500


class Display:
    """Shows a training's events: a line that changes on a terminal, and one for each stage."""

    def __init__(
        self, settings: "Settings", domains: int, *, quiet: bool, so_far: bool = False
    ) -> None:
        """Args: settings, number of domains, whether to be silent; `so_far` as for `upcycle`."""
        trained = settings.expert_steps if settings.straight_through else 0
        self._total = domains * trained + settings.joint_steps
        self._quiet, self._so_far = quiet, so_far
        self._done: dict[str, int] = {}
        self._said = time.monotonic()
        self._show: Callable[[str], None] = lambda text: None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress until the block ends."""
        with working("preparing", quiet=self._quiet) as show:
            self._show = show
            yield

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event of the training."""
        if self._quiet:
            return
        kind = event["event"]
        if kind == "resumed" and not self._so_far:
            say("going on with the training that was interrupted")
        elif kind == "step":
            self._step(event)
        elif kind == "teacher":
            self._show(
                f"the teacher predicts {event['domain']}: {event['done']:,} of"
                f" {event['total']:,} windows"
            )
        elif kind == "stage":
            say(stage_line(event))

    def _step(self, event: Mapping[str, Any]) -> None:
        step, steps = event["step"], event["steps"]
        self._done[event["stage"]] = step
        line = (
            f"{event['stage']}: step {step} of {steps}, loss {event['loss']:.3f},"
            f" {event['tokens_per_second']:,.0f} tokens/s"
        )
        if step < steps and step > 1:
            left = max(steps - step, self._total - sum(self._done.values()))
            line += f", {duration(event['seconds_left'] / (steps - step) * left)} left"
        self._show(line if step < steps else f"{event['stage']}: measuring the held-out text")
        if not stderr().is_terminal and time.monotonic() - self._said >= _PAUSE:
            self._said = time.monotonic()
            say(line)


def stage_line(event: Mapping[str, Any]) -> str:
    """The line about a stage that ended."""
    before, after = event.get("before") or {}, event.get("after") or {}
    steps, planned = event.get("steps"), event.get("planned")
    if planned and not steps:
        return f"{event['name']}: left out, as none of its {planned:,} steps was made"
    if not after:
        errors = event.get("errors") or {}
        told = [f"{name} {error:.3f}" for name, error in errors.items()]
        base = [f"{name} {value:.2f}" for name, value in before.items()]
        line = f"the base's held-out perplexities: {', '.join(base)}"
        return line + (f"; relative error of the experts' weights: {', '.join(told)}" * bool(told))
    figures = ", ".join(f"{n} {before[n]:.2f} → {after[n]:.2f}" for n in before if n in after)
    kept = "" if event["kept"] else "; not kept"
    made = "" if steps == planned else f"{steps:,} of {planned:,} steps, "
    return f"{event['name']}: {figures}{kept} ({made}{duration(event['seconds'])})"


def duration(seconds: float) -> str:
    """A time for people: "12 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def print_data(corpora: "Corpora") -> None:
    """Print what will be trained on, to stderr."""
    rows = [
        (
            corpus.name,
            f"{corpus.documents:,}",
            f"{len(corpus.train):,}",
            f"{len(corpus.held_out):,}",
            f"{corpus.tokens:,}",
        )
        for corpus in corpora
    ]
    heads = ("text", "documents", "windows", "held out", "tokens")
    print_columns(stderr(), heads, rows)
    few = [corpus.name for corpus in corpora.domains if len(corpus.train) < _FEW]
    if few:
        say(
            f"tip: {listed(few)}: more text helps most, some thousands of different windows for"
            " each domain"
        )


def memory_line(memory: "MemoryPlan", layers: int) -> str:
    """What a training takes of memory: in all, by what, and with how many layers at once."""
    parts = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in memory.parts.items() if nbytes)
    groups = ""
    if memory.layers_at_once < layers:
        groups = f", with the experts of {memory.layers_at_once} layers in training at once"
    trained = sum(memory.parts.values())
    before = f"{size(memory.teacher)} for the teacher, then " if memory.teacher else ""
    return f"memory: {before}{size(trained)}{groups}: {parts}; {memory.available}"


def print_result(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Print the held-out perplexities, to stdout."""
    rows = [
        (name, f"{value:.3f}", f"{after[name]:.3f}", f"{after[name] / value - 1:+.1%}")
        for name, value in before.items()
    ]
    heads = ("held-out text", "base", "with experts", "change")
    print_columns(stdout(), heads, rows)


def print_event(event: Mapping[str, Any]) -> None:
    """Print an event to stdout as a line of JSON."""
    from outlier_mlx.train.log import as_line

    print(as_line(dict(event)), end="", flush=True)


@contextmanager
def failing_as_json() -> Iterator[None]:
    """If the block fails or is interrupted, print an event that says so."""
    try:
        yield
    except (OutlierError, OSError, MemoryError, KeyboardInterrupt, Ended) as error:
        with suppress(OSError):  # whoever reads stdout may be gone, or be why it failed
            event = {"event": "failed", "time": round(time.time(), 3)}
            print_event(event | {"error": message_of(error)})
        raise


def experts_line(settings: "Settings", domains: int) -> str:
    """How many experts there will be, and where."""
    assert settings.layers is not None
    count, layers = domains * settings.experts_per_domain, layer_ranges(settings.layers)
    where = f"in each of {len(settings.layers)} layers ({layers})"
    return (
        f"{count} expert{'s' * (count > 1)} of width {settings.expert_size}"
        f" {where if len(settings.layers) > 1 else f'in layer {layers}'}, {settings.top_k} for a"
        " token"
    )


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending numbers for people: "1 to 3, 7"."""
    found: list[list[int]] = []
    for number in layers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in found)
