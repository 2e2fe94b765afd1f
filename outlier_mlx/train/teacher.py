"""What a teacher predicts on the domains' windows, computed once and read from the work folder."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.paging.budget import ALL
from outlier_mlx.engine.plan import plan
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.train.loop import Batch, Log, drawn
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.state import Arrays, Work
from outlier_mlx.train.texts import Corpora, Corpus

#: Likeliest tokens of each prediction that are kept.
LIKELIEST = 256
# Batches whose predictions are kept in a file: what a kill can cost.
_BATCHES = 16

#: From a domain's name and numbers of its windows: the likeliest tokens (windows, length, k) int32
#: and the logarithms of their probabilities, of the same shape.
Targets = Callable[[str, np.ndarray], Batch]


def nbytes_of(teacher: Source, settings: Settings, window: int, available: Budget) -> int:
    """Bytes that a teacher takes while it predicts.

    Args:
        teacher: any model that loads.
        settings: for the windows of a batch.
        window: tokens of a window that are predicted.
        available: says whether there is a GPU.
    """
    batch = settings.batch
    use = Use(window, conversations=0, prompts=batch, step=window, logits=batch * window)
    return plan(teacher.folder, use, ALL, available).needed


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
    rows = _BATCHES * settings.batch
    found: dict[str, tuple[list[dict[str, TensorRef]], np.ndarray]] = {}
    for number, corpus in enumerate(corpora.domains):
        order = _needed(corpus, settings, len(corpora.domains))
        files = []
        for start in range(0, len(order), rows):
            stage = f"teacher {number} {corpus.name}, from {start}"
            if not work.is_finished(stage):
                if model is None:
                    model, _ = load_model(teacher.folder)
                part = range(start, min(start + rows, len(order)))
                arrays = _predicted(model, corpus, order, part, settings, vocab, log)
                work.finish(stage, arrays, {"name": stage})
            files.append(work.tensors(stage))
            of = min(rows, len(order) - start), corpus.train.shape[1] - 1, min(LIKELIEST, vocab)
            _check(work, stage, files[-1], of, vocab)
        places = np.full(len(corpus.train), -1)
        places[order] = np.arange(len(order))
        found[corpus.name] = files, places

    def targets(name: str, windows: np.ndarray) -> Batch:
        files, places = found[name]
        at = [divmod(int(place), rows) for place in places[windows]]
        read = [[files[n][leaf].read(row, row + 1) for n, row in at] for leaf in _LEAVES]
        tokens, log_probs = (mx.array(np.concatenate(each)) for each in read)
        return tokens, log_probs

    return targets


_LEAVES = ("tokens", "log_probs")


def _check(
    work: Work, stage: str, found: dict[str, TensorRef], shape: tuple[int, ...], vocab: int
) -> None:
    """Check predictions that are read again: MLX would read beyond the logits for other tokens."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    if kinds == {"tokens": ("I32", shape), "log_probs": ("F16", shape)}:
        tokens = found["tokens"].read()
        if tokens.min() >= 0 and tokens.max() < vocab:
            return
    raise CheckpointError(f"{work.folder}: {stage}: not predictions of these windows")


def _needed(corpus: Corpus, settings: Settings, domains: int) -> np.ndarray:
    """The windows of a domain that are trained on, in the order of their first use."""
    rows = settings.new_rows
    used = max(settings.expert_steps * rows, -(-settings.joint_steps * rows // domains))
    count = len(corpus.train)
    return drawn(corpus.name, np.arange(min(used, count)), count, settings.seed)


def _predicted(
    model: Callable,
    corpus: Corpus,
    order: np.ndarray,
    part: range,
    settings: Settings,
    vocab: int,
    log: Log,
) -> Arrays:
    """What is predicted on a part of the windows in `order`."""
    tokens, log_probs = [], []
    for start in part[:: settings.batch]:
        done = min(start + settings.batch, part.stop)
        logits = model(mx.array(corpus.train[order[start:done], :-1])).astype(mx.float32)
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
        log({"event": "teacher", "domain": corpus.name, "done": done, "total": len(order)})
    return {"tokens": mx.concatenate(tokens), "log_probs": mx.concatenate(log_probs)}
