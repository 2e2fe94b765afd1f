"""The stages on a base: experts begin, each domain's are trained alone, then all together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.train.beginning import begin, of_layer
from outlier_mlx.train.experts import Mode, empty_expert, latent_expert
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.initial import first_latents
from outlier_mlx.train.lessons import Lessons
from outlier_mlx.train.loop import Log, Number, Stage, run
from outlier_mlx.train.measures import (
    Use,
    losses_of,
    mean_hit_rate,
    perplexities,
    stage_record,
    uses_of,
)
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.state import Arrays, Fields, Work, are_figures, is_count, is_figure
from outlier_mlx.train.teacher import Targets
from outlier_mlx.train.texts import Corpora, Corpus

# Held-out windows of each text that are looked at while a stage runs.
_GLANCE = 16
# What the alphas are multiplied by, if the base forgets too much with them as trained.
_FACTORS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
# Learning rates of what is no latent weight, relative to theirs and to its size.
_ALPHA_RATE, _SCALE_RATE = 0.1, 0.1

# Of the record of a stage that is done.
_FIELDS: Fields = {
    "name": lambda name: isinstance(name, str),
    "steps": is_count,
    "planned": is_count,
    "seconds": is_figure,
    "kept": lambda kept: isinstance(kept, bool),
    "before": are_figures,
    "after": are_figures,
}


@dataclass(frozen=True)
class _Part:
    """What a stage trains.

    Attributes:
        title: for the log.
        domains: those whose text it learns.
        experts: numbers of those that take part.
        layers: numbers of the layers that are trained.
        kinds: names of the arrays that are trained.
        steps: number of steps.
        begin: called before the first step: makes latent weights of what shall have them.
    """

    title: str
    domains: Sequence[Corpus]
    experts: tuple[int, ...]
    layers: Sequence[int]
    kinds: tuple[str, ...]
    steps: int
    begin: Callable[[], None]


class Stages:
    """Runs the stages on a base, one after the other.

    Attributes:
        records: of each stage: "name", "steps" (made), "planned" (steps; not of the first),
            "seconds", "before" and "after" (held-out perplexities by text), "kept", and more.
        before: losses of the base on the held-out windows that decide.
    """

    def __init__(
        self,
        model: TrainedModel,
        corpora: Corpora,
        settings: Settings,
        work: Work,
        log: Log,
        save_every: float,
        targets: Targets | None = None,
        so_far: bool = False,
    ) -> None:
        """Args: as for `stages.upcycle`; targets of a domain's windows are those of a teacher."""
        self.records: list[dict[str, Any]] = []
        self.before: dict[str, float] = {}
        self._model, self._corpora, self._settings = model, corpora, settings
        self._work, self._log, self._save_every = work, log, save_every
        self._lessons = Lessons(model, corpora, settings, targets)
        self._so_far = so_far
        self._neurons: dict[int, np.ndarray | None] = {}
        self._all = tuple(range(len(corpora.domains) * settings.experts_per_domain))

    def run(self, groups: Sequence[Sequence[int]]) -> None:
        """Run all stages, or what is left of them.

        Args:
            groups: layers whose experts are trained together.

        Raises:
            OutlierError: no further step is to be made, and there was none.
        """
        self._begin()
        if self._settings.trains_experts:
            steps = self._settings.expert_steps // len(groups)
            for number, domain in enumerate(self._corpora.domains):
                for group in groups:
                    self._train_experts(number, domain, group, steps)
        if self._settings.joint_steps:
            self._train_together()
        trained = self.records[1:]
        if self._so_far and trained and not any(record["steps"] for record in trained):
            self._refuse()

    def _refuse(self) -> None:
        raise OutlierError(
            f"{self._work.folder}: no step of the training was made yet; without --so-far, it goes"
            " on"
        )

    def reported(self, mode: Mode | None = None) -> dict[str, float]:
        """Losses of all texts on the held-out windows that decided nothing.

        With all experts, unless a mode is given.
        """
        texts = {corpus.name: corpus.reported for corpus in self._corpora}
        return self._losses(texts, self._mode(self._all) if mode is None else mode)

    def _begin(self) -> None:
        blocks, settings = self._model.blocks, self._settings
        is_done = all(self._work.is_finished(of_layer(layer)) for layer in blocks)
        if self._so_far and not is_done:
            self._refuse()
        arrays, record = begin(self._model, self._corpora, settings, self._work, self._save_every)
        if not is_done:
            self._log({"event": "stage"} | record)
        for layer, block in blocks.items():
            neurons = arrays.pop(f"{layer}.neurons", None)
            self._neurons[layer] = None if neurons is None else np.array(neurons)
            for number in self._all:
                hidden, size = block.router.shape[1], settings.expert_size or 0
                block.experts[number] = empty_expert(hidden, size)
        self._apply(arrays)
        self.before = record["losses"]
        self.records.append(record)

    def _train_experts(
        self, number: int, domain: Corpus, layers: Sequence[int], steps: int
    ) -> None:
        """Train a domain's experts in some layers by straight-through estimation."""
        settings, per_domain = self._settings, self._settings.experts_per_domain
        own = tuple(range(number * per_domain, (number + 1) * per_domain))
        where = f"s {layers[0]} to {layers[-1]}" if len(layers) > 1 else f" {layers[0]}"

        def begin() -> None:
            for layer in layers:
                block = self._model.blocks[layer]
                block.set_alphas(own, settings.alpha)
                for expert in own:
                    neurons = self._neurons[layer]
                    weights = first_latents(self._model, settings, layer, expert, neurons)
                    block.experts[expert] = latent_expert(weights, settings.scales)

        self._train(
            _Part(
                title=f"experts of {domain.name}, layer{where}",
                domains=(domain,),
                experts=own,
                layers=layers,
                kinds=("latent", "alpha", *(("router",) if per_domain > 1 else ())),
                steps=steps,
                begin=begin,
            )
        )

    def _train_together(self) -> None:
        """Train all experts on all domains: routers, alphas, and row scales or all weights."""
        latent, scales = self._settings.joint_weights, self._settings.scales

        def begin() -> None:
            for block in self._model.blocks.values() if latent else ():
                block.experts = [latent_expert(each.dense(), scales) for each in block.experts]

        self._train(
            _Part(
                title="routers, alphas and weights" if latent else "routers, alphas and row scales",
                domains=self._corpora.domains,
                experts=self._all,
                layers=list(self._model.blocks),
                kinds=("latent" if latent else "scales", "alpha", "router"),
                steps=self._settings.joint_steps,
                begin=begin,
            )
        )

    def _train(self, part: _Part) -> None:
        """Run a stage, or take what it left; keep it only if held-out text says so."""
        name = f"{len(self.records)} {part.title}"
        found = self._work.finished(name, self._arrays(part), _FIELDS)
        if found is not None:
            self._apply(found[0])
            self.records.append(found[1])
            return
        if self._so_far and not self._work.is_running(name):
            self._tell(stage_record(part.title, part.steps, 0, 0.0, {}, {}, kept=False))
            return
        mode = self._mode(part.experts)
        texts = {corpus.name: corpus.deciding for corpus in (*part.domains, self._corpora.keep)}
        if self._are_silent(part.experts):
            before = {name: self.before[name] for name in texts}
        else:
            before = self._losses(texts, mode)
        rate_before = mean_hit_rate(self._uses(texts, mode), texts)
        former = self._arrays(part)
        part.begin()
        steps, seconds = self._run(part, name, mode, texts)
        for experts in (self._model.blocks[layer].experts for layer in part.layers):
            for number in part.experts:
                experts[number] = experts[number].ternary()
        after, factor = self._bounded(mode, texts, part)
        uses = self._uses(texts, mode)
        rate = mean_hit_rate(uses, texts)
        # What was minimised: where stickiness counts, a higher hit rate has its price.
        gain = self._settings.stickiness * (rate - rate_before)
        better = _mean(after, part.domains) - gain < _mean(before, part.domains)
        kept = self._fits(after) and (better or not self._fits(before))
        if not kept:
            self._apply(former)
        record: dict[str, Any] = {"alpha_factor": factor}
        if uses:
            record |= {"hit_rate_before": rate_before, "hit_rate": rate, "load": _load(uses)}
        record |= stage_record(part.title, part.steps, steps, seconds, before, after, kept)
        if not self._so_far:  # else the stage itself can still go on
            self._work.finish(name, self._arrays(part), record)
        self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._log({"event": "stage"} | record)

    def _run(
        self, part: _Part, name: str, mode: Mode, texts: Mapping[str, np.ndarray]
    ) -> tuple[int, float]:
        """Train the numbers of a part; the steps that were made, and their seconds."""
        settings, lessons = self._settings, self._lessons
        places = self._model.numbers(part.kinds, part.layers)
        self._model.train(places)
        glance = {text: windows[:_GLANCE] for text, windows in texts.items()}
        stage = Stage(
            name=name,
            title=part.title,
            numbers={n: Number(p, *_rate(n, p.value)) for n, p in places.items()},
            steps=part.steps,
            rate=settings.learning_rate,
            loss=lambda given, rounded: lessons.loss(given, replace(mode, rounded=rounded)),
            parts=("new", "keep"),
            batch=lambda step: lessons.batch(part.domains, step),
            rounds=settings.base_bits is not None,
            tokens=settings.batch * (self._corpora.keep.train.shape[1] - 1),
            evaluate=lambda: self._glanced(glance, mode),
        )
        try:
            how: dict[str, Any] = {"save_every": self._save_every, "so_far": self._so_far}
            return run(stage, self._work, self._log, **how)
        finally:
            self._model.train({})

    def _glanced(self, texts: Mapping[str, np.ndarray], mode: Mode) -> dict[str, Any]:
        found: dict[str, Any] = {"perplexity": perplexities(self._losses(texts, mode))}
        if uses := self._uses(texts, mode):
            found["load"] = _load(uses)
        return found | {"windows": _GLANCE}

    def _losses(self, texts: Mapping[str, np.ndarray], mode: Mode) -> dict[str, float]:
        return losses_of(self._model, texts, mode, self._settings.batch)

    def _uses(self, texts: Mapping[str, np.ndarray], mode: Mode) -> dict[str, Use]:
        return uses_of(self._model, texts, mode, self._settings.batch)

    def _bounded(
        self, mode: Mode, texts: Mapping[str, np.ndarray], part: _Part
    ) -> tuple[dict[str, float], float]:
        """Held-out losses with the largest factor of the alphas that the base's own text allows."""
        blocks = [self._model.blocks[layer] for layer in part.layers]
        trained = [block.alpha for block in blocks]
        found: dict[str, float] = {}
        for factor in _FACTORS:
            for block, alpha in zip(blocks, trained, strict=True):
                block.alpha = alpha
                block.set_alphas(part.experts, alpha * factor)
            found = self._losses(texts, mode)
            if self._fits(found):
                return found, factor
        return found, _FACTORS[-1]

    def _fits(self, losses: dict[str, float]) -> bool:
        """Whether the base forgot no more than is allowed."""
        keep = self._corpora.keep.name
        return losses[keep] <= self.before[keep] + math.log1p(self._settings.keep_bound)

    def _are_silent(self, experts: tuple[int, ...]) -> bool:
        """Whether these experts change nothing yet in any layer."""
        own = mx.array(experts)
        return not any(float(mx.abs(b.alpha[own]).sum()) for b in self._model.blocks.values())

    def _mode(self, experts: tuple[int, ...]) -> Mode:
        settings, layers = self._settings, len(self._model.blocks)
        losses = settings.balance / layers, settings.stickiness / layers
        return Mode(experts, settings.top_k, *losses)

    def _arrays(self, part: _Part) -> Arrays:
        """What a part's layers have of its experts, with their whole routers and alphas."""
        found: Arrays = {}
        for layer in part.layers:
            block = self._model.blocks[layer]
            found |= {f"{layer}.router": block.router, f"{layer}.alpha": block.alpha}
            for number in part.experts:
                found |= block.experts[number].arrays(f"{layer}.experts.{number}")
        return found

    def _apply(self, arrays: Arrays) -> None:
        """Put arrays of a stage into the blocks.

        Raises:
            CheckpointError: one has another shape or dtype, or belongs nowhere.
        """
        places = self._model.numbers(("router", "alpha", "codes", "scales"))
        for name, array in arrays.items():
            place = places.get(name)
            kind = array.dtype, array.shape
            if place is None or (place.value.dtype, place.value.shape) != kind:
                raise CheckpointError(f"{self._work.folder}: {name}: a wrong {kind[0]} {kind[1]}")
            if name.endswith(".codes") and bool(mx.any(array & (array >> 1) & 0b1010101)):
                raise CheckpointError(f"{self._work.folder}: {name}: digits that are no trits")
            place.put(array)


def _load(uses: Mapping[str, Use]) -> dict[str, dict[int, list[float]]]:
    return {name: use.load for name, use in uses.items()}


def _mean(losses: Mapping[str, float], corpora: Sequence[Corpus]) -> float:
    return sum(losses[corpus.name] for corpus in corpora) / len(corpora)


def _rate(name: str, value: mx.array) -> tuple[float, bool]:
    """The unit of a number's learning rate, and whether it decays; see `loop.Number`."""
    leaf = name.rpartition(".")[2]
    if leaf == "alpha":
        return _ALPHA_RATE, False
    if leaf == "scales":
        return _SCALE_RATE * float(mx.sqrt(mx.square(value).mean())), False
    return value.shape[-1] ** -0.5, leaf == "latent"
