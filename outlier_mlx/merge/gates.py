"""Routers from prompts: an expert's row is the direction of its prompts' hidden states in the base.

The method is that of mergekit-moe (https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md),
except that mergekit-moe's averages include padding tokens, and those here do not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge.layers import embed, layer_inputs
from outlier_mlx.merge.merge_config import RANDOM_MODES, ExpertConfig, MergeConfig
from outlier_mlx.merge.model import Mixture
from outlier_mlx.merge.sources import Dense
from outlier_mlx.merge.texts import Tokens, batches
from outlier_mlx.terminal import Progress, no_progress

#: Shorter vectors are not scaled to length 1.
_MIN_LENGTH = 1e-8
#: Rows are too similar above this condition number; mergekit-moe warns at the same value.
CONDITION_LIMIT = 5.0


@dataclass(frozen=True)
class Gates:
    """Routers of all layers.

    Attributes:
        routed: (layers, experts, hidden) float32.
        shared: (layers, hidden) float32, the gate of the shared expert, or None.
    """

    routed: np.ndarray
    shared: np.ndarray | None = None

    @property
    def condition_numbers(self) -> list[float]:
        """One for each layer; infinite if the rows are linearly dependent."""
        return [float(np.linalg.cond(rows.astype(np.float64))) for rows in self.routed]


def prompt_gates(
    merge_config: MergeConfig,
    mixture: Mixture,
    tokens: Tokens | None,
    modes: Sequence[str],
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Gates]:
    """Compute routers in several modes. The base runs once for all modes, if any needs it.

    Args:
        merge_config: prompts, and what to do without them.
        mixture: base and experts.
        tokens: may be None for the random modes.
        modes: some of `merge_config.GATE_MODES`, but not "trained".
        seed: seed of the random modes.
        progress: called with layers done and layers in total while the base runs.

    Raises:
        OutlierError: an expert has no prompts and `no_positive` is "error", or a prompt has no
            tokens.
    """
    found = {m: _random(m, mixture, seed) for m in modes if m in RANDOM_MODES}
    others = [m for m in modes if m not in RANDOM_MODES]
    if others:
        assert tokens is not None
        entries = [expert.config for expert in mixture.all_experts]
        prompts = [_Prompts(entry, n, merge_config, tokens) for n, entry in enumerate(entries)]
        rows = {}
        if "cheap_embed" in others:
            rows["cheap_embed"] = _cheap_embed(mixture.base, prompts)
        if hidden := [mode for mode in others if mode in _POOLING]:
            rows |= _from_hidden(mixture.base, prompts, hidden, progress)
        found |= {mode: _split(value, mixture) for mode, value in rows.items()}
    return found


def shared_gate(merge_config: MergeConfig, mixture: Mixture, tokens: Tokens) -> np.ndarray | None:
    """The gate of the shared expert in mode "hidden": (layers, hidden) float32, if there is one.

    Raises:
        OutlierError: it has no prompts; see `prompt_gates`.
    """
    if mixture.shared is None:
        return None
    prompts = _Prompts(mixture.shared.config, mixture.shared.number, merge_config, tokens)
    return _from_hidden(mixture.base, [prompts], ["hidden"], no_progress)["hidden"][:, 0]


class _Prompts:
    """The tokens of an expert's prompts. Without positive prompts their mean is zero."""

    def __init__(
        self, entry: ExpertConfig, number: int, merge_config: MergeConfig, tokens: Tokens
    ) -> None:
        positive = entry.positive
        if not positive:
            shared = number == len(merge_config.experts)
            name = "the shared expert" if shared else f"expert {number}"
            if merge_config.no_positive == "error":
                raise OutlierError(
                    f"{name} has no positive prompts; no_positive: bos uses the BOS token instead,"
                    " no_positive: zero a zero vector"
                )
            if not entry.negative:
                raise OutlierError(f"{name} has neither positive nor negative prompts")
            if merge_config.no_positive == "bos" and not tokens.bos:
                raise OutlierError(f"{name}: no_positive: bos, but the tokenizer has no BOS")
            positive = ("",) if merge_config.no_positive == "bos" else ()
        self.positive = [tokens.prompt(text) for text in positive]
        self.negative = [tokens.prompt(text) for text in entry.negative]

    @property
    def all(self) -> Iterable[tuple[int, ...]]:
        """The positive prompts, then the negative ones."""
        return [*self.positive, *self.negative]


def can_use_prompts(merge_config: MergeConfig) -> bool:
    """Whether every expert has the prompts for "hidden", "hidden_avg" and "cheap_embed"."""
    entries = [*merge_config.experts, *([merge_config.shared] if merge_config.shared else [])]
    return all(e.positive or (e.negative and merge_config.no_positive != "error") for e in entries)


def _random(mode: str, mixture: Mixture, seed: int) -> Gates:
    layers, hidden = mixture.base.config.layers, mixture.base.config.hidden
    rng = np.random.default_rng(seed)
    shape = (layers, len(mixture.all_experts), hidden)
    if mode == "random":
        return _split(rng.standard_normal(shape, np.float32), mixture)
    bound = hidden**-0.5
    return _split(rng.uniform(-bound, bound, shape).astype(np.float32), mixture)


def _split(rows: np.ndarray, mixture: Mixture) -> Gates:
    """Split rows (layers, all experts, hidden) into routed experts and the shared one."""
    count = len(mixture.experts)
    return Gates(rows[:, :count], rows[:, count] if mixture.shared else None)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector), np.float32(_MIN_LENGTH))


def _cheap_embed(base: Dense, experts: list[_Prompts]) -> np.ndarray:
    """Sums of token embeddings: (layers, experts, hidden), the same in every layer."""
    groups = batches([prompt for expert in experts for prompt in expert.all])
    embeddings: dict[int, np.ndarray] = {}
    for batch in groups:
        rows = np.array(embed(base, batch))
        embeddings |= dict(
            zip(batch.tokens.ravel().tolist(), rows.reshape(-1, base.config.hidden), strict=True)
        )

    def total(prompts: list[tuple[int, ...]]) -> np.ndarray:
        if not prompts:
            return np.zeros(base.config.hidden, np.float32)
        return _unit(np.sum([embeddings[token] for prompt in prompts for token in prompt], axis=0))

    rows = np.stack([_unit(total(e.positive) - total(e.negative)) for e in experts])
    return np.repeat(rows[None], base.config.layers, axis=0)


def _from_hidden(
    base: Dense, experts: list[_Prompts], modes: Sequence[str], progress: Progress
) -> dict[str, np.ndarray]:
    """Rows (layers, experts, hidden) by mode; the base runs once on all prompts, for all modes."""
    unique = list(dict.fromkeys(prompt for expert in experts for prompt in expert.all))
    index = {prompt: n for n, prompt in enumerate(unique)}
    groups = batches(unique)
    rows: dict[str, list[np.ndarray]] = {mode: [] for mode in modes}
    for layer, inputs in enumerate(layer_inputs(base, groups)):
        arrays = [np.array(x) for x in inputs]
        for mode, collected in rows.items():
            vectors = np.empty((len(unique), base.config.hidden), np.float32)
            for batch, values in zip(groups, arrays, strict=True):
                for row, number in enumerate(batch.members):
                    vectors[number] = _POOLING[mode](values[row, : batch.lengths[row]])
            collected.append(np.stack([_row(vectors, expert, index) for expert in experts]))
        progress(layer + 1, base.config.layers)
    return {mode: np.stack(collected) for mode, collected in rows.items()}


# From a prompt's hidden states (tokens, hidden) to one vector (hidden,), by gate mode.
_POOLING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hidden": lambda states: states[-1],
    "hidden_avg": lambda states: states.mean(axis=0),
}


def _row(vectors: np.ndarray, expert: _Prompts, index: dict[tuple[int, ...], int]) -> np.ndarray:
    def mean(prompts: list[tuple[int, ...]]) -> np.ndarray:
        if not prompts:
            return np.zeros(vectors.shape[1], np.float32)
        return vectors[[index[prompt] for prompt in prompts]].mean(axis=0)

    return _unit(mean(expert.positive) - mean(expert.negative))


def check_gates(gates: Gates, merge_config: MergeConfig) -> list[str]:
    """Check routers; returns notes on what may not be intended.

    Raises:
        OutlierError: they are not finite, or the rows of all experts are equal.
    """
    routed = gates.routed
    for rows in (routed, gates.shared):
        if rows is not None and not np.isfinite(rows).all():
            raise OutlierError(f"gate_mode {merge_config.gate_mode}: routers hold NaN or infinity")
    count = routed.shape[1]
    if merge_config.gate_mode in RANDOM_MODES or count == 1:
        return []
    if (routed == routed[:, :1]).all():
        raise OutlierError("all experts have the same router rows: give them different prompts")
    notes = []
    for expert in range(count):
        zero = np.flatnonzero(~routed[:, expert].any(axis=-1)).tolist()
        if zero:
            notes.append(
                f"expert {expert}: its router row is zero in layers {zero}: its positive and"
                " negative prompts are equal there"
            )
    # The rows of a trained router add up to zero, so its condition number is always infinite.
    conditions = gates.condition_numbers if merge_config.gate_mode != "trained" else []
    bad = [n for n, condition in enumerate(conditions) if condition > CONDITION_LIMIT]
    if bad:
        notes.append(
            f"condition number of the router above {CONDITION_LIMIT:g} in {len(bad)} of"
            f" {len(routed)} layers: the experts' rows are too similar to tell tokens apart"
        )
    if (
        bad
        and merge_config.no_positive == "bos"
        and any(not e.positive for e in merge_config.experts)
    ):
        notes.append(
            "no_positive: bos gives all rows the hidden state of the BOS token, which is much"
            f" larger than the rest (mean cosine between rows {_mean_cosine(routed[bad]):.3f}):"
            " routing weights are nearly equal; no_positive: zero avoids this"
        )
    return notes


def _mean_cosine(routed: np.ndarray) -> float:
    """The mean cosine between the rows of different experts."""
    length = np.linalg.norm(routed, axis=-1, keepdims=True)
    rows = routed / np.maximum(length, _MIN_LENGTH)
    count = rows.shape[1]
    products = rows @ rows.transpose(0, 2, 1)
    return float((products.sum(axis=(1, 2)) - count).mean() / (count * (count - 1)))
