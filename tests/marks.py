"""Marks of parametrized tests."""

from collections.abc import Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def slow_but(fast: Iterable[Any], cases: Iterable[Any], *, names: int = 1) -> list[Any]:
    """Parameters of a test: the `fast` ones as they are, all other cases marked as slow.

    Args:
        fast: those of the cases that show first that something is wrong.
        cases: values of a parameter, or of several at once.
        names: how many parameters they are for.
    """
    fast, cases = list(fast), list(cases)
    assert all(case in cases for case in fast)
    return [
        case if case in fast else pytest.param(*(case if names > 1 else (case,)), marks=SLOW)
        for case in cases
    ]
