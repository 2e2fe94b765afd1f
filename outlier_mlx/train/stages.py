"""Make experts for domains over a frozen base: from texts to what an overlay is written of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.machine import Budget, budget
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import parse_config, raw_config
from outlier_mlx.models.description import PROJECTIONS
from outlier_mlx.storage.hub import Source
from outlier_mlx.train.experts import ExpertBlock, Mode
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.identity import digest_of_data, digest_of_model
from outlier_mlx.train.loop import Log
from outlier_mlx.train.measures import perplexities
from outlier_mlx.train.plan import MemoryPlan, plan
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.staged import Stages
from outlier_mlx.train.state import Work
from outlier_mlx.train.teacher import nbytes_of, teach
from outlier_mlx.train.texts import Corpora


@dataclass(frozen=True)
class TrainedLayer:
    """A layer with experts, ready to be written.

    Attributes:
        layer: its number.
        router: (experts, hidden) float32.
        alphas: (experts,) float32.
        trits: by "gate_proj", "up_proj" and "down_proj", (experts, out, in) int8.
        scales: the same, (experts, out) float16.
    """

    layer: int
    router: np.ndarray
    alphas: np.ndarray
    trits: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


class TrainedLayers(Sequence[TrainedLayer]):
    """All layers with experts; each is made when it is asked for."""

    def __init__(self, blocks: Mapping[int, ExpertBlock]) -> None:
        """Args: blocks by layer."""
        self._blocks = {
            layer: (block.router, block.alpha, list(block.experts))
            for layer, block in blocks.items()
        }

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        layer = list(self._blocks)[at]
        router, alphas, experts = self._blocks[layer]
        stored = [expert.stored() for expert in experts]
        return TrainedLayer(
            layer,
            np.array(router),
            np.array(alphas),
            {f"{p}_proj": np.stack([each[p][0] for each in stored]) for p in PROJECTIONS},
            {f"{p}_proj": np.stack([each[p][1] for each in stored]) for p in PROJECTIONS},
        )


@dataclass(frozen=True)
class Upcycled:
    """The result of a training.

    Attributes:
        layers: the layers with experts, ascending; each is made when it is asked for.
        before: perplexity of the base on the held-out windows that decided nothing, by the name of
            the text; see `Corpus.reported`.
        after: the same, with the experts.
        stages: of each stage, "name", "steps" (made), "planned" (steps; not of the first),
            "seconds", "kept", "before" and "after" (by text, perplexities on the held-out windows
            that decide), and figures of its own.
        peak: bytes of memory that MLX had at most, in the last run.
    """

    layers: Sequence[TrainedLayer]
    before: dict[str, float]
    after: dict[str, float]
    stages: list[dict[str, Any]]
    peak: int

    @property
    def is_whole(self) -> bool:
        """Whether all steps of all stages were made."""
        return all(stage["steps"] == stage.get("planned", stage["steps"]) for stage in self.stages)


def upcycle(
    base: Source,
    corpora: Corpora,
    settings: Settings,
    work: Path,
    *,
    teacher: Source | None = None,
    log: Log,
    dtype: str | None = None,
    save_every: float = 120.0,
    so_far: bool = False,
) -> Upcycled:
    """Train ternary experts for domains over a frozen base.

    Ended early, by Ctrl-C or a kill, the same call goes on where it was; on the CPU, with the same
    result to the bit.

    Args:
        base: a dense model.
        corpora: what to learn, and what not to forget.
        settings: everything else that decides the result.
        work: folder for the state, which is made, and read again by a further call.
        teacher: a model of the same vocabulary whose predictions are learned on the domains, in
            the place of the text's tokens.
        log: called with events; see `loop.run`.
        dtype: of activations and base, "bfloat16", "float16" or "float32"; see `engine.load`.
        save_every: seconds after which the state is saved.
        so_far: make no further step: what an interrupted training left is judged as if its stage
            had ended, and stages without a step are left out. The work folder stays as it is, so
            that the training can still go on.

    Raises:
        CheckpointError: base or teacher is not a model that this works with, or a file in the work
            folder is damaged.
        OutlierError: settings do not fit the base, the work folder holds another training, the
            loss is not a number, or with `so_far`, no step was made yet.
    """
    if so_far:
        check_begun(work)
    asked = None if so_far else teacher
    settings, needed = planned(base, corpora, settings, work, dtype=dtype, teacher=asked)
    assert settings.layers is not None and settings.layers_at_once is not None
    needed.check()
    mx.reset_peak_memory()
    identity = settings.as_json() | {
        "base": digest_of_model(base.folder),
        "data": digest_of_data(corpora),
        "dtype": dtype,
        "teacher": None if teacher is None else digest_of_model(teacher.folder),
    }
    experts = len(corpora.domains) * settings.experts_per_domain
    with Work(work, identity) as folder:
        log({"event": "memory"} | needed.as_json())
        targets = None
        if asked is not None:
            vocab = parse_config(raw_config(base.folder)).vocab
            targets = teach(asked, corpora, settings, vocab, folder, log)
        loaded, _ = load_model(base.folder, dtype=dtype)
        recompute = settings.grad_checkpoint
        model = TrainedModel(loaded, settings.layers, experts, settings.base_bits, recompute)
        stages = Stages(model, corpora, settings, folder, log, save_every, targets, so_far)
        stages.run(list(layer_groups(settings.layers, settings.layers_at_once)))
    after = perplexities(stages.reported())
    before = perplexities(stages.reported(Mode()))
    layers = TrainedLayers(model.blocks)
    return Upcycled(layers, before, after, stages.records, mx.get_peak_memory())


def check_begun(work: Path) -> None:
    """Check that a training was begun in a work folder.

    Raises:
        OutlierError: there was none.
        CheckpointError: the folder is damaged.
    """
    if not Work.begun(work):
        raise OutlierError(f"{work}: no training was begun in it")


def planned(
    base: Source,
    corpora: Corpora,
    settings: Settings,
    work: Path,
    *,
    dtype: str | None = None,
    available: Budget | None = None,
    teacher: Source | None = None,
) -> tuple[Settings, MemoryPlan]:
    """The settings with nothing left open, and what the training takes of memory.

    A training that was begun keeps its number of layers at once, whatever memory is free now.

    Args:
        base: as for `upcycle`, like all others but the last.
        corpora: see there.
        settings: see there.
        work: see there; it need not exist.
        dtype: see there.
        available: memory; default: what this machine gives.
        teacher: as for `upcycle`.

    Raises:
        CheckpointError: the base is no model, or the work folder is damaged.
        OutlierError: settings do not fit the base.
    """
    config = parse_config(raw_config(base.folder))
    settings.check(config, len(corpora.domains))
    settings = settings.resolved(config)
    begun = Work.begun(work).get("layers_at_once")
    if settings.layers_at_once is None and type(begun) is int and begun > 0:
        settings = replace(settings, layers_at_once=begun)
    if dtype is None:
        on_cpu = mx.default_device() == mx.cpu if available is None else available.on_cpu
        dtype = "float32" if on_cpu else str(config.raw.get("dtype", "bfloat16"))
    window, available = corpora.keep.train.shape[1] - 1, available or budget()
    taught = 0 if teacher is None else nbytes_of(teacher, settings, window, available)
    itemsize = 4 if dtype == "float32" else 2
    found = plan(config, settings, len(corpora.domains), window, available, itemsize, taught)
    assert settings.layers is not None
    groups = len(list(layer_groups(settings.layers, found.layers_at_once)))
    if settings.trains_experts and settings.expert_steps < groups:
        raise OutlierError(
            f"--steps: {settings.expert_steps}; expected at least {groups}: so many groups of"
            " layers are trained one after the other"
        )
    return replace(settings, layers_at_once=found.layers_at_once), found


def layer_groups(layers: Sequence[int], at_once: int) -> Iterator[Sequence[int]]:
    """Layers in groups of at most `at_once`, of about the same size, lowest first."""
    count = math.ceil(len(layers) / at_once)
    for part in np.array_split(np.array(layers), count):
        yield part.tolist()
