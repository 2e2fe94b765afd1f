"""What a step of a stage learns: windows of its texts, and the loss on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from outlier_mlx.train.experts import Mode
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.loop import Batch, drawn
from outlier_mlx.train.objectives import Score, distilled, divergence, next_token, through_head
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.teacher import Targets
from outlier_mlx.train.texts import Corpora, Corpus


@dataclass(frozen=True)
class Lessons:
    """Batches of texts, and what is minimised on them.

    Attributes:
        model: what learns.
        corpora: the texts.
        settings: resolved.
        targets: of a teacher, for the domains' windows; None: the text's own tokens.
    """

    model: TrainedModel
    corpora: Corpora
    settings: Settings
    targets: Targets | None

    def batch(self, domains: Sequence[Corpus], step: int) -> Batch:
        """The windows of a step: of the domains in turn, (n, length + 1), then of the text to keep.

        With a teacher, its predictions for the domains' windows follow.
        """
        settings, keep, count = self.settings, self.corpora.keep, len(domains)
        at = step * settings.new_rows + np.arange(settings.new_rows)
        parts, targets = [], []
        for number, corpus in enumerate(domains):
            places = at[at % count == number] // count
            if len(places):
                windows = drawn(corpus.name, places, len(corpus.train), settings.seed)
                parts.append(corpus.train[windows])
                if self.targets is not None:
                    targets.append(self.targets(corpus.name, windows))
        at = step * settings.keep_rows + np.arange(settings.keep_rows)
        kept = keep.train[drawn(keep.name, at, len(keep.train), settings.seed)]
        joined = [mx.concatenate(list(each)) for each in zip(*targets, strict=True)]
        return mx.array(np.concatenate(parts)), mx.array(kept), *joined

    def loss(self, batch: Batch, mode: Mode) -> tuple[mx.array, ...]:
        """What is minimised; its parts are the loss on new windows, and the divergence on others.

        The divergence is that from the base, on the windows to keep.
        """
        new, keep, *targets = batch
        model, count = self.model, len(new)
        hidden = model.hidden(mx.concatenate([new, keep])[:, :-1], mode)
        head = model.head(mode.rounded)
        if targets:
            score: Score = distilled(self.settings.temperature)
        else:
            score, targets = next_token, [new[:, 1:]]
        of_new = through_head(hidden[:count], head, score, *targets)
        base_head = model.head()
        base = mx.stop_gradient(model.hidden(keep[:, :-1], Mode()))

        def from_base(logits: mx.array, base: mx.array) -> tuple[mx.array, mx.array]:
            return divergence(logits, base @ base_head.T)

        # One after the other, so that there are the logits of one of them at a time.
        of_keep = through_head(hidden[count:], head, from_base, base, after=of_new)
        return of_new + self.settings.keep_weight * of_keep, of_new, of_keep
