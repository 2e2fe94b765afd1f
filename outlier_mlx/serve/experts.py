"""Which experts served the tokens of a reply, for the requests that ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outlier_mlx.engine.experts import Pass
from outlier_mlx.serve.jobs import Job
from outlier_mlx.serve.provider import OneModel


class ExpertWatch:
    """Takes down which experts compute the next token of each job that asks; see `Loop.watch`.

    While no job of a step asks, nothing is recorded. A pass gives each row one token, so jobs that
    ask have no drafts.
    """

    def __init__(self, provider: OneModel) -> None:
        """Only the thread that generates may call it."""
        self._provider = provider

    @contextmanager
    def __call__(self, jobs: list[Job]) -> Iterator[None]:
        """Record the step of these jobs' rows, which the model takes in this context."""
        asking = [(row, job) for row, job in enumerate(jobs) if job.request.experts]
        recorder = self._provider.recorder
        if recorder is None or not asking:
            if recorder is not None:
                recorder.stop()
            yield
            return
        recorder.start()
        yield
        if recorder.latest is not None:
            for row, job in asking:
                job.passes.append((recorder.latest, row))


def described(text: str, taken: tuple[Pass, int]) -> dict[str, Any]:
    """A token as clients get it: JSON values.

    Args:
        text: the token's.
        taken: the pass that computed it, and its row there; both computed.
    """
    step, row = taken
    layers = [
        [[number, float(f"{weight:.5g}"), place] for number, weight, place in uses]
        for uses in step.served(row)
    ]
    return {"text": text, "experts": layers}
