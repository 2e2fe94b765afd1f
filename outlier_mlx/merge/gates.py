"""Routers from prompts: each expert's row is where its prompts are in the base's residual stream.

The procedure is mergekit-moe's (https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md); only
true tokens count here, where that tool's averages take padding in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge.layers import embed, entering
from outlier_mlx.merge.model import Mixture
from outlier_mlx.merge.recipe import RANDOM_MODES, ExpertRecipe, MergeRecipe
from outlier_mlx.merge.sources import Dense
from outlier_mlx.merge.texts import Tokens, batches
from outlier_mlx.terminal import Progress

#: A vector shorter than this is not made longer.
_SHORTEST = 1e-8
#: From here on rows are too alike: mergekit-moe warns there, too.
CONDITION_LIMIT = 5.0


@dataclass(frozen=True)
class Gates:
    """Routers of all layers.

    Attributes:
        routed: (layers, experts, hidden) float32.
        shared: (layers, hidden) float32, the shared expert's own gate, if there is one.
    """

    routed: np.ndarray
    shared: np.ndarray | None = None

    @property
    def condition_numbers(self) -> list[float]:
        """Of each layer's (experts, hidden) matrix; infinite where rows depend on each other."""
        return [float(np.linalg.cond(rows.astype(np.float64))) for rows in self.routed]


def prompt_gates(
    recipe: MergeRecipe,
    mixture: Mixture,
    tokens: Tokens | None,
    modes: Sequence[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Gates]:
    """Compute routers in several modes; the base is run once, if any of them needs it.

    Args:
        recipe: prompts and the meaning of their absence.
        mixture: base and experts.
        tokens: cuts prompts; the random modes need none.
        modes: of `recipe.GATE_MODES`, all but "trained".
        seed: of the random modes.
        progress: called with layers done and in all, while the base runs.

    Raises:
        OutlierError: an expert has no prompts and `no_positive` does not say what that means, or a
            prompt has no tokens.
    """
    found = {m: _random(m, mixture, seed) for m in modes if m in RANDOM_MODES}
    others = [m for m in modes if m not in RANDOM_MODES]
    if others:
        assert tokens is not None
        entries = [expert.recipe for expert in mixture.all_experts]
        wanted = [_Wanted(entry, n, recipe, tokens) for n, entry in enumerate(entries)]
        rows = _rows(mixture.base, wanted, others, progress)
        found |= {mode: _split(value, mixture) for mode, value in rows.items()}
    return found


def shared_gate(
    recipe: MergeRecipe, mixture: Mixture, tokens: Tokens, progress: Progress | None = None
) -> np.ndarray:
    """The shared expert's own gate in mode "hidden": (layers, hidden) float32.

    Raises:
        OutlierError: it has no prompts; see `prompt_gates`.
    """
    assert mixture.shared is not None
    wanted = _Wanted(mixture.shared.recipe, mixture.shared.number, recipe, tokens)
    return _rows(mixture.base, [wanted], ["hidden"], progress)["hidden"][:, 0]


class _Wanted:
    """An expert's prompts as tokens; no positive ones stand for zero."""

    def __init__(
        self, entry: ExpertRecipe, number: int, recipe: MergeRecipe, tokens: Tokens
    ) -> None:
        positive = entry.positive
        if not positive:
            name = _called(number, recipe)
            if recipe.no_positive == "error":
                raise OutlierError(
                    f"{name} has no positive prompts; no_positive: bos takes the beginning of"
                    " text for them, no_positive: zero nothing"
                )
            if not entry.negative:
                raise OutlierError(f"{name} has neither positive nor negative prompts")
            if recipe.no_positive == "bos" and not tokens.bos:
                raise OutlierError(f"{name}: no_positive: bos, but the tokenizer has no BOS")
            positive = ("",) if recipe.no_positive == "bos" else ()
        self.positive = [tokens.prompt(text) for text in positive]
        self.negative = [tokens.prompt(text) for text in entry.negative]

    @property
    def prompts(self) -> Iterable[tuple[int, ...]]:
        """All of them."""
        return [*self.positive, *self.negative]


def _called(number: int, recipe: MergeRecipe) -> str:
    if number == len(recipe.experts):
        return "the shared expert"
    return f"expert {number}"


def can_use_prompts(recipe: MergeRecipe) -> bool:
    """Whether every expert has the prompts that the modes "hidden" and the like need."""
    entries = [*recipe.experts, *([recipe.shared] if recipe.shared else [])]
    return all(e.positive or (e.negative and recipe.no_positive != "error") for e in entries)


def _random(mode: str, mixture: Mixture, seed: int) -> Gates:
    layers, hidden = mixture.base.layers, mixture.base.hidden
    rng = np.random.default_rng(seed)
    shape = (layers, len(mixture.all_experts), hidden)
    if mode == "random":
        return _split(rng.standard_normal(shape, np.float32), mixture)
    bound = hidden**-0.5
    return _split(rng.uniform(-bound, bound, shape).astype(np.float32), mixture)


def _split(rows: np.ndarray, mixture: Mixture) -> Gates:
    """Routers from rows (layers, all experts, hidden)."""
    count = len(mixture.experts)
    return Gates(rows[:, :count], rows[:, count] if mixture.shared else None)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector), np.float32(_SHORTEST))


def _rows(
    base: Dense, wanted: list["_Wanted"], modes: Sequence[str], progress: Progress | None
) -> dict[str, np.ndarray]:
    """Router rows (layers, wanted, hidden) by mode."""
    rows = {"cheap_embed": _cheap(base, wanted)} if "cheap_embed" in modes else {}
    hidden = [mode for mode in modes if mode in _STATES]
    return rows | (_from_hidden(base, wanted, hidden, progress) if hidden else {})


def _cheap(base: Dense, wanted: list[_Wanted]) -> np.ndarray:
    """Sums of token embeddings: (layers, experts, hidden), the same in every layer."""
    groups = batches([prompt for expert in wanted for prompt in expert.prompts])
    known: dict[int, np.ndarray] = {}
    for batch in groups:
        rows = np.array(embed(base, batch))
        known |= dict(
            zip(batch.tokens.ravel().tolist(), rows.reshape(-1, base.hidden), strict=True)
        )

    def total(prompts: list[tuple[int, ...]]) -> np.ndarray:
        if not prompts:
            return np.zeros(base.hidden, np.float32)
        return _unit(np.sum([known[token] for prompt in prompts for token in prompt], axis=0))

    rows = np.stack([_unit(total(e.positive) - total(e.negative)) for e in wanted])
    return np.repeat(rows[None], base.layers, axis=0)


def _from_hidden(
    base: Dense, wanted: list["_Wanted"], modes: Sequence[str], progress: Progress | None
) -> dict[str, np.ndarray]:
    """Rows from what the base makes of the prompts, which it reads once for all modes."""
    unique = list(dict.fromkeys(prompt for expert in wanted for prompt in expert.prompts))
    place = {prompt: n for n, prompt in enumerate(unique)}
    groups = batches(unique)
    rows: dict[str, list[np.ndarray]] = {mode: [] for mode in modes}
    for layer, streams in enumerate(entering(base, groups)):
        arrays = [np.array(stream) for stream in streams]
        for mode, collected in rows.items():
            vectors = np.empty((len(unique), base.hidden), np.float32)
            for batch, values in zip(groups, arrays, strict=True):
                for row, number in enumerate(batch.members):
                    vectors[number] = _STATES[mode](values[row, : batch.lengths[row]])
            collected.append(np.stack([_row(vectors, expert, place) for expert in wanted]))
        if progress is not None:
            progress(layer + 1, base.layers)
    return {mode: np.stack(collected) for mode, collected in rows.items()}


def _last(states: np.ndarray) -> np.ndarray:
    return states[-1]


def _average(states: np.ndarray) -> np.ndarray:
    return states.mean(axis=0)


# Of a prompt's states (tokens, hidden), what stands for it.
_STATES = {"hidden": _last, "hidden_avg": _average}


def _row(vectors: np.ndarray, wanted: _Wanted, place: dict[tuple[int, ...], int]) -> np.ndarray:
    def mean(prompts: list[tuple[int, ...]]) -> np.ndarray:
        if not prompts:
            return np.zeros(vectors.shape[1], np.float32)
        return vectors[[place[prompt] for prompt in prompts]].mean(axis=0)

    return _unit(mean(wanted.positive) - mean(wanted.negative))


def check_gates(gates: Gates, recipe: MergeRecipe) -> list[str]:
    """What is odd about routers.

    Raises:
        OutlierError: they are not finite, or all experts have equal ones.
    """
    routed = gates.routed
    for rows in (routed, gates.shared):
        if rows is not None and not np.isfinite(rows).all():
            raise OutlierError(f"gate_mode {recipe.gate_mode}: routers hold NaN or infinity")
    count = routed.shape[1]
    if recipe.gate_mode in RANDOM_MODES or count == 1:
        return []
    if (routed == routed[:, :1]).all():
        raise OutlierError("all experts have the same router rows: give them different prompts")
    notes = []
    for expert in range(count):
        silent = np.flatnonzero(~routed[:, expert].any(axis=-1)).tolist()
        if silent:
            notes.append(
                f"expert {expert}: its router row is zero in layers {silent}: its positive and"
                " negative prompts are the same there"
            )
    # Fitted rows add up to zero, since only their differences count: a condition number means
    # nothing there.
    conditions = gates.condition_numbers if recipe.gate_mode != "trained" else []
    bad = [n for n, condition in enumerate(conditions) if condition > CONDITION_LIMIT]
    if bad:
        notes.append(
            f"condition number of the router above {CONDITION_LIMIT:g} in {len(bad)} of"
            f" {len(routed)} layers: experts' rows are too alike there to tell tokens apart"
        )
    if bad and recipe.no_positive == "bos" and any(not e.positive for e in recipe.experts):
        notes.append(
            "no_positive: bos gives all rows the hidden state of the beginning of text, which"
            f" outweighs the prompts (mean cosine between rows {_likeness(routed[bad]):.3f}):"
            " routing weights are nearly equal; no_positive: zero leaves it out"
        )
    return notes


def _likeness(routed: np.ndarray) -> float:
    """The mean cosine between different experts' rows."""
    length = np.linalg.norm(routed, axis=-1, keepdims=True)
    rows = routed / np.maximum(length, _SHORTEST)
    count = rows.shape[1]
    products = rows @ rows.transpose(0, 2, 1)
    return float((products.sum(axis=(1, 2)) - count).mean() / (count * (count - 1)))
