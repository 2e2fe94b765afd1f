"""Compute the routers of a merge, and measure how well each gate mode routes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge.gates import Gates, can_use_prompts, check_gates, prompt_gates, shared_gate
from outlier_mlx.merge.merge_config import RANDOM_MODES, MergeConfig
from outlier_mlx.merge.model import Mixture
from outlier_mlx.merge.routes import RouterRun, Routing, run_routers
from outlier_mlx.merge.sources import Dense
from outlier_mlx.merge.texts import MAX_TOKENS, Sequences, Tokens, open_tokenizer
from outlier_mlx.merge.trained import Fitted
from outlier_mlx.terminal import Progress, Stages, no_progress

#: Modes to compare with the configuration's mode on held-out prompts.
COMPARED = ("hidden", "hidden_avg", "cheap_embed", "random", "trained")

_NONE = Sequences((), ())


def silent(title: str, unit: str) -> AbstractContextManager[Progress]:
    """A stage without progress display."""
    return nullcontext(no_progress)


@dataclass(frozen=True)
class Routers:
    """The routers of a merge and their measurements.

    Attributes:
        gates: routers of the configuration's mode.
        routing: how each mode routes the measured prompts; the configuration's mode is first.
        measured_on: "held_out", "positive_prompts", or None if nothing was measured.
        fitted: one for each layer if routers were trained, else empty.
        notes: remarks on the routers for the user.
    """

    gates: Gates
    routing: list[Routing]
    measured_on: str | None
    fitted: list[Fitted]
    notes: list[str]


def compute_routers(
    merge_config: MergeConfig,
    mixture: Mixture,
    *,
    seed: int,
    measure: bool,
    stages: Stages,
) -> Routers:
    """Compute the routers of a merge configuration, and measure how they route its prompts.

    Args:
        merge_config: gate mode, prompts and texts.
        mixture: the models.
        seed: seed of random routers.
        measure: whether to measure routing, if there are prompts.
        stages: shows progress.

    Raises:
        OutlierError: prompts or texts are missing or have no tokens, there is no tokenizer, or the
            rows of all experts are equal.
    """
    mode = merge_config.gate_mode
    measured_on = _measured_on(merge_config) if measure else None
    modes = _modes(merge_config, measured_on)
    tokens, measured, training = None, _NONE, _NONE
    if measured_on is not None or mode not in RANDOM_MODES:
        tokens = _tokens(mixture.base)
        measured = _measured(merge_config, tokens, measured_on)
        training = _training(merge_config, tokens) if "trained" in modes else _NONE
    known: dict[str, Gates] = {}
    given = [other for other in modes if other != "trained"]
    if given:
        with stages("running the base", "layers") as progress:
            known = prompt_gates(merge_config, mixture, tokens, given, seed=seed, progress=progress)
    notes = check_gates(known[mode], merge_config) if mode in known else []
    runs = []
    if tokens is not None and (measured_on is not None or mode == "trained"):
        skip = 1 if tokens.bos else 0
        for other in modes:
            if other in known:
                gates = known[other]
                runs.append(RouterRun(other, gates.routed, gates.shared, measured, skip=skip))
            else:  # the gate of the shared expert is that of mode "hidden"
                hidden = known.get("hidden")
                shared = hidden.shared if hidden else shared_gate(merge_config, mixture, tokens)
                runs.append(RouterRun(other, None, shared, measured, training, skip))
        with stages("routing", "experts") as progress:
            run_routers(mixture, runs, progress)
    if mode == "trained":
        known[mode] = runs[0].all_gates()
        notes = check_gates(known[mode], merge_config)
    return Routers(
        gates=known[mode],
        routing=[run.routing() for run in runs if measured_on],
        measured_on=measured_on,
        fitted=next((run.fitted for run in runs if run.fitted), []),
        notes=notes,
    )


def _modes(merge_config: MergeConfig, measured_on: str | None) -> list[str]:
    """The configuration's mode, and the modes to compare it with."""
    mode, untrained = merge_config.gate_mode, _first_untrained(merge_config)
    if mode == "trained" and untrained is not None:
        raise OutlierError(
            f"expert {untrained} has neither texts nor positive prompts; gate_mode trained needs"
            " one of them"
        )
    others = _comparable(merge_config) if measured_on == "held_out" else []
    return [mode, *(other for other in others if other != mode)]


def _measured_on(merge_config: MergeConfig) -> str | None:
    if merge_config.held_out:
        return "held_out"
    return "positive_prompts" if any(e.positive for e in merge_config.experts) else None


def _first_untrained(merge_config: MergeConfig) -> int | None:
    """The number of the first expert without prompts or texts for training, or None."""
    lacking = (n for n, e in enumerate(merge_config.experts) if not (e.texts or e.positive))
    return next(lacking, None)


def _comparable(merge_config: MergeConfig) -> list[str]:
    usable = {"random"}
    if can_use_prompts(merge_config):
        usable |= {"hidden", "hidden_avg", "cheap_embed"}
    # In mode "trained", the gate of the shared expert is still made from its prompts.
    if _first_untrained(merge_config) is None and (
        merge_config.shared is None or can_use_prompts(merge_config)
    ):
        usable.add("trained")
    return [mode for mode in COMPARED if mode in usable]


def _tokens(base: Dense) -> Tokens:
    limits = [base.config.max_positions, base.config.raw.get("sliding_window")]
    longest = min(limit for limit in limits if isinstance(limit, int) and limit > 1)
    return Tokens(open_tokenizer(base.source.folder, base.config.raw), base.config.vocab, longest)


def _measured(merge_config: MergeConfig, tokens: Tokens, measured_on: str | None) -> Sequences:
    ids, owners = [], []
    for number, expert in enumerate(merge_config.experts):
        texts = expert.held_out if measured_on == "held_out" else expert.positive
        for text in texts if measured_on else ():
            ids.append(tokens.prompt(text))
            owners.append(number)
    return Sequences(tuple(ids), tuple(owners))


def _training(merge_config: MergeConfig, tokens: Tokens) -> Sequences:
    """Each expert's positive prompts and texts, up to `MAX_TOKENS` tokens."""
    ids, owners = [], []
    for number, expert in enumerate(merge_config.experts):
        found = [tokens.prompt(text) for text in expert.positive]
        found += [window for path in expert.texts for window in tokens.file(path)]
        used = 0
        for sequence in found:
            if used + len(sequence) > MAX_TOKENS and used:
                break
            ids.append(sequence)
            owners.append(number)
            used += len(sequence)
    return Sequences(tuple(ids), tuple(owners))
