"""Perplexity of a model on a text, and its divergence from another model."""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.chips import this_chip
from outlier_mlx.engine.generate import activation_dtype, described
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.environment import dtype_name, versions
from outlier_mlx.measure.measured import Measured
from outlier_mlx.models.sizes import context_length
from outlier_mlx.terminal import Progress, no_progress, quiet_transformers
from outlier_mlx.upstream import TokenizerWrapper, make_prompt_cache


@dataclass(frozen=True)
class Comparison:
    """Figures of a model on a text; the last two are None without another model.

    Attributes:
        tokens: number of predicted tokens.
        loss: mean next-token loss in nats.
        standard_error: standard error of the loss.
        kl: mean Kullback-Leibler divergence from the other model's prediction to this one's, nats.
        agreement: share of positions where both models' likeliest tokens are equal.
    """

    tokens: int
    loss: float
    standard_error: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    def measured(
        self,
        model: nn.Module,
        text: Path,
        *,
        window: int,
        windows: int | None,
        against: str | None = None,
    ) -> Measured:
        """The figures, with what they were measured on, and with what.

        Args:
            model: the tier, as loaded.
            text: the file.
            window: tokens in a window.
            windows: how many at most; None for all.
            against: folder or repository of the other model.
        """
        chip = this_chip()
        if against is not None and Path(against).is_dir():
            against = Path(against).resolve().name  # no path of this machine
        return Measured(
            text=text.name,
            sha256=hashlib.sha256(text.read_bytes()).hexdigest(),
            window=window,
            windows=windows,
            tokens=self.tokens,
            perplexity=self.perplexity,
            standard_error=self.standard_error,
            dtype=dtype_name(activation_dtype(model)),
            chip=f"{chip.name} ({chip.device})",
            versions=", ".join(f"{name} {version}" for name, version in versions().items()),
            against=against,
            kl=self.kl,
            agreement=self.agreement,
        )

    def as_json(self) -> dict:
        """All figures as JSON values."""
        return asdict(self) | {"perplexity": self.perplexity}


def windows(
    tokenizer: TokenizerWrapper, text: str, length: int, most: int | None = None
) -> list[list[int]]:
    """Cut a text into windows of `length` tokens.

    Args:
        tokenizer: the model's.
        text: any text.
        length: tokens in a window. A shorter rest is left out, unless it is all there is.
        most: number of windows, at most.

    Raises:
        OutlierError: the text has fewer than two tokens.
    """
    with quiet_transformers():  # it warns of texts longer than the model's context
        tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise OutlierError("the text is too short: need at least two tokens")
    length = min(length, len(tokens))
    cut = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    return cut[:most]


def warn_of_context(model: nn.Module, texts: list[list[int]]) -> None:
    """Warn if windows of tokens are longer than the model's context length."""
    warn_if_longer(model, max(map(len, texts), default=0), "windows have")


def warn_if_longer(model: nn.Module, longest: int, what: str) -> None:
    """Warn if so many tokens, of what is named, are more than the model's context length."""
    limit = context_length(described(model))
    if limit is not None and longest > limit:
        text = f"{what} {longest} tokens, but the model's context length is {limit}"
        warnings.warn(text, stacklevel=3)


def compare(
    model: nn.Module,
    texts: list[list[int]],
    against: Callable[[mx.array], mx.array] | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Measure a model on windows of tokens, one at a time.

    Args:
        model: maps tokens (1, length) to logits (1, length, vocab).
        texts: windows, as `windows` cuts them.
        against: another model of the same vocabulary, or its checked logits, for `kl` and
            `agreement`.
        progress: called with tokens predicted so far, and in all.

    Raises:
        OutlierError: the vocabularies differ in size, or an embedding has no row for a token.
    """
    for each in (model, against):
        if isinstance(each, nn.Module):
            check_tokens(each, chain.from_iterable(texts), "the text")
    total = sum(len(tokens) - 1 for tokens in texts)
    losses: list[float] = []
    divergence, agreed, done = 0.0, 0, 0
    for tokens in texts:
        ids = mx.array([tokens])
        ours = log_probs(_logits(model, ids[:, :-1]))  # (1, length, vocab)
        targets = ids[:, 1:, None]
        losses += (-mx.take_along_axis(ours, targets, axis=-1)).flatten().tolist()  # type: ignore
        if against is not None:
            theirs = log_probs(against(ids[:, :-1]))
            if theirs.shape != ours.shape:
                raise OutlierError(
                    f"the models have vocabularies of {ours.shape[-1]} and {theirs.shape[-1]}"
                )
            divergence += float((mx.exp(theirs) * (theirs - ours)).sum())
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        done += len(tokens) - 1
        progress(done, total)
    mean = sum(losses) / total
    spread = sum((loss - mean) ** 2 for loss in losses) / max(1, total - 1)
    error = math.sqrt(spread / total)
    if against is None:
        return Comparison(total, mean, error)
    return Comparison(total, mean, error, divergence / total, agreed / total)


def _logits(model: nn.Module, ids: mx.array) -> mx.array:
    """Logits (1, length, vocab) for tokens (1, length).

    Where experts may be left out, tokens are read one by one, as a text is written: a prompt needs
    nearly all experts of each layer, so that hardly any would be left out.
    """
    store = store_of(model)
    if store is None or not store.skip:
        return model(ids)
    cache = make_prompt_cache(model)
    found = []
    for at in range(ids.shape[1]):
        found.append(model(ids[:, at : at + 1], cache=cache))
        mx.eval(found[-1])
    return mx.concatenate(found, axis=1)


def log_probs(logits: mx.array) -> mx.array:
    """Log-probabilities of all tokens, in nats and float32, of the shape of the logits."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def same_tokens(one: TokenizerWrapper, other: TokenizerWrapper, text: str) -> None:
    """Check that two models' tokenizers cut a text into the same tokens.

    Raises:
        OutlierError: they do not, so the predictions cannot be compared.
    """
    with quiet_transformers():
        same = one.encode(text) == other.encode(text)
    if not same:
        raise OutlierError("the two models' tokenizers cut this text into different tokens")
