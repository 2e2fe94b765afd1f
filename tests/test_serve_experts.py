"""Which experts served the tokens of a reply, as requests can ask the server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import statistics_of
from outlier_mlx.measure.expert_recorder import recording, trace_about
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.storage.hub import Source
from tests.library import Library
from tests.serving import Running, running

ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story about a duck."}],
    "max_tokens": 20,
}
EXPERTS: dict[str, Any] = {"outlier": {"experts": True}}


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[Running]:
    with running(demo) as found:
        yield found


def traced(demo: Path, generated: list[int]) -> Any:
    """The trace of the same tokens, from the one that computed the first of the reply on."""
    model, tokenizer = outlier_mlx.load(demo)
    prompt = tokenizer.apply_chat_template(ASK["messages"], add_generation_prompt=True)
    with recording(model) as recorder:
        mx.eval(model(mx.array([[*prompt, *generated[:-1]]])))
    trace = recorder.trace(trace_about(Source(demo, "demo"), model, "x", 1))
    start = len(prompt) - 1
    return trace.experts[start:], trace.weights[start:]


def test_they_are_those_of_the_trace(server: Running, demo: Path) -> None:
    status, _, answer = server.post(ASK | EXPERTS | {"logprobs": True})
    assert status == 200, answer
    tokens = answer["outlier"]["experts"]
    assert "".join(token["text"] for token in tokens) == answer["choices"][0]["message"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"] == 20
    generated = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    experts, weights = traced(demo, generated)
    uses = [token["experts"] for token in tokens]
    assert [[[n for n, _, _ in layer] for layer in use] for use in uses] == experts.tolist()
    told = [[[weight for _, weight, _ in layer] for layer in use] for use in uses]
    assert np.allclose(told, weights, rtol=2e-3, atol=1e-6)
    assert {place for use in uses for layer in use for _, _, place in layer} == {"memory"}


def test_a_stream_has_them_with_their_text(server: Running) -> None:
    whole = server.post(ASK | EXPERTS)[2]
    chunks = server.stream(ASK | EXPERTS)
    tokens = [token for chunk in chunks for token in chunk.get("outlier", {}).get("experts", [])]
    assert tokens == whole["outlier"]["experts"]
    for chunk in chunks:
        text = "".join(token["text"] for token in chunk["outlier"]["experts"])
        assert text == chunk["choices"][0]["delta"].get("content", "")


def test_the_token_that_ends_the_text_is_no_part_of_it(server: Running) -> None:
    answer = server.post(ASK | EXPERTS | {"max_tokens": 100})[2]
    assert answer["choices"][0]["finish_reason"] == "stop"
    content = answer["choices"][0]["message"]["content"]
    assert "".join(token["text"] for token in answer["outlier"]["experts"]) == content


def test_who_does_not_ask_is_not_told(server: Running) -> None:
    assert "outlier" not in server.post(ASK)[2]
    assert "outlier" not in server.post(ASK | {"outlier": {"experts": False}})[2]
    assert not any("outlier" in chunk for chunk in server.stream(ASK))


def test_nothing_is_watched_unless_somebody_asks(server: Running) -> None:
    server.post(ASK | EXPERTS)
    server.post(ASK)
    model = server.server.generator.provider.model
    assert {type(layer.mlp) for layer in model.layers[1:4]} == {OutlierMoE}


def test_a_batch(server: Running) -> None:
    """Each request gets its own row's, whoever else is in the batch, and comes and goes."""
    texts = ["leek soup", "find Vega", "bread", "the schooner Marigold", "a reef"]
    bodies = [
        ASK
        | {"messages": [{"role": "user", "content": f"{'Tell me, ' * n}{text}?"}]}
        | {"max_tokens": 8 + 4 * n}
        | (EXPERTS if n % 2 == 0 else {})
        for n, text in enumerate(texts)
    ]
    alone = [server.post(body)[2] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = [answer for _, _, answer in pool.map(server.post, bodies)]
    for n, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other["choices"][0]["message"] == one["choices"][0]["message"]
        assert ("outlier" in other) is (n % 2 == 0)
        if n % 2 == 0:
            for a, b in zip(one["outlier"]["experts"], other["outlier"]["experts"], strict=True):
                assert a["text"] == b["text"]
                numbers, weights = (
                    np.array([[u[i] for u in s] for s in a["experts"]]) for i in (0, 1)
                )
                assert np.array_equal(numbers, [[u[0] for u in s] for s in b["experts"]])
                assert np.allclose(weights, [[u[1] for u in s] for s in b["experts"]], rtol=1e-3)


def test_where_paged_experts_were(demo: Path, server: Running) -> None:
    """Every expert that was missing is told, and nothing else is said to be read."""
    load = partial(outlier_mlx.load, demo, expert_memory=ExpertMemory(slots=7))
    with running(load) as paged:
        paged.post(ASK | {"max_tokens": 1})
        statistics = statistics_of(paged.server.generator.provider.model)
        assert statistics is not None
        before = statistics.misses
        answer = paged.post(ASK | EXPERTS)[2]
        tokens = answer["outlier"]["experts"]
        uses = [tuple(use) for token in tokens for layer in token["experts"] for use in layer]
        assert {place for _, _, place in uses} <= {"memory", "early", "disk"}
        read = sum(place == "disk" for _, _, place in uses)
        after = statistics_of(paged.server.generator.provider.model)
        assert after is not None
        # The server computes a step more than it tells, and all but the prompt's last token.
        assert 0 < read <= after.misses - before
        plain = server.post(ASK | EXPERTS)[2]["outlier"]["experts"]
        assert [[[u[:2] for u in layer] for layer in token["experts"]] for token in tokens] == [
            [[u[:2] for u in layer] for layer in token["experts"]] for token in plain
        ]
        models = paged.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")[2]
        assert models["data"][0]["outlier"]["experts"]["paged"]


@pytest.mark.slow
def test_a_model_that_is_loaded_again(demo: Path) -> None:
    with running(demo, idle_unload=1 / 60) as server:
        first = server.post(ASK | EXPERTS)[2]["outlier"]
        assert server.wait(lambda: server.server.generator.provider.state == "unloaded")
        assert server.post(ASK | EXPERTS)[2]["outlier"] == first


def test_only_a_tier_has_some(library: Library) -> None:
    with running(library.base().path) as server:
        status, _, answer = server.post(ASK | EXPERTS)
        assert status == 400
        assert answer["error"]["param"] == "outlier"
        assert "only a tier has experts to tell" in answer["error"]["message"]
        assert server.post(ASK | {"outlier": {"experts": False}})[0] == 200


@pytest.mark.parametrize("value", [True, {"experts": 1}, {"experts": "yes"}, [1]])
def test_other_values(server: Running, value: Any) -> None:
    status, _, answer = server.post(ASK | {"outlier": value})
    assert (status, answer["error"]["param"]) == (400, "outlier")
