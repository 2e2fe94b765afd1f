"""What a training takes of memory, known before it begins, and how many layers fit together."""

import math
from dataclasses import dataclass
from math import prod
from typing import Any

from outlier_mlx.engine.machine import Budget
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.terminal import size
from outlier_mlx.train.objectives import chunk
from outlier_mlx.train.settings import Settings

# Numbers that are there at once while a layer is computed again for its gradient, counted in MLX
# 0.32 on a CPU, where attention holds its scores: for a token, by neurons of the FFN, by hidden
# size, and by heads times length; by width of an expert in training; and in the last stage, by
# width of an expert, and by its weights. A GPU's fused attention holds less. Where the gradient
# goes on to the layer below, MLX begins with that one before it is done with this one.
_OF_FFN, _OF_HIDDEN, _OF_SCORES = 8.1, 16.4, 2.9
_OF_LATENT, _OF_EXPERT, _OF_TRITS = 11.0, 6.7, 3.2
_AHEAD_OF_FFN, _AHEAD_OF_HIDDEN = 2.1, 8.0
# Without gradient checkpoints, the share of these numbers that every layer keeps; and it
# keeps all its rounded matrices.
_KEPT = 0.43
# Arrays of logits that are there at once: of next tokens, of the divergence; and parts of the text
# that MLX works on at once.
_OF_NEXT, _OF_DIVERGENCE, _PARTS = 4.3, 7.0, 3
# Arrays of the size of one matrix while Adam makes a step.
_OF_ADAM = 8
_FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """What the largest stage of a training takes.

    Attributes:
        parts: bytes by what they are for.
        layers_at_once: layers whose experts are trained together.
        available: what the machine gives.
        teacher: bytes that a teacher takes while it predicts, before the base is loaded.
    """

    parts: dict[str, int]
    layers_at_once: int
    available: Budget
    teacher: int = 0

    @property
    def peak(self) -> int:
        """Bytes that are taken at the same time, at most."""
        return max(sum(self.parts.values()), self.teacher)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "layers_at_once": self.layers_at_once,
            "parts": self.parts,
            "teacher_bytes": self.teacher,
            "peak_bytes": self.peak,
            "available_bytes": self.available.nbytes,
        }

    def check(self) -> None:
        """Check that it fits.

        Raises:
            OutlierError: it does not.
        """
        if self.teacher > self.available.nbytes:
            raise OutlierError(
                f"the teacher needs {size(self.teacher)}; {self.available}: smaller windows, a"
                " smaller batch or a smaller teacher need less"
            )
        if self.peak > self.available.nbytes:
            layers = "1 layer" if self.layers_at_once == 1 else f"{self.layers_at_once} layers"
            raise OutlierError(
                f"the training needs {size(self.peak)}, with the experts of {layers} at once;"
                f" {self.available}: smaller windows, a smaller batch or smaller experts need less"
            )


def plan(
    config: ModelConfig,
    settings: Settings,
    domains: int,
    window: int,
    available: Budget,
    itemsize: int = _FLOAT,
    teacher: int = 0,
) -> MemoryPlan:
    """Plan the memory of a training.

    Args:
        config: the base's.
        settings: resolved. Without `layers_at_once`, as many layers are trained together as fit,
            with some room for others; one, if even that does not fit.
        domains: number of domains.
        window: tokens of a window that are predicted.
        available: what the machine gives.
        itemsize: bytes of a number of the base and of activations.
        teacher: bytes that a teacher takes before that.
    """
    assert settings.layers is not None
    most = settings.layers_at_once or len(settings.layers)
    room = available.nbytes - available.headroom
    for count in range(most, 0, -1):
        parts = _parts(config, settings, domains, window, itemsize, count)
        if settings.layers_at_once is not None or sum(parts.values()) <= room or count == 1:
            break
    # Groups of about the same size: no more layers than that needs.
    groups = math.ceil(len(settings.layers) / count)
    return MemoryPlan(parts, math.ceil(len(settings.layers) / groups), available, teacher)


def _parts(
    config: ModelConfig, settings: Settings, domains: int, window: int, itemsize: int, count: int
) -> dict[str, int]:
    assert settings.layers is not None and settings.expert_size is not None
    shapes = [m.shape for m in family(config.family).modules(config)]
    base = sum(m.params for m in family(config.family).modules(config))
    matrices = sum(prod(shape) for shape in shapes if len(shape) == 2)
    dense = matrices - config.vocab * config.hidden * (2 - config.tied)
    if config.tied:
        matrices += config.vocab * config.hidden  # embedding and head are rounded each
    rounded = 0.0
    if settings.base_bits is not None:
        rounded = matrices * (settings.base_bits / 8 + 2 * itemsize / 64)
    expert = 3 * config.hidden * settings.expert_size
    rows = 2 * settings.expert_size + config.hidden
    experts = domains * settings.experts_per_domain
    frozen = len(settings.layers) * experts * (expert / 4 + _FLOAT * rows)

    tokens = settings.batch * window
    above = config.layers - settings.layers[0]
    saved = tokens * config.hidden * itemsize * (above + 1)
    layer = _layer(config, settings, tokens, window) * itemsize
    ahead = _AHEAD_OF_FFN * config.intermediate + _AHEAD_OF_HIDDEN * config.hidden
    ahead *= tokens * itemsize
    head = _head(config, settings, window) * itemsize
    of_latent = tokens * _OF_LATENT * settings.expert_size * _FLOAT
    adam = _OF_ADAM * config.hidden * settings.expert_size * _FLOAT

    def stage(latents: int, layers: int, experts: float) -> tuple[int, int]:
        """Bytes of what is in training, and of work; `experts` are bytes of work in a layer."""
        gradients = _FLOAT * latents
        work = layer + experts + ahead * (layers > 1)
        if not settings.grad_checkpoint:
            work = _KEPT * (above * layer + layers * experts) + ahead
            if settings.base_bits is not None:
                work += dense * itemsize * above / config.layers
        # Gradients are there when the last layer is computed again, and when Adam makes its step.
        work = max(head, work + gradients, (gradients + adam - saved) * (latents > 0))
        return 3 * gradients, int(work)

    stages = []
    if settings.trains_experts:
        own = settings.experts_per_domain
        stages.append(stage(count * own * expert, count, own * of_latent))
    every = len(settings.layers)
    if settings.joint_weights:
        stages.append(stage(every * experts * expert, every, experts * of_latent))
    elif settings.joint_steps or not stages:
        together = _OF_EXPERT * tokens * settings.expert_size + _OF_TRITS * expert
        training, work = stage(0, every, experts * together * _FLOAT)
        stages.append((training, work + 4 * _FLOAT * every * experts * rows))
    training, working = max(stages, key=sum)
    return {
        "base": int(base * itemsize),
        "rounded base": int(rounded),
        "experts": int(frozen),
        "experts in training": training,
        "inputs of layers": saved,
        "work": working,
    }


def _layer(config: ModelConfig, settings: Settings, tokens: int, window: int) -> float:
    """Numbers of a layer without experts while it is computed again for its gradient."""
    found = tokens * (_OF_FFN * config.intermediate + _OF_HIDDEN * config.hidden)
    found += tokens * _OF_SCORES * config.heads * window
    if settings.base_bits is not None:
        found += config.hidden * config.intermediate  # a rounded matrix
    return found


def _head(config: ModelConfig, settings: Settings, window: int) -> float:
    """Numbers of the head while the loss is computed."""
    step = chunk(config.vocab)

    def logits(windows: int, arrays: float) -> float:
        tokens = windows * window
        return arrays * config.vocab * min(tokens, _PARTS * step)

    new = logits(settings.new_rows, _OF_NEXT)
    keep = logits(settings.keep_rows, _OF_DIVERGENCE)
    rounded = config.vocab * config.hidden if settings.base_bits is not None else 0
    return max(new, keep) + rounded
