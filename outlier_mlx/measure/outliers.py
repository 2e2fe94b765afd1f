"""Measuring a model's outlier features, and its perplexity on the same windows of a text."""

import hashlib
import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.errors import OutlierError, counted
from outlier_mlx.measure.outlier_counts import Accumulator, Group, Hold
from outlier_mlx.measure.outlier_definitions import Feature, Thresholds, sequence_features
from outlier_mlx.measure.outlier_probes import find_probes, watched
from outlier_mlx.terminal import Progress, no_progress, quiet_transformers
from outlier_mlx.upstream import TokenizerWrapper

# Positions whose logits are widened to float32 at a time.
_LOSS_ROWS = 256
# Characters of text that are read per token; more are read if these give too few tokens.
_CHARACTERS = 8
# Tokens at the end of a part of the text that may differ in the whole text.
_UNSURE = 32


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        thresholds: thresholds of an outlier feature.
        hold: the dtype that values are rounded to before they are compared; None: no rounding.
        residual: also describe the residual stream.
        per_expert: also count hits by expert.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    hold: Hold | None = None
    residual: bool = False
    per_expert: bool = False


@dataclass(frozen=True)
class Measurement:
    """The results for a model.

    Attributes:
        counts: counts over all sequences.
        sequences: by kind of probe, and for all of them together ("all"), the outlier features of
            each sequence.
        loss: mean next-token loss in nats.
    """

    counts: Accumulator
    sequences: dict[Group, list[list[Feature]]]
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)


def read_windows(
    tokenizer: TokenizerWrapper, path: Path, sequences: int, length: int, overlap: float = 0.0
) -> list[list[int]]:
    """The first windows of a text, each of exactly `length` tokens.

    Only the needed part of the file is read. A BOS token that the tokenizer adds is in the first
    window only.

    Args:
        tokenizer: the model's.
        path: a UTF-8 text.
        sequences: number of windows, at most.
        length: tokens in each; at least 2.
        overlap: share of a window that the next one repeats, 0 <= overlap < 1.

    Raises:
        OutlierError: the text has no whole window, or is not UTF-8.
    """
    step = max(1, round(length * (1 - overlap)))
    needed = length + (sequences - 1) * step
    tokens = _read_tokens(tokenizer, path, needed)
    if len(tokens) < length:
        raise OutlierError(
            f"{path}: the text has {counted(len(tokens), 'token')}, fewer than one window of"
            f" {length}; --length makes windows shorter"
        )
    starts = range(0, len(tokens) - length + 1, step)
    return [tokens[at : at + length] for at in starts][:sequences]


def _read_tokens(tokenizer: TokenizerWrapper, path: Path, needed: int) -> list[int]:
    """At least `needed` tokens from the start of a text, or all of a shorter one."""
    # A text has no more characters than bytes, however many tokens are asked for.
    characters = min(_CHARACTERS * needed, path.stat().st_size + 1)
    while True:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(characters)
                whole = not file.read(1)
        except UnicodeDecodeError as error:
            raise OutlierError(f"{path}: not UTF-8 text: {error}") from None
        with quiet_transformers():  # it warns of texts longer than the model's context
            tokens = tokenizer.encode(text)
        if whole or len(tokens) >= needed + _UNSURE:
            return tokens
        characters *= 2


def tokens_digest(windows: list[list[int]]) -> str:
    """SHA-256 of all windows' tokens as little-endian 32-bit integers, one after another."""
    return hashlib.sha256(np.array(windows, "<u4").tobytes()).hexdigest()


def measure(
    model: nn.Module,
    windows: list[list[int]],
    options: Options | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Run a model over windows of tokens, one at a time, and count.

    Args:
        model: maps tokens (1, length) to logits (1, length, vocab); it is the same afterwards.
        windows: windows of tokens, all of one length.
        options: what is measured.
        progress: called with layers done so far, and layers of all windows.

    Raises:
        OutlierError: the model is not supported, it cannot run, it has no row for a token, or what
            it computes is not finite.
    """
    options = options or Options()
    check_tokens(model, chain.from_iterable(windows), "the text")
    probes = find_probes(model)
    counts = Accumulator(
        probes,
        options.thresholds.magnitude,
        options.hold,
        residual=options.residual,
        per_expert=options.per_expert,
    )
    found: dict[Group, list[list[Feature]]] = {}
    losses: list[float] = []
    done = 0

    def see(number: int, entering: mx.array, values: mx.array) -> None:
        nonlocal done
        counts.see(number, entering, values)
        done += 1
        progress(done // 2, len(windows) * len(probes) // 2)

    routing = counts.see_routing if options.per_expert else None
    with watched(model, probes, see, routing):
        for tokens in windows:
            losses.append(_loss(model, tokens))
            for group, hits in counts.finish_sequence().items():
                features = sequence_features(hits, options.thresholds)
                found.setdefault(group, []).append(features)
    weights = [len(tokens) - 1 for tokens in windows]
    return Measurement(counts, found, float(np.average(losses, weights=weights)))


def _loss(model: nn.Module, tokens: list[int]) -> float:
    """Mean next-token loss of one window, in nats."""
    try:
        logits = model(mx.array([tokens]))[0]  # (length, vocab)
        total = 0.0
        for at in range(0, len(tokens) - 1, _LOSS_ROWS):
            rows = logits[at : min(at + _LOSS_ROWS, len(tokens) - 1)].astype(mx.float32)
            targets = mx.array(tokens[at + 1 : at + 1 + len(rows)])[:, None]
            picked = mx.take_along_axis(rows, targets, axis=-1)[:, 0]
            total += float((mx.logsumexp(rows, axis=-1) - picked).sum())
    except (RuntimeError, ValueError) as error:
        # MLX raises these if a device or dtype does not support an operation.
        raise OutlierError(f"the model cannot run here: {error}") from error
    if not math.isfinite(total):
        raise OutlierError("the loss is not finite: what the model computes overflows")
    return total / (len(tokens) - 1)
