"""Training what a tier stores as numbers, not as codes: alphas, scales, biases, routers, norms."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import optimizers
from mlx.utils import tree_map

from outlier_mlx.checkpoints.stored_model import open_stored
from outlier_mlx.engine.gradients import Prepared, checkpoint
from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.measure import quantized_gradients
from outlier_mlx.measure.perplexity import Comparison, compare, log_probs
from outlier_mlx.measure.tuned_parts import NEARER, PARTS, Trained, part_of, trained_tensors
from outlier_mlx.models.config import is_tier, raw_config
from outlier_mlx.terminal import Progress, no_progress

# Share of windows that is held out to judge the result.
HELD_OUT = 0.2
#: Default learning rate: how far a step of Adam moves a number of size 1.
LEARNING_RATE = 0.002
#: Default number of windows in a step: their gradients are averaged.
BATCH = 4
#: Bytes of a teacher's predictions that are kept; those of other windows are computed anew.
KEPT = 2 << 30
# Nats: a smaller gain is that of rounding numbers to float32 and back.
_LEAST_GAIN = 1e-6
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class Epoch:
    """Mean training loss of a pass over the windows, and the figures on those held out after it."""

    loss: float
    held_out: Comparison


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        before: figures on the held-out windows before training.
        after: those of the best numbers found.
        tensors: these numbers, by the tensor's name in the tier, in the dtype they are stored in.
        epochs: what each pass over the windows gave.
        peak: bytes of memory that MLX had at most, the models among them.
    """

    before: Comparison
    after: Comparison
    tensors: dict[str, mx.array]
    epochs: list[Epoch]
    peak: int

    def check_better(self) -> None:
        """Check that the held-out windows are predicted better than before.

        Raises:
            OutlierError: they are not.
        """
        if not score(self.after) < score(self.before) - _LEAST_GAIN:  # neither may be a number
            raise OutlierError("the model did not get better on the held-out text; nothing saved")

    def alphas(self) -> dict[str, dict[str, float]]:
        """The alphas by layer and expert, as in an alpha.json."""
        found = ((n.split(".")[2], v) for n, v in self.tensors.items() if n.endswith(".alpha"))
        return {
            layer: {str(e): float(a) for e, a in enumerate(value.tolist())}  # type: ignore
            for layer, value in found
        }

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "epochs": [
                {"loss": epoch.loss, "held_out": epoch.held_out.as_json()} for epoch in self.epochs
            ],
            "peak_bytes": self.peak,
        }


def score(comparison: Comparison) -> float:
    """What tuning minimises: the divergence from the teacher, or the loss without one."""
    return comparison.loss if comparison.kl is None else comparison.kl


def tune(
    model: nn.Module,
    texts: list[list[int]],
    parts: Sequence[str] = tuple(PARTS),
    *,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    epochs: int = 2,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    dtypes: Mapping[str, mx.Dtype] | None = None,
    progress: Progress = no_progress,
) -> Tuned:
    """Train the numbers of a loaded tier on windows of tokens; its codes and trits stay.

    Every fifth window is held out. Of the numbers before training and after each epoch, rounded as
    they will be stored, those that are best on the held-out windows are kept, so the result is
    never worse on them. Ended early, the model is as it was.

    Args:
        model: a tier; its numbers are changed.
        texts: windows of tokens; at least two.
        parts: what to train, of `tuned_parts.PARTS`.
        teacher: a model whose predictions are learned (KL divergence) instead of the text's tokens.
        temperature: divides both models' logits in the divergence that is trained; the held-out
            figures are those at 1.
        epochs: number of passes over the windows, each in another order.
        batch: windows whose gradients are averaged for a step.
        learning_rate: learning rate of Adam for a number of size 1; it falls to 0 along a cosine.
        dtypes: of tensors as they are stored, by name; by default the model's own.
        progress: called with windows done so far, and in all.

    Raises:
        OutlierError: there are too few windows, the model has none of the parts, or an embedding
            has no row for a token.
    """
    for one in (model, *([teacher] if teacher is not None else [])):
        check_tokens(one, chain.from_iterable(texts), "the text")
    train, test = split(texts)
    mx.reset_peak_memory()
    target = None if teacher is None else Teacher(teacher, KEPT)
    steps = epochs * -(-len(train) // batch)
    optimizer = optimizers.Adam(optimizers.cosine_decay(learning_rate, steps), bias_correction=True)
    rates = PARTS if teacher is None or "base" not in parts else NEARER
    order = np.random.default_rng(0)
    with ExitStack() as stack:
        stack.enter_context(quantized_gradients.row_by_row(model, scales="base" in parts))
        before = compare(model, test, target)
        if target is not None and epochs == 1:
            target.room = 0  # each window that is trained on is needed once
        trained = stack.enter_context(trained_tensors(model, parts, dtypes or {}, rates))
        kept = {each.name: each.value for each in trained}
        best, done = before, []
        numbers = {each.name: each.number for each in trained}  # what Adam sees
        gradient = mx.value_and_grad(_loss(model, trained, target, temperature))
        try:
            for epoch in range(epochs):
                total, grads = 0.0, None
                for at, index in enumerate(order.permutation(len(train)).tolist(), 1):
                    with checkpointed(model, trained):
                        loss, more = gradient(numbers, mx.array([train[index]]))
                        grads = more if grads is None else tree_map(mx.add, grads, more)
                        mx.eval(loss, grads)
                    total += float(loss)
                    # Adam's steps have the same length for a sum as for a mean.
                    if at % batch == 0 or at == len(train):
                        numbers = optimizer.apply_gradients(grads, numbers)
                        grads = None
                        mx.eval(numbers, optimizer.state)
                    progress(epoch * len(train) + at, epochs * len(train))
                for each in trained:
                    each.put(each.rounded(numbers[each.name]))
                done.append(Epoch(total / len(train), compare(model, test, target)))
                if score(done[-1].held_out) < score(best):
                    best = done[-1].held_out
                    kept = {each.name: each.value for each in trained}
        finally:
            for each in trained:
                each.put(kept[each.name])
        tensors = {k: v for each in trained for k, v in each.tensors().items()}
    return Tuned(before, best, tensors, done, mx.get_peak_memory())


class Teacher:
    """A model whose logits for a window are computed once, if there is room to keep them.

    Attributes:
        room: bytes of logits that can still be kept.
    """

    def __init__(self, model: nn.Module, room: int) -> None:
        """Args: a model, and what `room` is at first."""
        self.room = room
        self._model = model
        self._kept: dict[bytes, mx.array] = {}

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits (1, length, vocab) for tokens (1, length)."""
        key = np.asarray(ids).tobytes()
        if key in self._kept:
            return self._kept[key]
        logits = mx.stop_gradient(self._model(ids))
        if logits.nbytes <= self.room:
            self.room -= logits.nbytes
            self._kept[key] = logits
            mx.eval(logits)
        return logits


def split(texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The windows that are trained on, and those held out.

    Raises:
        OutlierError: there is not one of each.
    """
    held = max(1, round(len(texts) * HELD_OUT))
    step = max(2, len(texts) // held)
    test = texts[step - 1 :: step]
    train = [tokens for at, tokens in enumerate(texts) if at % step != step - 1]
    if not train or not test:
        raise OutlierError(f"{len(texts)} windows of text are too few: need at least two")
    return train, test


def kept_tokens(texts: list[list[int]], epochs: int) -> int:
    """Tokens of windows that a teacher is asked about more than once.

    Raises:
        OutlierError: there are too few windows.
    """
    _, test = split(texts)
    return sum(len(tokens) - 1 for tokens in (test if epochs == 1 else texts))


def _loss(
    model: nn.Module, trained: Sequence[Trained], teacher: Teacher | None, temperature: float
) -> Callable[[dict[str, mx.array], mx.array], mx.array]:
    def loss(numbers: dict[str, mx.array], tokens: mx.array) -> mx.array:
        for each in trained:
            each.put(each.of_number(numbers[each.name]))
        logits = model(tokens[:, :-1]).astype(mx.float32)
        if teacher is None:
            return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
        truth = log_probs(teacher(tokens[:, :-1]) / temperature)
        ours = log_probs(logits / temperature)
        # The gradient of a divergence falls with the square of the temperature.
        return temperature**2 * (mx.exp(truth) * (truth - ours)).sum(axis=-1).mean()

    return loss


@contextmanager
def checkpointed(model: nn.Module, trained: Sequence[Trained]) -> Iterator[None]:
    """Until the block ends, a layer keeps only its input for the gradient, and is computed again.

    Parameters and names stay the same.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(model.layers):
            own = [each for each in trained if f".layers.{number}." in each.name]
            stack.callback(checkpoint(layer, partial(_prepared, own)))
        yield


def _prepared(own: Sequence[Trained]) -> Prepared:
    return own, nullcontext


@dataclass(frozen=True)
class TuningPlan:
    """What tuning will train, and what it takes, from the headers of a tier's files.

    Attributes:
        numbers: how many numbers are trained.
        nbytes: what that takes beside the model and what computing a window takes.
        dtypes: the dtypes that the trained tensors are stored in, by name.
    """

    numbers: int
    nbytes: int
    dtypes: dict[str, mx.Dtype]


def plan_tuning(
    tier: Path, parts: Sequence[str], window: int, *, teacher: bool = False, kept: int = 0
) -> TuningPlan:
    """Plan the tuning of a tier; only headers are read.

    Args:
        tier: its folder.
        parts: what to train, of `tuned_parts.PARTS`.
        window: tokens in a window.
        teacher: whether another model's predictions are learned.
        kept: tokens whose predictions by the teacher are kept if there is room; see `kept_tokens`.

    Raises:
        CheckpointError: it is not a tier, or not valid.
    """
    raw = raw_config(tier)
    if not is_tier(raw):
        raise CheckpointError(f"{tier}: not a tier; only tiers are tuned")
    stored = open_stored(tier)
    config = stored.config
    assert config is not None  # a tier's is checked
    tensors = stored.tensors
    chosen = {n: t for n, t in tensors.items() if part_of(n, len(t.shape)) in parts}
    numbers = sum(prod(tensor.shape) for tensor in chosen.values())
    routed = (config.expert_width or 0) * config.top_k
    # Each number has five arrays of float32: what Adam sees, two averages, the gradient, and
    # another one that is added to it, or a new number while a step is taken; and two as the model
    # has them: the value and the best one. Each layer keeps its input; one is computed again; the
    # loss has six arrays of logits, and three more with a teacher.
    layer = 7 * (config.intermediate + routed) // 2
    token = config.layers * config.hidden + layer + (9 if teacher else 6) * config.vocab
    work = 7 * numbers + window * token
    group = (raw.get("quantization") or {}).get("group_size", 0)
    matrices = (t for n, t in tensors.items() if n.endswith("scales") and part_of(n, 2) == "base")
    largest = max((group * prod(t.shape) for t in matrices), default=0)
    work += quantized_gradients.ARRAYS * min(quantized_gradients.WEIGHTS, largest)
    if "rows" in parts:  # see `RowScales`: ones in place of scales and biases, a copy of the codes
        weights = 3 * config.hidden * (config.expert_width or 0) * config.experts
        work += len(config.moe_layers) * weights // 8 + window * 12 * routed
    nbytes = 4 * work + min(KEPT, 4 * kept * config.vocab)
    return TuningPlan(numbers, nbytes, {n: DTYPES[t.dtype] for n, t in chosen.items()})
