"""Missing experts with a small share of a token's weight are left out, on request."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlier_mlx.engine.paging.skip import leave_out

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
