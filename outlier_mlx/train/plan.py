"""What a training takes of memory, known before it begins, and how many layers fit together."""

import math
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from outlier_mlx.engine.machine import Budget
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.terminal import size
from outlier_mlx.train.objectives import chunk
from outlier_mlx.train.settings import Settings


class _Costs(NamedTuple):
    """Numbers that are there at once: of a token, by the sizes they are multiplied by.

    Those of neurons and scores have the dtype of activations; all others are float32, as the sums
    over experts are, and the norms' gradients where MLX has no kernel for them. Counted in MLX 0.32
    on a CPU; a GPU's fused attention holds less.

    Attributes:
        ffn: by neurons of the base's FFN.
        hidden: by hidden size.
        scores: by heads times length.
        expert: by width of an expert.
        output: by hidden size, for each expert.
    """

    ffn: float
    hidden: float
    scores: float
    expert: float
    output: float = 0.0


# While layers are computed again for their gradients: experts in training in several of them, where
# MLX begins with a layer before it is done with the one above; and in one.
_SEVERAL = _Costs(7.7, 11.3, 0.9, 15.5)
_ONE = _Costs(7.7, 8.0, 2.0, 3.0)
# In the last stage, either a layer takes most before its experts are computed, or with them.
_JOINT, _JOINT_EXPERTS = _Costs(7.8, 18.7, 3.4, 0.0), _Costs(3.9, 9.3, 1.0, 5.1)
# What MLX begins ahead in the last stage: by the width of an expert, whatever their number; half of
# it has the dtype of activations.
_JOINT_AHEAD = 36.5
# With activations of half the bits, an expert in training has copies in them.
_COPIES = 5.0
# What every layer keeps without gradient checkpoints, and what one needs besides.
_KEPT, _ONCE = _Costs(2.7, 7.2, 0.9, 5.0, 1.0), _Costs(3.1, 0.0, 0.0, 0.0)
_JOINT_KEPT, _KEPT_ONCE = _Costs(3.5, 7.1, 1.2, 6.6, 1.8), _Costs(2.1, 8.0, 0.0, 0.0)
# Each further expert in training in a layer that is computed again.
_FURTHER = 3.0
# Rounded matrices that are there at once, counted in those of the FFN; and by weights of an expert,
# trits that are unpacked.
_OF_ROUNDED, _OF_TRITS = 4.4, 1.1
# The share of those trits that a layer keeps without gradient checkpoints.
_OF_KEPT = 0.7
# While the base looks at text, before any training: of a token, float32 numbers by neurons and by
# hidden size; squares of the hidden size, besides the sums; with half the bits, matrices of the FFN
# in float32; and the sums before and after a batch.
_LOOK_FFN, _LOOK_HIDDEN, _LOOK_SQUARES, _LOOK_MATRICES, _SUMS = 3.1, 13.0, 3.0, 1.8, 2
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
    size_of_one = settings.expert_size
    expert = 3 * config.hidden * size_of_one
    rows = 2 * size_of_one + config.hidden
    experts = domains * settings.experts_per_domain
    frozen = len(settings.layers) * experts * (expert / 4 + _FLOAT * rows)

    tokens = settings.batch * window
    above = config.layers - settings.layers[0]
    saved = tokens * config.hidden * itemsize * (above + 1)
    head = _head(config, settings, window, itemsize)
    adam = _OF_ADAM * config.hidden * size_of_one * _FLOAT
    matrix, kept_rounded = 0, 0.0
    if settings.base_bits is not None:
        matrix = config.hidden * config.intermediate * itemsize
        kept_rounded = dense * itemsize * above / config.layers
    every = len(settings.layers)
    all_stages = {"base": int(base * itemsize), "rounded base": int(rounded)}

    def needed(costs: _Costs, experts: int) -> float:
        """Bytes of work in a layer."""
        found = costs.ffn * config.intermediate + costs.scores * config.heads * window
        one = costs.expert * size_of_one + costs.output * config.hidden
        floats = costs.hidden * config.hidden + one * experts
        return tokens * (found * itemsize + floats * _FLOAT)

    def stage(latents: float, work: float) -> dict[str, int]:
        """Bytes of a stage that trains so many latent weights, given its work in layers."""
        gradients = _FLOAT * latents
        # Gradients are there when the last layer is computed again, and when Adam makes its step.
        work = max(head, work + gradients, (gradients + adam - saved) * (latents > 0))
        trained = {"experts in training": int(3 * gradients), "inputs of layers": saved}
        return all_stages | {"experts": int(frozen)} | trained | {"work": int(work)}

    def first() -> dict[str, int]:
        """Of the stage before all training, in which the base looks at the domains' texts."""
        sums = _FLOAT * (config.hidden**2 + domains * (config.hidden + config.intermediate))
        floats = tokens * (_LOOK_FFN * config.intermediate + _LOOK_HIDDEN * config.hidden)
        floats += _LOOK_SQUARES * config.hidden**2
        if itemsize < _FLOAT:
            floats += _LOOK_MATRICES * config.hidden * config.intermediate
        work = floats * _FLOAT + tokens * config.heads * window * itemsize
        return all_stages | {"sums of the first stage": _SUMS * every * sums, "work": int(work)}

    def weights(layers: int, own: int) -> dict[str, int]:
        """Of a stage that trains the weights of so many experts in so many layers."""
        if settings.grad_checkpoint:
            further = tokens * _FLOAT * _FURTHER * size_of_one * (own - 1)
            work = needed(_SEVERAL, 1) + further
            if layers == 1:
                copies = _COPIES * (itemsize < _FLOAT)
                work = needed(_ONE._replace(expert=_ONE.expert + copies), 1) + further
            work += _OF_ROUNDED * matrix
        else:
            work = above * needed(_KEPT, 0) + needed(_ONCE, 0) + kept_rounded
            work += layers * (needed(_KEPT, own) - needed(_KEPT, 0))
        return stage(layers * own * expert, work)

    def scales() -> dict[str, int]:
        """Of the last stage, if it trains no weights."""
        trits = experts * _OF_TRITS * expert * itemsize
        # Scores that gradients wait for are float32 here.
        joint = _JOINT._replace(scores=_JOINT.scores * _FLOAT / itemsize)
        ahead = tokens * (_FLOAT + itemsize) / 2 * _JOINT_AHEAD * size_of_one
        work = max(needed(joint, 0), needed(_JOINT_EXPERTS, experts) + ahead + trits) + matrix
        if not settings.grad_checkpoint:
            work = above * needed(_JOINT_KEPT, 0) + needed(_KEPT_ONCE, 0) + kept_rounded
            work += every * (
                needed(_JOINT_KEPT, experts) - needed(_JOINT_KEPT, 0) + _OF_KEPT * trits
            )
        return stage(0, work + 4 * _FLOAT * every * experts * rows)

    stages = [first()]
    if settings.trains_experts:
        stages.append(weights(count, settings.experts_per_domain))
    if settings.joint_weights:
        stages.append(weights(every, experts))
    elif settings.joint_steps or len(stages) == 1:
        stages.append(scales())
    return max(stages, key=lambda parts: sum(parts.values()))


def _head(config: ModelConfig, settings: Settings, window: int, itemsize: int) -> float:
    """Bytes of the head while the loss is computed."""
    step = chunk(config.vocab)

    def logits(windows: int, arrays: float) -> float:
        tokens = windows * window
        return arrays * config.vocab * min(tokens, _PARTS * step)

    new = logits(settings.new_rows, _OF_NEXT)
    keep = logits(settings.keep_rows, _OF_DIVERGENCE)
    rounded = config.vocab * config.hidden if settings.base_bits is not None else 0
    return max(new, keep) * _FLOAT + rounded * itemsize
