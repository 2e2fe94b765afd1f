"""Perplexity of a model on texts, one document at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Tokens in a batch; a batch's logits are (documents, length, vocab) float32.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Loss:
    """Summed next-token loss in nats, and the number of tokens predicted."""

    total: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.total / self.tokens) if self.tokens else math.nan

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.total + other.total, self.tokens + other.tokens)


def document_loss(model: nn.Module, tokenizer: TokenizerWrapper, documents: Sequence[str]) -> Loss:
    """Loss of a model on documents: every token is predicted from those before it in its document.

    Args:
        model: maps tokens (batch, length) to logits (batch, length, vocab).
        tokenizer: adds its own special tokens to each document.
        documents: texts; those of fewer than two tokens count nothing.
    """
    encoded = [tokenizer.encode(document) for document in documents]
    loss = Loss(0.0, 0)
    for batch in _batches([tokens for tokens in encoded if len(tokens) > 1]):
        width = max(len(tokens) for tokens in batch)
        padded = mx.array([tokens + [0] * (width - len(tokens)) for tokens in batch])
        lengths = mx.array([len(tokens) - 1 for tokens in batch])
        # A causal model does not see the padding, which is on the right.
        logits = model(padded[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, padded[:, 1:])
        counted = mx.arange(width - 1) < lengths[:, None]
        tokens = sum(len(tokens) - 1 for tokens in batch)
        loss += Loss(float(mx.where(counted, losses, 0).sum()), tokens)
    return loss


def _batches(documents: list[list[int]]) -> Iterator[list[list[int]]]:
    """Documents of like length together, at most BATCH_TOKENS with the padding."""
    batch: list[list[int]] = []
    for tokens in sorted(documents, key=len):
        if batch and (len(batch) + 1) * len(tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
