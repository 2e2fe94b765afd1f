"""What a teacher predicts on the domains' windows, computed once and read from the work folder."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.train.loop import Batch, Log, drawn
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.state import Work
from outlier_mlx.train.texts import Corpora, Corpus

#: Likeliest tokens of each prediction that are kept.
LIKELIEST = 256

#: From a domain's name and numbers of its windows: the likeliest tokens (windows, length, k) int32
#: and the logarithms of their probabilities, of the same shape.
Targets = Callable[[str, np.ndarray], Batch]


def teach(
    teacher: Source, corpora: Corpora, settings: Settings, vocab: int, work: Work, log: Log
) -> Targets:
    """Have a teacher predict all windows that will be trained on, if it has not done so.

    Args:
        teacher: any model that loads.
        corpora: the domains.
        settings: for the temperature, and which windows are trained on.
        vocab: tokens that the base predicts.
        work: where predictions are kept.
        log: called with the events "teacher", after every batch.

    Raises:
        OutlierError: the teacher predicts other tokens than the base.
    """
    model = None
    found: dict[str, tuple[dict[str, TensorRef], np.ndarray]] = {}
    for corpus in corpora.domains:
        stage = f"teacher {corpus.name}"
        order = _needed(corpus, settings, len(corpora.domains))
        if not work.is_finished(stage):
            if model is None:
                model, _ = load_model(teacher.folder)
            arrays = _predicted(model, corpus, order, settings, vocab, log)
            work.finish(stage, arrays, {"name": stage})
        places = np.full(len(corpus.train), -1)
        places[order] = np.arange(len(order))
        found[corpus.name] = work.tensors(stage), places

    def targets(name: str, windows: np.ndarray) -> Batch:
        tensors, places = found[name]
        rows = [[tensors[leaf].read(at, at + 1) for at in places[windows]] for leaf in _LEAVES]
        tokens, log_probs = (mx.array(np.concatenate(each)) for each in rows)
        return tokens, log_probs

    return targets


_LEAVES = ("tokens", "log_probs")


def _needed(corpus: Corpus, settings: Settings, domains: int) -> np.ndarray:
    """The windows of a domain that are trained on, in the order of their first use."""
    rows = settings.batch - settings.keep_rows
    used = max(settings.expert_steps * rows, -(-settings.joint_steps * rows // domains))
    count = len(corpus.train)
    return drawn(corpus.name, np.arange(min(used, count)), count, settings.seed)


def _predicted(
    model: Callable, corpus: Corpus, order: np.ndarray, settings: Settings, vocab: int, log: Log
) -> dict[str, mx.array]:
    tokens, log_probs = [], []
    for start in range(0, len(order), settings.batch):
        windows = mx.array(corpus.train[order[start : start + settings.batch], :-1])
        logits = model(windows).astype(mx.float32)
        if logits.shape[-1] != vocab:
            raise OutlierError(f"the teacher predicts {logits.shape[-1]} tokens, the base {vocab}")
        cooled = logits / settings.temperature
        kept = min(LIKELIEST, vocab)
        likeliest = mx.argpartition(-cooled, kept - 1, axis=-1)[..., :kept]
        of_them = mx.take_along_axis(cooled, likeliest, axis=-1)
        of_them = of_them - mx.logsumexp(cooled, axis=-1, keepdims=True)
        tokens.append(likeliest.astype(mx.int32))
        log_probs.append(of_them.astype(mx.float16))
        mx.eval(tokens[-1], log_probs[-1])
        done = min(start + settings.batch, len(order))
        log({"event": "teacher", "domain": corpus.name, "done": done, "total": len(order)})
    return {"tokens": mx.concatenate(tokens), "log_probs": mx.concatenate(log_probs)}
