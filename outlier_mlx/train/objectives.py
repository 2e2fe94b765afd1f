"""What training minimises on the text, without ever holding all logits.

The head is never trained, so that the gradient of its input is all that is needed of it. Both are
computed together, for a part of the tokens at a time.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from outlier_mlx.engine.gradients import custom

#: The sum of losses over tokens, and its gradient with respect to the logits (tokens, vocab).
Scored = tuple[mx.array, mx.array]
#: From logits (tokens, vocab) float32, and arrays with a row for each of these tokens.
Score = Callable[..., Scored]

# Logits that are there at a time, in numbers.
LOGITS = 1 << 24


def through_head(
    hidden: mx.array,
    head: mx.array,
    score: Score,
    *targets: mx.array,
    after: mx.array | None = None,
) -> mx.array:
    """The mean loss of tokens, with a gradient for `hidden` alone.

    Args:
        hidden: (..., hidden), what the head gets.
        head: (vocab, hidden).
        score: the loss; see `Score`.
        targets: (..., anything) with a row for each token.
        after: what is computed before the first logits are.
    """
    rows = [target.reshape(-1, *target.shape[hidden.ndim - 1 :]) for target in targets]
    flat = hidden.reshape(-1, hidden.shape[-1])
    step = chunk(head.shape[0])

    @custom
    def fused(flat: mx.array) -> tuple[mx.array, mx.array]:
        total, gradients = mx.zeros(()), []
        before = [] if after is None else [after]
        for start in range(0, len(flat), step):
            (part,) = mx.depends([flat[start : start + step]], before)
            logits = (part @ head.T).astype(mx.float32)
            loss, of_logits = score(logits, *(row[start : start + step] for row in rows))
            total = total + loss
            gradients.append(of_logits.astype(flat.dtype) @ head)
            before = [total, gradients[-1]]
        return total / len(flat), mx.concatenate(gradients) / len(flat)

    @fused.vjp
    def fused_vjp(_: mx.array, cotangent: Any, found: Any) -> mx.array:
        scaled: mx.array = cotangent[0] * found[1]
        return scaled.astype(flat.dtype)

    loss: mx.array = fused(flat)[0]
    return loss


def mean_loss(hidden: mx.array, head: mx.array, score: Score, *targets: mx.array) -> float:
    """The mean loss of tokens, as of `through_head`, without the work for a gradient."""
    rows = [target.reshape(-1, *target.shape[hidden.ndim - 1 :]) for target in targets]
    flat = hidden.reshape(-1, hidden.shape[-1])
    step, total = chunk(head.shape[0]), 0.0
    for start in range(0, len(flat), step):
        logits = (flat[start : start + step] @ head.T).astype(mx.float32)
        total += float(score(logits, *(row[start : start + step] for row in rows))[0])
    return total / len(flat)


def chunk(vocab: int) -> int:
    """Tokens whose logits are there at a time."""
    return max(1, LOGITS // vocab)


def next_token(logits: mx.array, targets: mx.array) -> Scored:
    """Cross-entropy with the next tokens (tokens,)."""
    normaliser, probs = _softmax(logits)
    of_target = mx.take_along_axis(logits, targets[:, None], axis=-1)
    is_target = mx.arange(logits.shape[-1]) == targets[:, None]
    return (normaliser - of_target).sum(), probs - is_target


def divergence(logits: mx.array, truth: mx.array) -> Scored:
    """Divergence (Kullback-Leibler) from the prediction of the logits `truth` (tokens, vocab)."""
    normaliser, probs = _softmax(logits)
    true_normaliser, true_probs = _softmax(truth.astype(mx.float32))
    # Their logarithms' difference is that of logits and normalisers.
    apart = (true_probs * (truth - logits)).sum() + (normaliser - true_normaliser).sum()
    return apart, probs - true_probs


def distilled(temperature: float) -> Score:
    """Divergence from a teacher of whom the likeliest tokens are known.

    All other tokens together count as one more. Like every divergence at a temperature, it is
    multiplied by its square, by which its gradient falls.

    Args:
        temperature: divides the logits.

    Returns:
        A score of logits, the tokens (tokens, k) int32, and the logarithms of the teacher's
        probabilities of them at that temperature (tokens, k).
    """

    def loss(logits: mx.array, tokens: mx.array, log_probs: mx.array) -> mx.array:
        cooled = logits / temperature
        ours = mx.take_along_axis(cooled, tokens, axis=-1)
        ours = ours - mx.logsumexp(cooled, axis=-1, keepdims=True)
        log_probs = log_probs.astype(mx.float32)
        probs = mx.exp(log_probs)
        apart = (probs * (log_probs - ours)).sum(axis=-1)
        rest, our_rest = (mx.maximum(1 - p.sum(axis=-1), 1e-6) for p in (probs, mx.exp(ours)))
        apart = apart + rest * (mx.log(rest) - mx.log(our_rest))
        return temperature**2 * apart.sum()

    def score(logits: mx.array, tokens: mx.array, log_probs: mx.array) -> Scored:
        found: Scored = mx.value_and_grad(loss)(logits, tokens, log_probs)
        return found

    return score


def _softmax(logits: mx.array) -> Scored:
    """log of the sum of exponentials, (tokens, 1), and probabilities, from one exponential."""
    largest = logits.max(axis=-1, keepdims=True)
    exps = mx.exp(logits - largest)
    sums = exps.sum(axis=-1, keepdims=True)
    return largest + mx.log(sums), exps / sums
