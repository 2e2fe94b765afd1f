"""Training the alphas, one number per expert, with all other weights frozen."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers

from outlier_mlx.checkpoints.alpha import read_alpha_file
from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.perplexity import Comparison, compare, log_probs
from outlier_mlx.measure.routing import moe_blocks
from outlier_mlx.storage.output import check_writable, write_json
from outlier_mlx.terminal import Progress, no_progress

# Share of windows that is held out to judge the result.
HELD_OUT = 0.2


@dataclass(frozen=True)
class Tuned:
    """The result of tuning: figures on the held-out windows, and the alphas by layer and expert."""

    before: Comparison
    after: Comparison
    alphas: dict[str, dict[str, float]]


def apply_alphas(model: nn.Module, path: Path) -> None:
    """Set a loaded tier's alphas from an alpha.json; experts that it does not name keep theirs.

    Raises:
        CheckpointError: the file is invalid, or names layers or experts that do not exist.
        OutlierError: the model has no experts.
    """
    blocks = moe_blocks(model)
    experts = next(iter(blocks.values())).alpha.shape[0]
    for (layer, expert), value in read_alpha_file(path, len(model.layers), experts).items():
        if layer in blocks:
            blocks[layer].alpha[expert] = value


def alphas_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """A tier's alphas, as in an alpha.json."""
    return {
        str(number): {str(e): float(a) for e, a in enumerate(block.alpha.tolist())}  # type: ignore
        for number, block in moe_blocks(model).items()
    }


def tune_alphas(
    model: nn.Module,
    texts: list[list[int]],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 2,
    learning_rate: float = 0.02,
    progress: Progress = no_progress,
) -> Tuned:
    """Train the alphas of a loaded tier on windows of tokens.

    Every fifth window is held out. Of the alphas before training and after each epoch, those that
    are best on the held-out windows are kept, so the result is never worse on them.

    Args:
        model: a tier; its alphas are changed.
        texts: windows of tokens; at least two.
        teacher: a model whose predictions are learned (KL divergence) instead of the text's tokens.
        epochs: number of passes over the windows.
        learning_rate: learning rate of Adam.
        progress: called with windows done so far, and in all.

    Raises:
        OutlierError: there are too few windows, the model has no experts, or an embedding has no
            row for a token.
    """
    for each in (model, *([teacher] if teacher is not None else [])):
        check_tokens(each, chain.from_iterable(texts), "the text")
    held = max(1, round(len(texts) * HELD_OUT))
    step = max(2, len(texts) // held)
    test = texts[step - 1 :: step]
    train = [tokens for at, tokens in enumerate(texts) if at % step != step - 1]
    if not train or not test:
        raise OutlierError(f"{len(texts)} windows of text are too few: need at least two")
    blocks = moe_blocks(model)
    model.freeze()
    for block in blocks.values():
        block.unfreeze(keys=["alpha"], recurse=False)
    before = compare(model, test, teacher)
    best, kept = before, {number: mx.array(block.alpha) for number, block in blocks.items()}
    optimizer = optimizers.Adam(learning_rate)
    gradient = nn.value_and_grad(model, lambda tokens: _loss(model, tokens, teacher))
    done = 0
    for _ in range(epochs):
        model.train()
        for tokens in train:
            _, grads = gradient(mx.array([tokens]))
            optimizer.update(model, grads)
            mx.eval(model.trainable_parameters(), optimizer.state)
            done += 1
            progress(done, epochs * len(train))
        model.eval()
        now = compare(model, test, teacher)
        if _score(now) < _score(best):
            best = now
            kept = {number: mx.array(block.alpha) for number, block in blocks.items()}
    for number, block in blocks.items():
        block.alpha = kept[number]
    return Tuned(before, best, alphas_of(model))


def _score(comparison: Comparison) -> float:
    return comparison.loss if comparison.kl is None else comparison.kl


def _loss(model: nn.Module, tokens: mx.array, teacher: nn.Module | None) -> mx.array:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    if teacher is None:
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
    truth = mx.stop_gradient(log_probs(teacher(tokens[:, :-1])))
    return (mx.exp(truth) * (truth - log_probs(logits))).sum(axis=-1).mean()


def save_alphas(tuned: Tuned, path: Path, *, force: bool = False) -> None:
    """Write an alpha.json that `convert --alpha` and `generate --alpha` take.

    Raises:
        OutlierError: the result is not better than the alphas before, or the file exists and
            `force` is not set.
    """
    if _score(tuned.after) >= _score(tuned.before):
        raise OutlierError("the alphas did not get better on the held-out text; nothing was saved")
    check_writable(path, force=force)
    write_json(path, tuned.alphas)
