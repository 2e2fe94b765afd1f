"""How much of a prompt is read at a time, and whose prompt."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from outlier_mlx.serve.jobs import Job
from outlier_mlx.serve.pace import LEAST, Pace
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.sampling import choice_for
from outlier_mlx.serve.segments import Prompt
from outlier_mlx.serve.sequences import Sequence
from outlier_mlx.serve.waiting import TURNS, Waiting

#: Machines: seconds of a slice by its tokens, and the expected tokens with others and without.
MACHINES: dict[str, tuple[Callable[[int], float], int, int]] = {
    "few tokens are as fast as many": (lambda n: 0.001 + 0.001 * n, LEAST, LEAST),
    "a slice has a cost of its own": (lambda n: 0.5 + 0.002 * n, 128, 512),
    "experts are read from disk": (lambda n: 3.0 + 0.002 * n, 1024, 2048),
    "only slices count": (lambda n: 0.1, 2048, 2048),
}


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["quiet", "noisy"])
@pytest.mark.parametrize("machine", list(MACHINES))
def test_slices_follow_the_machine(machine: str, noise: float) -> None:
    seconds, shared, alone = MACHINES[machine]
    rng, pace = random.Random(1), Pace(2048)
    pace.took(LEAST, 20.0)  # the first also loads the weights
    for expected, others in ((shared, True), (alone, False), (shared, True)):
        for _ in range(40):
            tokens = pace.tokens(shared=others)
            for length in (tokens, rng.randrange(10, LEAST)):  # a slice, and a short prompt
                pace.took(length, seconds(length) * (1 + rng.uniform(-noise, noise)))
        assert tokens == expected or (noise and expected / 2 <= tokens <= expected * 2)


def test_no_slice_is_longer_than_a_step_may_be() -> None:
    pace = Pace(24)
    for _ in range(5):
        assert pace.tokens(shared=True) == pace.tokens(shared=False) == 24
        pace.took(24, 0.1)


def test_slices_grow_at_most_twofold() -> None:
    """What takes how long is only known once it was tried."""
    pace, last = Pace(1 << 20), LEAST
    for _ in range(12):
        tokens = pace.tokens(shared=False)
        assert tokens <= 2 * last
        pace.took(tokens, 0.1)
        last = tokens
    assert last > 4096


def waiting(*lengths: int, read: int = 0) -> list[Sequence]:
    jobs = (Job(Request(), Prompt([1] * n, ()), 1, lambda job: None) for n in lengths)
    return [Sequence(job, [], read, choice_for(Request(), [])) for job in jobs]


def lengths(group: list[Sequence]) -> list[int]:
    return [len(sequence.job.prompt.tokens) for sequence in group]


def test_short_prompts_come_first_and_long_ones_in_their_time() -> None:
    line = Waiting()
    for sequence in waiting(4000, 3000, 900):
        line.add(sequence)
    turns = [lengths(line.next_group(128, 8)) for _ in range(2 * TURNS)]
    assert turns == [[900]] * (TURNS - 1) + [[4000]] + [[900]] * (TURNS - 1) + [[4000]]


def test_short_prompts_are_read_together_as_far_as_a_slice_goes() -> None:
    line = Waiting()
    for sequence in waiting(500, 41, 31, 1, 21, 51):
        line.add(sequence)
    assert lengths(line.next_group(128, 8)) == [1, 21, 31]  # 3 times 30 tokens; not 4 times 40
    assert lengths(line.next_group(256, 8)) == [1, 21, 31, 41, 51]
    assert lengths(line.next_group(256, 3)) == [1, 21, 31]
    assert lengths(line.next_group(256, 1)) == [500]  # it is the oldest's turn


def test_a_slice_ends_where_a_prefix_is_kept() -> None:
    job = Job(Request(), Prompt(list(range(100)), ((30, "system"), (99, "user"))), 1, print)
    sequence = Sequence(job, [], 10, choice_for(Request(), []))
    assert sequence.slice(64) == list(range(10, 30))
    sequence.tokens += sequence.slice(64)
    assert sequence.slice(64) == list(range(30, 94))
    sequence.tokens += sequence.slice(64)
    assert sequence.slice(64) == list(range(94, 99))


def test_who_gave_up_is_dropped() -> None:
    line = Waiting()
    first, second = waiting(10, 20)
    for sequence in (first, second):
        line.add(sequence)
    first.job.close()
    line.drop_abandoned()
    assert line.next_group(128, 8) == [second]
    line.remove([second])
    assert len(line) == 0
