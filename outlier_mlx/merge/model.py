"""A merge as a whole: which weights the mixture of experts has, before any is read."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge.recipe import ExpertRecipe, MergeRecipe
from outlier_mlx.merge.sources import Dense, open_models
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.models.plain import head_dim
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
    """A routed or shared expert: the FFNs of a model, perhaps altered."""

    model: Dense
    recipe: ExpertRecipe
    number: int
    seed: int

    def matrix(self, layer: int, projection: str) -> TensorRef | Altered:
        """A layer's "gate" or "up" (intermediate, hidden), or "down" (hidden, intermediate)."""
        tensor = self.model.ffn(layer, projection)
        noise = self.recipe.noise_scale
        factor = self.recipe.residual_scale if projection == "down" else 1.0
        if noise == 0 and factor == 1:
            return tensor
        key = (self.seed, self.number, layer, PROJECTIONS.index(projection))
        return Altered(tensor, noise, factor, key)


@dataclass(frozen=True)
class Mixture:
    """What will be merged.

    Attributes:
        base: gives everything but the FFNs.
        experts: the routed ones.
        shared: the expert that serves every token, if there is one.
        top_k: routed experts that serve a token.
        architecture: "mixtral" or "qwen2_moe".
        notes: what is odd about the sources.
    """

    base: Dense
    experts: tuple[Expert, ...]
    shared: Expert | None
    top_k: int
    architecture: str
    notes: tuple[str, ...]

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The routed ones, then the shared one."""
        return (*self.experts, self.shared) if self.shared else self.experts

    @property
    def moe_path(self) -> str:
        """What a layer calls its mixture."""
        return "block_sparse_moe" if self.architecture == "mixtral" else "mlp"

    @property
    def biased(self) -> bool:
        """Whether queries, keys and values have biases in the result."""
        return self.architecture == "qwen2_moe"

    @property
    def tied(self) -> bool:
        """Whether the result's head is its embedding: mlx-lm's Qwen2-MoE always has its own."""
        return self.base.config["tie_word_embeddings"] and self.architecture == "mixtral"

    def params(self, experts: int) -> int:
        """Parameters, as if there were so many routed experts."""
        config, hidden = self.base.config, self.base.hidden
        ffn = 3 * hidden * config["intermediate_size"]
        kv = config["num_key_value_heads"] * head_dim(config)
        attention = 2 * hidden * hidden + 2 * hidden * kv
        attention += (hidden + 2 * kv) if self.biased else 0
        moe = experts * ffn + len(self.experts) * hidden
        moe += (ffn + hidden) if self.shared else 0
        layer = attention + moe + 2 * hidden
        embeddings = self.base.vocab * hidden * (1 if self.tied else 2)
        return embeddings + self.base.layers * layer + hidden

    @property
    def total_params(self) -> int:
        """All parameters."""
        return self.params(len(self.experts))

    @property
    def active_params(self) -> int:
        """Parameters that one token meets."""
        return self.params(self.top_k)


def open_mixture(recipe: MergeRecipe, seed: int = 0) -> Mixture:
    """Open what a recipe names, and check that it can be merged.

    Args:
        recipe: what to merge.
        seed: of the experts' noise.

    Raises:
        OutlierError: the models do not fit together or do not make the architecture.
    """
    entries = [*recipe.experts, *([recipe.shared] if recipe.shared else [])]
    base, models, notes = open_models(recipe.base, [entry.source for entry in entries])
    architecture = _architecture(recipe, base)
    made = [
        Expert(model, entry, number, seed)
        for number, (model, entry) in enumerate(zip(models, entries, strict=True))
    ]
    count = len(recipe.experts)
    return Mixture(
        base=base,
        experts=tuple(made[:count]),
        shared=made[count] if recipe.shared else None,
        top_k=recipe.experts_per_token,
        architecture=architecture,
        notes=(*notes, *_notes(recipe)),
    )


def _architecture(recipe: MergeRecipe, base: Dense) -> str:
    """llama and mistral make a Mixtral; with a shared expert, and from qwen2, a Qwen2-MoE."""
    kind = base.config["model_type"]
    if recipe.shared is not None:
        if recipe.architecture == "mixtral":
            raise OutlierError("architecture mixtral: it has no shared expert; drop one of the two")
        return "qwen2_moe"
    if kind == "qwen2":
        raise OutlierError(
            f"{base.name}: qwen2 makes a Qwen2-MoE, which needs one entry in shared_experts"
        )
    if recipe.architecture == "qwen2_moe":
        raise OutlierError("architecture qwen2_moe: it needs one entry in shared_experts")
    return "mixtral"


def _notes(recipe: MergeRecipe) -> Iterator[str]:
    count = len(recipe.experts)
    if count & (count - 1):
        yield f"{count} experts: old versions of llama.cpp want a power of two"
    if recipe.experts_per_token == count > 1:
        yield (
            f"every token uses all {count} experts: the router only weighs them, and all"
            " parameters are active"
        )
    for number, expert in enumerate(recipe.experts):
        if recipe.gate_mode == "trained" and expert.negative:
            yield f"expert {number}: negative prompts mean nothing to gate_mode trained"
        if recipe.gate_mode != "trained" and not recipe.held_out and expert.texts:
            yield f"expert {number}: texts are for gate_mode trained alone"
