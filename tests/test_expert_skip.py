"""Missing experts with a small share of a token's weight are left out, on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.skip import leave_out
from outlier_mlx.errors import OutlierError
from tests.program import assert_refused, run

INDICES = mx.array([[2, 0], [1, 2]], mx.uint32)
WEIGHTS = mx.array([[0.9, -0.1], [0.8, 0.2]])


@pytest.mark.parametrize(
    ("missing", "share", "expected", "count"),
    [
        ({0}, 0.15, [[0.9, 0], [0.8, 0.2]], 1),
        ({0}, 0.05, [[0.9, -0.1], [0.8, 0.2]], 0),
        # Expert 2 matters to the first token, so it is read for both.
        ({0, 2}, 0.3, [[0.9, 0], [0.8, 0.2]], 1),
        ({2}, 0.95, [[0, -0.1], [0.8, 0]], 1),
        (set(), 0.99, [[0.9, -0.1], [0.8, 0.2]], 0),
    ],
)
def test_only_missing_experts_below_the_share_are_left_out(
    missing: set[int], share: float, expected: list[list[float]], count: int
) -> None:
    weights, left = leave_out(INDICES, WEIGHTS, missing, share)
    np.testing.assert_array_equal(np.array(weights), np.array(expected, np.float32))
    assert left == count


@given(st.data())
def test_no_token_loses_what_its_share_keeps(data: st.DataObject) -> None:
    tokens, k, experts = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.just(6)))
    chosen = np.array([data.draw(st.permutations(range(experts)))[:k] for _ in range(tokens)])
    value = st.floats(-2, 2, width=32)
    of = np.array([[data.draw(value) for _ in range(k)] for _ in range(tokens)], np.float32)
    missing = data.draw(st.sets(st.integers(0, experts - 1)))
    share = data.draw(st.floats(0.01, 0.99))
    weights, left = leave_out(mx.array(chosen, mx.uint32), mx.array(of), missing, share)
    got = np.array(weights)
    gone = set(chosen[(got == 0) & (of != 0)].tolist())
    assert gone <= missing
    assert left == len(gone)
    stay = ~np.isin(chosen, list(gone))
    np.testing.assert_array_equal(got[stay], of[stay])
    limit = share * np.abs(of).sum(-1, keepdims=True)
    assert (np.abs(of) < limit)[(got == 0) & (of != 0)].all()


# -- in a model -----------------------------------------------------------------------------------


def decoded(model: Any) -> np.ndarray:
    """Logits of some tokens, decoded one by one."""
    cache = make_prompt_cache(model)
    given = (mx.array([[7 * number % 200 + 5]]) for number in range(30))
    return np.stack([np.array(model(x, cache=cache)) for x in given])


def test_leaving_out_saves_reads_and_is_counted(demo: Path) -> None:
    found = {}
    for share in (0, 0.2, 0.4):
        model, _ = load(demo, expert_memory="40%", expert_skip=share)
        logits, store = decoded(model), store_of(model)
        assert store is not None
        found[share] = logits, store.statistics
    whole = decoded(load(demo)[0])
    assert np.array_equal(found[0][0], whole)
    assert found[0][1].skipped == 0
    assert 0 < found[0.2][1].skipped < found[0.4][1].skipped
    assert found[0][1].misses > found[0.2][1].misses > found[0.4][1].misses
    assert not np.array_equal(found[0.4][0], whole)
    assert np.isfinite(found[0.4][0]).all()


def test_with_all_experts_in_memory_nothing_is_left_out(demo: Path) -> None:
    model, _ = load(demo, expert_memory="all", expert_skip=0.9)
    assert np.array_equal(decoded(model), decoded(load(demo)[0]))


@pytest.mark.parametrize("share", [-0.1, 1, 2.5, float("nan")])
def test_other_shares_are_refused(demo: Path, share: float) -> None:
    with pytest.raises(OutlierError, match="expected 0 or more, and less than 1"):
        load(demo, expert_memory="40%", expert_skip=share)


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(OutlierError, match="no experts that could be paged"):
        load(FOLDER / "base", expert_skip=0.1)


# -- in commands ----------------------------------------------------------------------------------

TEXT = FOLDER / "heldout" / "kitchen.txt"
PAGED = "--expert-memory", "40%", "--expert-skip"
WINDOW = "--window", 64, "--windows", 1


@pytest.mark.slow
def test_perplexity_has_the_price_as_text_is_written(demo: Path) -> None:
    whole = run("perplexity", demo, "--text", TEXT, *WINDOW, "--json").json
    assert "paging" not in whole
    none = run("perplexity", demo, "--text", TEXT, *WINDOW, *PAGED, 0, "--json").json
    assert none["perplexity"] == whole["perplexity"]
    assert none["paging"]["skipped"] == 0
    lossy = run(
        *("perplexity", demo, "--text", TEXT, *WINDOW, *PAGED, 0.45, "--json", "--against", demo)
    )
    assert lossy.json["paging"]["skipped"] > 0
    assert lossy.json["kl"] > 0
    assert f"{lossy.json['paging']['skipped']} left out" in lossy.err
    # A layer of a token needs at most two experts of three layers.
    paging = lossy.json["paging"]
    assert paging["hits"] + paging["misses"] + paging["skipped"] == 63 * 2 * 3


@pytest.mark.slow
def test_generated_text_is_the_same_with_none_left_out_and_is_counted_otherwise(demo: Path) -> None:
    ask = "generate", "--model", demo, "--prompt", "The cat", "--max-tokens", 24
    assert run(*ask, *PAGED, 0).out == run(*ask).out
    assert " left out" not in run(*ask, *PAGED, 0).err
    assert " left out" in run(*ask, *PAGED, 0.45).err


@pytest.mark.slow
def test_bench_counts_what_is_left_out(demo: Path) -> None:
    sizes = "--prompt-tokens", 4, "--generation-tokens", 8, "--num-trials", 1, "--json"
    assert run("bench", "--model", demo, *sizes, *PAGED, 0.45).json["paging"]["skipped"] > 0


@pytest.mark.parametrize("share", ["1", "-0.5", "2"])
def test_other_shares_are_usage_errors(demo: Path, share: str) -> None:
    ended = run("generate", "--model", demo, "--prompt", "x", f"--expert-skip={share}", code=2)
    assert "is not at least 0 and less than 1" in ended.err


def test_results_that_depend_on_memory_are_not_recorded(demo: Path) -> None:
    ended = run("perplexity", demo, "--text", TEXT, *PAGED, 0.1, "--record", code=1)
    assert_refused(ended, "--record", "--expert-skip")


def test_commands_that_need_all_experts_refuse_to_leave_any_out(demo: Path) -> None:
    ended = run("tune", demo, "--text", TEXT, "--expert-skip", 0.1, code=1)
    assert_refused(ended, "--expert-skip 0.1: a tier is trained through all experts")
