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
    stages = _Stages(config, settings, domains, window, itemsize)
    for count in range(most, 0, -1):
        parts = stages.largest(count)
        if settings.layers_at_once is not None or sum(parts.values()) <= room or count == 1:
            break
    # Groups of about the same size: no more layers than that needs.
    groups = math.ceil(len(settings.layers) / count)
    return MemoryPlan(parts, math.ceil(len(settings.layers) / groups), available, teacher)


class _Stages:
    """Bytes of each stage of a training, by what they are for."""

    def __init__(
        self, config: ModelConfig, settings: Settings, domains: int, window: int, itemsize: int
    ) -> None:
        """Args: as for `plan`."""
        assert settings.layers is not None and settings.expert_size is not None
        self._config, self._settings, self._itemsize = config, settings, itemsize
        self._domains, self._window = domains, window
        self._tokens = settings.batch * window
        self._layers = len(settings.layers)
        self._above = config.layers - settings.layers[0]
        self._width = settings.expert_size
        self._expert = 3 * config.hidden * self._width
        self._rows = 2 * self._width + config.hidden
        self._experts = domains * settings.experts_per_domain
        self._matrix, self._kept_rounded = 0, 0.0
        self._base = self._of_base()

    def largest(self, count: int) -> dict[str, int]:
        """Of the stage that takes most, with so many layers' experts trained together."""
        settings, stages = self._settings, [self._first()]
        if settings.trains_experts:
            stages.append(self._weights(count, settings.experts_per_domain))
        if settings.joint_weights:
            stages.append(self._weights(self._layers, self._experts))
        elif settings.joint_steps or len(stages) == 1:
            stages.append(self._scales())
        return max(stages, key=lambda parts: sum(parts.values()))

    def _of_base(self) -> dict[str, int]:
        """Of the base, which all stages have; and what of it is rounded in a layer."""
        config, bits = self._config, self._settings.base_bits
        modules = family(config.family).modules(config)
        matrices = sum(prod(m.shape) for m in modules if len(m.shape) == 2)
        dense = matrices - config.vocab * config.hidden * (2 - config.tied)
        if config.tied:
            matrices += config.vocab * config.hidden  # embedding and head are rounded each
        rounded = 0.0
        if bits is not None:
            rounded = matrices * (bits / 8 + 2 * self._itemsize / 64)
            self._matrix = config.hidden * config.intermediate * self._itemsize
            self._kept_rounded = dense * self._itemsize * self._above / config.layers
        base = sum(m.params for m in modules)
        return {"base": int(base * self._itemsize), "rounded base": int(rounded)}

    def _needed(self, costs: _Costs, experts: int) -> float:
        """Bytes of work in a layer."""
        config = self._config
        found = costs.ffn * config.intermediate + costs.scores * config.heads * self._window
        one = costs.expert * self._width + costs.output * config.hidden
        floats = costs.hidden * config.hidden + one * experts
        return self._tokens * (found * self._itemsize + floats * _FLOAT)

    def _stage(self, latents: float, work: float) -> dict[str, int]:
        """Bytes of a stage that trains so many latent weights, given its work in layers."""
        config = self._config
        frozen = self._layers * self._experts * (self._expert / 4 + _FLOAT * self._rows)
        saved = self._tokens * config.hidden * self._itemsize * (self._above + 1)
        head = _head(config, self._settings, self._window, self._itemsize)
        adam = _OF_ADAM * config.hidden * self._width * _FLOAT
        gradients = _FLOAT * latents
        # Gradients are there when the last layer is computed again, and when Adam makes its step.
        work = max(head, work + gradients, (gradients + adam - saved) * (latents > 0))
        trained = {"experts in training": int(3 * gradients), "inputs of layers": saved}
        return self._base | {"experts": int(frozen)} | trained | {"work": int(work)}

    def _first(self) -> dict[str, int]:
        """Of the stage before all training, in which the base looks at the domains' texts."""
        config, tokens, domains = self._config, self._tokens, self._domains
        sums = _FLOAT * (config.hidden**2 + domains * (config.hidden + config.intermediate))
        floats = tokens * (_LOOK_FFN * config.intermediate + _LOOK_HIDDEN * config.hidden)
        floats += _LOOK_SQUARES * config.hidden**2
        if self._itemsize < _FLOAT:
            floats += _LOOK_MATRICES * config.hidden * config.intermediate
        work = floats * _FLOAT + tokens * config.heads * self._window * self._itemsize
        sums *= _SUMS * self._layers
        return self._base | {"sums of the first stage": sums, "work": int(work)}

    def _weights(self, layers: int, own: int) -> dict[str, int]:
        """Of a stage that trains the weights of so many experts in so many layers."""
        if self._settings.grad_checkpoint:
            further = self._tokens * _FLOAT * _FURTHER * self._width * (own - 1)
            costs = _SEVERAL
            if layers == 1:
                copies = _COPIES * (self._itemsize < _FLOAT)
                costs = _ONE._replace(expert=_ONE.expert + copies)
            work = self._needed(costs, 1) + further + _OF_ROUNDED * self._matrix
        else:
            work = self._above * self._needed(_KEPT, 0) + self._needed(_ONCE, 0)
            work += self._kept_rounded
            work += layers * (self._needed(_KEPT, own) - self._needed(_KEPT, 0))
        return self._stage(layers * own * self._expert, work)

    def _scales(self) -> dict[str, int]:
        """Of the last stage, if it trains no weights."""
        experts = self._experts
        trits = experts * _OF_TRITS * self._expert * self._itemsize
        if self._settings.grad_checkpoint:
            # Scores that gradients wait for are float32 here.
            joint = _JOINT._replace(scores=_JOINT.scores * _FLOAT / self._itemsize)
            ahead = self._tokens * (_FLOAT + self._itemsize) / 2 * _JOINT_AHEAD * self._width
            with_experts = self._needed(_JOINT_EXPERTS, experts) + ahead + trits
            work = max(self._needed(joint, 0), with_experts) + self._matrix
        else:
            work = self._above * self._needed(_JOINT_KEPT, 0) + self._needed(_KEPT_ONCE, 0)
            work += self._kept_rounded
            of_experts = self._needed(_JOINT_KEPT, experts) - self._needed(_JOINT_KEPT, 0)
            work += self._layers * (of_experts + _OF_KEPT * trits)
        return self._stage(0, work + 4 * _FLOAT * self._layers * experts * self._rows)


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
