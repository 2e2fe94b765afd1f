"""The mixture of experts to be merged: its models, experts and modules, before weights are read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge.merge_config import ExpertConfig, MergeConfig
from outlier_mlx.merge.sources import Dense, open_models
from outlier_mlx.models.config import PROJECTIONS, ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.models.modules import Module
from outlier_mlx.models.sizes import Parameters, add_up
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import Derived

# Rows whose noise comes from one generator, so that any range of rows has the same noise.
_NOISE_ROWS = 64


@dataclass(frozen=True)
class Altered(Derived):
    """A matrix with noise added, then multiplied by a factor, in float32.

    Attributes:
        tensor: (out, in).
        noise: standard deviation of the noise.
        factor: multiplies the sum.
        key: what the noise depends on, beside the row.
    """

    noise: float
    factor: float
    key: tuple[int, ...]

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`."""
        rows = self.tensor.read_float32(start, stop)
        sound = np.isfinite(rows).all()
        with np.errstate(over="ignore", invalid="ignore"):
            if self.noise:
                rows = rows + self._noise(start, start + len(rows))
            rows = rows * np.float32(self.factor)
        if sound and not np.isfinite(rows).all():
            raise OutlierError(f"{self.where}: noise_scale or residual_scale is too large for it")
        return rows

    def _noise(self, start: int, stop: int) -> np.ndarray:
        width = self.shape[1]
        blocks = [
            np.random.default_rng([*self.key, block]).standard_normal(
                (_NOISE_ROWS, width), np.float32
            )
            for block in range(start // _NOISE_ROWS, -(-stop // _NOISE_ROWS))
        ]
        skipped = start % _NOISE_ROWS
        return np.float32(self.noise) * np.concatenate(blocks)[skipped : skipped + stop - start]


@dataclass(frozen=True)
class Expert:
    """A routed or shared expert: the FFNs of a model, with noise or a factor if configured."""

    model: Dense
    config: ExpertConfig
    number: int
    seed: int

    def matrix(self, layer: int, projection: str) -> TensorRef | Altered:
        """A layer's "gate" or "up" (intermediate, hidden), or "down" (hidden, intermediate)."""
        tensor = self.model.ffn(layer, projection)
        noise = self.config.noise_scale
        factor = self.config.residual_scale if projection == "down" else 1.0
        if noise == 0 and factor == 1:
            return tensor
        key = (self.seed, self.number, layer, PROJECTIONS.index(projection))
        return Altered(tensor, noise, factor, key)


@dataclass(frozen=True)
class Mixture:
    """What will be merged.

    Attributes:
        base: the model that everything but the FFNs comes from.
        experts: the routed experts.
        shared: the expert that every token goes through, or None.
        top_k: number of experts that each token is routed to.
        architecture: "mixtral" or "qwen2_moe".
        notes: remarks on the sources for the user.
    """

    base: Dense
    experts: tuple[Expert, ...]
    shared: Expert | None
    top_k: int
    architecture: str
    notes: tuple[str, ...]

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The routed experts, then the shared one if there is one."""
        return (*self.experts, self.shared) if self.shared else self.experts

    @property
    def config(self) -> ModelConfig:
        """The config of the result. mlx-lm's Qwen2-MoE always has its own head, and biases."""
        mixtral = self.architecture == "mixtral"
        return replace(
            self.base.config,
            model_type=self.architecture,
            family=self.architecture,
            experts=len(self.experts),
            top_k=self.top_k,
            moe_layers=tuple(range(self.base.config.layers)),
            expert_width=self.base.config.intermediate,
            tied=self.base.config.tied and mixtral,
            qkv_bias=not mixtral,
        )

    @property
    def modules(self) -> list[Module]:
        """The modules of the result."""
        return family(self.architecture).modules(self.config)

    @cached_property
    def parameters(self) -> Parameters:
        """Total and active parameters of the result."""
        return add_up(((m.kind, m.params) for m in self.modules), self.config)


def open_mixture(merge_config: MergeConfig, seed: int = 0) -> Mixture:
    """Open the models of a merge configuration, and check that they can be merged.

    `seed` seeds the experts' noise.

    Raises:
        OutlierError: the models differ too much, or do not fit the architecture.
    """
    entries = [*merge_config.experts, *([merge_config.shared] if merge_config.shared else [])]
    base, models, notes = open_models(merge_config.base, [entry.source for entry in entries])
    architecture = _architecture(merge_config, base)
    made = [
        Expert(model, entry, number, seed)
        for number, (model, entry) in enumerate(zip(models, entries, strict=True))
    ]
    count = len(merge_config.experts)
    return Mixture(
        base=base,
        experts=tuple(made[:count]),
        shared=made[count] if merge_config.shared else None,
        top_k=merge_config.experts_per_token,
        architecture=architecture,
        notes=(*notes, *_notes(merge_config)),
    )


def _architecture(merge_config: MergeConfig, base: Dense) -> str:
    """llama and mistral make a Mixtral; with a shared expert, and from qwen2, a Qwen2-MoE."""
    kind = base.config.family
    if merge_config.shared is not None:
        if merge_config.architecture == "mixtral":
            raise OutlierError("architecture mixtral: it has no shared expert; drop one of the two")
        return "qwen2_moe"
    if kind == "qwen2":
        raise OutlierError(
            f"{base.name}: qwen2 makes a Qwen2-MoE, which needs one entry in shared_experts"
        )
    if merge_config.architecture == "qwen2_moe":
        raise OutlierError("architecture qwen2_moe: it needs one entry in shared_experts")
    return "mixtral"


def _notes(merge_config: MergeConfig) -> Iterator[str]:
    count = len(merge_config.experts)
    if count & (count - 1):
        yield f"{count} experts: old versions of llama.cpp need a power of two"
    if merge_config.experts_per_token == count > 1:
        yield (
            f"every token uses all {count} experts: the router only weighs them, and all"
            " parameters are active"
        )
    for number, expert in enumerate(merge_config.experts):
        if merge_config.gate_mode == "trained" and expert.negative:
            yield f"expert {number}: gate_mode trained ignores negative prompts"
        if merge_config.gate_mode != "trained" and not merge_config.held_out and expert.texts:
            yield f"expert {number}: texts are ignored: they are for gate_mode trained"
