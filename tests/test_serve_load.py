"""32 clients at a time: nothing fails, and nobody gets another answer than alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.library import Library
from tests.load import Answer, difference, first_tokens, load, with_tools
from tests.serving import running


def answer(*tokens: tuple[str, float, str, float]) -> Answer:
    content = [
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [
                {"token": token, "logprob": logprob},
                {"token": other, "logprob": value},
            ],
        }
        for token, logprob, other, value in tokens
    ]
    text = "".join(token for token, *_ in tokens)
    message = {"content": text}
    return Answer({"message": message, "finish_reason": "stop", "logprobs": {"content": content}})


def test_only_rounding_is_no_difference() -> None:
    alone = answer(("a", -0.1, "b", -3.0), ("c", -0.7, "d", -0.7005))
    assert difference(alone, alone) is None
    assert difference(alone, answer(("a", -0.1001, "b", -3.0), ("d", -0.7, "c", -0.7))) is None
    assert difference(alone, answer(("b", -0.1, "a", -0.1), ("c", -0.7, "d", -0.7)))
    assert difference(alone, answer(("a", -0.2, "b", -3.0), ("c", -0.7, "d", -0.7)))
    assert difference(alone, answer(("a", -0.1, "b", -3.0)))


@pytest.mark.slow
def test_many_clients(library: Library, tmp_path: Path) -> None:
    tier = with_tools(library.demo_tier("q4"), tmp_path / "tier")
    # Some prompts are found in the cache, and some are not.
    with running(tier, max_tokens=100, prompt_cache_bytes=8_000_000) as server:
        report = load(server, clients=32, seconds=25)
        assert not report.failures
        assert report.answered.keys() == {"short", "long", "schema", "tools", "seeded"}
        assert min(report.answered.values()) >= 3
        generator = server.server.generator
        assert server.wait(lambda: not generator.replies)
        assert server.wait(lambda: not generator.loop._batches and not generator.loop._waiting)
        assert not generator.provider.memory._taken
        assert not [line for line in server.log if "failed" in line or "Error" in line]


@pytest.mark.slow
def test_a_short_prompt_does_not_wait_for_a_long_one(library: Library) -> None:
    with running(library.demo_tier("q4"), prompt_cache_bytes=0) as server:
        found = first_tokens(server, 16)
    assert len(found.reading) >= 8
    assert found.ratio < 3
