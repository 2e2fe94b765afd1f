"""The loop of every stage: Adam on some numbers of a model, resumed from any step bit for bit."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.train.forward import Place
from outlier_mlx.train.state import Arrays, Fields, State, Work, is_count, is_figure
from outlier_mlx.writing.interrupts import undivided

#: Called with an event: a dict of JSON values, of which "event" says what it is.
Log = Callable[[dict[str, Any]], None]
#: The arrays of a step: tokens, and what belongs to them.
Batch = tuple[mx.array, ...]

BETAS = (0.9, 0.98)
_EPSILON = 1e-8
# Share of the learning rate by which a step shrinks a decaying number.
_DECAY = 0.002
# The largest norm of a step's gradient; a larger one is scaled down to it.
_CLIP = 1.0
_WARM = 100
# Steps between two looks at held-out text, at least.
_LEAST_APART = 20
# Share of the learning rate at the last step.
_LAST = 0.02


class Number(NamedTuple):
    """What is trained.

    Attributes:
        place: where it is in the model; float32.
        unit: a typical size of one of its numbers: what a step of Adam at learning rate 1 changes.
        decays: whether it shrinks while nothing else changes it.
    """

    place: Place
    unit: float
    decays: bool = False


@dataclass(frozen=True)
class Stage:
    """What is trained in a stage, and on what.

    Attributes:
        name: of the stage, in the work folder.
        title: of the stage, for the log.
        numbers: what is trained, by name.
        steps: number of steps.
        rate: largest learning rate.
        loss: of the current numbers on a batch, with its parts; the last argument says whether the
            base is rounded.
        parts: names of the parts, for the log.
        batch: the batch of a step, a function of the step alone.
        rounds: whether the base is rounded in every second step.
        tokens: trained tokens in a batch.
        evaluate: measures held-out text; its figures go into the log.
        evaluations: how often, besides at the end.
    """

    name: str
    title: str
    numbers: Mapping[str, Number]
    steps: int
    rate: float
    loss: Callable[[Batch, bool], tuple[mx.array, ...]]
    parts: tuple[str, ...]
    batch: Callable[[int], Batch]
    rounds: bool
    tokens: int
    evaluate: Callable[[], dict[str, Any]]
    evaluations: int = 8


@dataclass
class _State:
    """All that the next step depends on."""

    step: int
    values: Arrays
    means: Arrays
    squares: Arrays
    seconds: float = 0.0
    is_whole: bool = True  # not while a step changes it

    def arrays(self) -> Arrays:
        groups = {"value": self.values, "mean": self.means, "square": self.squares}
        return {f"{kind}.{name}": a for kind, of in groups.items() for name, a in of.items()}


def run(
    stage: Stage,
    work: Work,
    log: Log,
    *,
    save_every: float,
    log_every: float = 2.0,
    so_far: bool = False,
) -> tuple[int, float]:
    """Train the numbers of a stage where they are in the model.

    An interrupted stage goes on from its last state. When anything ends it early, the state of its
    last whole step is saved.

    Args:
        stage: the stage.
        work: where its state is kept.
        log: called with the events "step" and "held_out".
        save_every: seconds after which the state is saved.
        log_every: seconds between two events "step".
        so_far: take the numbers as an interrupted run left them, and make no further step.

    Returns:
        Steps that were made, and seconds that they took, in all runs together.

    Raises:
        OutlierError: the loss is not a number.
        CheckpointError: the state in the work folder is damaged.
    """
    state = _begin(stage, work)
    if so_far:
        _put(stage, state.values)
        return state.step, state.seconds
    steps = _steps(stage)
    every = max(_LEAST_APART, math.ceil(stage.steps / stage.evaluations))
    last_log, logged = time.monotonic(), state.step

    def unfinished() -> State | None:
        if state.is_whole and 0 < state.step < stage.steps:
            return state.arrays(), {"step": state.step, "seconds": state.seconds}
        return None

    with work.saving(stage.name, unfinished, save_every) as stepped:
        while state.step < stage.steps:
            began = time.monotonic()
            loss, parts, gradients = steps(state)
            with undivided():
                _step(stage, state, gradients)
                now = time.monotonic()
                state.seconds += now - began
            stepped()
            if now - last_log >= log_every or state.step in (1, stage.steps):
                speed = stage.tokens * (state.step - logged) / max(1e-9, now - last_log)
                left = state.seconds / state.step * (stage.steps - state.step)
                log(
                    {"event": "step", "stage": stage.title, "step": state.step}
                    | {"steps": stage.steps, "loss": loss, "parts": parts}
                    | {"tokens_per_second": speed, "seconds_left": left}
                )
                last_log, logged = now, state.step
            if state.step % every == 0 and state.step < stage.steps:
                _put(stage, state.values)
                told = {"event": "held_out", "stage": stage.title, "step": state.step}
                log(told | stage.evaluate())
    _put(stage, state.values)
    return state.step, state.seconds


def _begin(stage: Stage, work: Work) -> _State:
    shapes = {name: number.place.value.shape for name, number in stage.numbers.items()}
    kinds = ("value", "mean", "square")
    expected = {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}
    fields: Fields = {
        "step": lambda step: is_count(step) and 0 < step <= stage.steps,
        "seconds": is_figure,
    }
    found = work.running(stage.name, expected, fields)
    if found is None:
        values = {name: number.place.value for name, number in stage.numbers.items()}
        means, squares = ({n: mx.zeros(s) for n, s in shapes.items()} for _ in range(2))
        mx.eval(values, means, squares)
        return _State(0, values, means, squares)
    arrays, record = found
    values, means, squares = ({n: arrays[f"{kind}.{n}"] for n in shapes} for kind in kinds)
    return _State(record["step"], values, means, squares, record["seconds"])


def _put(stage: Stage, values: Arrays) -> None:
    for name, number in stage.numbers.items():
        number.place.put(values[name])


def _steps(stage: Stage) -> Callable[[_State], tuple[float, dict[str, float], Arrays]]:
    """A function that computes the next step's loss, its parts and gradients."""

    def of_numbers(values: Arrays, batch: Batch, rounded: bool) -> tuple[mx.array, ...]:
        _put(stage, values)
        return stage.loss(batch, rounded)

    @cache
    def gradient(rounded: bool) -> Any:
        def loss(values: Arrays, *batch: mx.array) -> tuple[mx.array, ...]:
            return of_numbers(values, batch, rounded)

        return compiled(mx.value_and_grad(loss))

    def compute(state: _State) -> tuple[float, dict[str, float], Arrays]:
        rounded = stage.rounds and state.step % 2 == 1
        found, gradients = gradient(rounded)(state.values, *stage.batch(state.step))
        mx.eval(found, gradients)
        loss, *parts = (float(value) for value in found)
        if not math.isfinite(loss):
            raise OutlierError(
                f"{stage.title}: the loss is {loss} at step {state.step + 1}; a lower learning rate"
                " may help"
            )
        return loss, dict(zip(stage.parts, parts, strict=True)), gradients

    return compute


def _step(stage: Stage, state: _State, gradients: Arrays) -> None:
    """A step of Adam with bias correction; each tensor is replaced before the next is computed."""
    state.is_whole = False
    squares = mx.stack([mx.square(gradient).sum() for gradient in gradients.values()])
    norm = math.sqrt(float(squares.sum()))
    shrink = min(1.0, _CLIP / max(norm, 1e-30))
    count = state.step + 1
    rate = stage.rate * scheduled(state.step, stage.steps)
    adam = compiled(_adam)
    corrections = [1 - beta**count for beta in BETAS]
    for name, number in stage.numbers.items():
        factors = (shrink, rate * number.unit, rate * _DECAY * number.decays, *corrections)
        value, mean, square = adam(
            state.values.pop(name),
            gradients.pop(name),
            state.means.pop(name),
            state.squares.pop(name),
            mx.array(factors),
        )
        mx.eval(value, mean, square)
        state.values[name], state.means[name], state.squares[name] = value, mean, square
    state.step, state.is_whole = count, True


def compiled(function: Callable) -> Any:
    """The function compiled, on a GPU. For the CPU, MLX would run a C++ compiler for a minute."""
    return function if mx.default_device() == mx.cpu else mx.compile(function)


def _adam(
    value: mx.array, gradient: mx.array, mean: mx.array, square: mx.array, factors: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    shrink, rate, decay, first, second = (factors[n] for n in range(5))
    gradient = gradient * shrink
    mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * square + (1 - BETAS[1]) * mx.square(gradient)
    change = (mean / first) / (mx.sqrt(square / second) + _EPSILON)
    return value * (1 - decay) - rate * change, mean, square


def scheduled(step: int, steps: int) -> float:
    """Share of the learning rate for a step: it rises for a while, then falls along a cosine."""
    warm = min(1.0, (step + 1) / min(_WARM, max(1, steps // 10)))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return warm * (_LAST + (1 - _LAST) * cosine)


def drawn(name: str, places: np.ndarray, windows: int, seed: int) -> np.ndarray:
    """Windows of a text in the order of training: all in a random order, then all in another one.

    Args:
        name: of the text.
        places: (n,), positions in that endless order.
        windows: windows that there are.
        seed: of the order.

    Returns:
        (n,) numbers of windows.
    """
    orders = [_order(name, windows, int(n), seed) for n in places // windows]
    return np.array([order[at] for order, at in zip(orders, places % windows, strict=True)])


@lru_cache(maxsize=32)
def _order(name: str, windows: int, number: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, crc32(name.encode()), number]).permutation(windows)
