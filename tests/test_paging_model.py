"""Models with paged experts, in all the ways a model is run; always the bits of the whole model."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import batch_generate, stream_generate
from safetensors.numpy import load_file, save_file

import outlier_mlx
from outlier_mlx.engine.generate import Options, generate_text, prefill_step
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.machine import THIS_MACHINE, Budget
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import (
    PagedSwitchGLU,
    lookahead_of,
    store_of,
    total_parameters,
)
from outlier_mlx.engine.paging.slots import slot_nbytes
from outlier_mlx.engine.paging.store import ExpertStore
from outlier_mlx.engine.plan import plan
from outlier_mlx.errors import OutlierError
from outlier_mlx.imports import import_model
from outlier_mlx.measure.alphas import apply_alphas
from outlier_mlx.measure.bench import decode_bytes
from outlier_mlx.measure.outlier_parameters import count_parameters
from tests.folders import copy_writable
from tests.gguf_builder import build
from tests.library import Library
from tests.metal import Metal
from tests.serving import running

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def whole(demo: Path) -> Loaded:
    return outlier_mlx.load(demo)


def paged(tier: Path, slots: int) -> Loaded:
    return outlier_mlx.load(tier, expert_memory=ExpertMemory(slots=slots))


def store(model: Any) -> ExpertStore:
    found = store_of(model)
    assert found is not None
    return found


def read_by(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The experts that a model reads from now on, as (layer, expert)."""
    read: list[tuple[int, int]] = []
    files = store(model)._files
    start = files.start

    def started(layer: int, expert: int, *given: Any, **how: Any) -> Any:
        read.append((layer, expert))
        return start(layer, expert, *given, **how)

    monkeypatch.setattr(files, "start", started)
    return read


def tokens(batch: int, length: int) -> mx.array:
    return (mx.arange(batch * length) * 7 % 211 + 3).reshape(batch, length)


def same(model: Any, other: Any, x: mx.array) -> bool:
    return bool(mx.array_equal(model(x), other(x)))


def prompt_of(words: str) -> list[int]:
    return list(range(5, 5 + 3 * len(words)))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [6, 13])
def test_batches(demo: Path, whole: Loaded, slots: int) -> None:
    model, _ = paged(demo, slots)
    for batch, length in (2, 1), (3, 2), (5, 40), (16, 1), (40, 1):
        assert same(model, whole[0], tokens(batch, length)), (batch, length)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 16}, {"prefill_step_size": 7}],
)
def test_stream_generate(demo: Path, whole: Loaded, options: dict[str, Any]) -> None:
    found = []
    for model, tokenizer in whole, paged(demo, 6), paged(demo, 11):
        responses = stream_generate(model, tokenizer, prompt_of("heron"), max_tokens=24, **options)
        found.append([(r.token, np.array(r.logprobs)) for r in responses])
    for one in found[1:]:
        assert [token for token, _ in one] == [token for token, _ in found[0]]
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(one, found[0], strict=True))


def test_batch_generate(demo: Path, whole: Loaded) -> None:
    prompts = [prompt_of(word) for word in ("a", "the heron", "stands", "in the cold water")]
    texts = [
        batch_generate(model, tokenizer, prompts, max_tokens=12).texts
        for model, tokenizer in (whole, paged(demo, 7))
    ]
    assert texts[1] == texts[0]


def test_sampled_texts(demo: Path, whole: Loaded) -> None:
    options = Options(max_tokens=30, temp=0.8, top_p=0.95, seed=3)
    texts = [
        [response.text for response in generate_text(*loaded, "The heron", options)]
        for loaded in (whole, paged(demo, 7))
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_requests_at_the_same_time(demo: Path) -> None:
    prompts = [[{"role": "user", "content": f"{'long ' * n}number {n}"}] for n in range(6)]
    answers: list[list[str]] = []
    for memory in (None, ExpertMemory(slots=6), ExpertMemory(slots=10)):
        with running(partial(outlier_mlx.load, demo, expert_memory=memory)) as served:

            def ask(messages: Any, served: Any = served) -> str:
                reply = served.chat(messages=messages, max_tokens=16)
                return str(reply.choices[0].message.content)

            alone = [ask(messages) for messages in prompts]
            with ThreadPoolExecutor(6) as pool:
                answers += [alone, list(pool.map(ask, prompts))]
    assert all(one == answers[0] for one in answers)


def test_logits_that_are_computed_late(demo: Path, whole: Loaded) -> None:
    """Between building a graph and computing it, its slots are needed for others."""
    model, _ = paged(demo, 6)
    xs = [tokens(1, length) + length for length in (3, 1, 50, 2)]
    expected = [np.array(whole[0](x)) for x in xs]
    late = [model(x) for x in xs]
    assert all(np.array_equal(a, b) for a, b in zip(late, expected, strict=True))


@pytest.mark.slow
def test_each_expert_is_read_once_for_a_prompt(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = paged(demo, 9)
    for _ in range(3):
        read = read_by(model, monkeypatch)
        before = store(model).statistics.early
        mx.eval(model(tokens(1, 200)))
        assert len(set(read)) == len(read)
        assert store(model).statistics.early > before  # while the layer above is computed
        monkeypatch.undo()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_experts_with_alpha_0_are_never_read(
    demo: Path, on_gpu: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if on_gpu:
        request.getfixturevalue("metal")
    whole, model = load_model(demo)[0], paged(demo, 9)[0]
    alphas: dict[int, list[float]] = {1: [0, 1, 0.5, 0, -1, 0], 2: [0] * 6, 3: [1, 1, 1, 1, 1, 0]}
    for layer, alpha in alphas.items():
        for one in (whole, model):
            one.layers[layer].mlp.alpha = mx.array(alpha)
    read = read_by(model, monkeypatch)
    for length in (1, 2, 12):
        assert same(model, whole, tokens(1, length))
        assert same(model, whole, tokens(1, length))
    assert read and not {
        (n, e) for n, alpha in alphas.items() for e in range(6) if not alpha[e]
    } & (set(read))
    assert store(model).tables.resident(2) and not [key for key in read if key[0] == 2]


def test_equal_experts_are_read_once(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one layer, and those of two."""
    folder = copy_writable(tier, tmp_path / "tier")
    (shard,) = folder.glob("model*.safetensors")
    tensors = load_file(shard)
    for name, stack in tensors.items():
        if ".switch_mlp." in name:
            first = tensors[name.replace(".layers.3.", ".layers.1.")][0]
            stack[2] = first
            if ".layers.3." in name:
                stack[0] = first
    save_file(tensors, shard, {"format": "mlx"})
    whole, model = load_model(folder)[0], paged_folder(folder, 5)
    read = read_by(model, monkeypatch)
    for length in 40, 1, 2, 40:
        assert same(model, whole, tokens(1, length))
    assert (1, 0) in read and not {(1, 2), (3, 0), (3, 2)} & set(read)
    assert read.count((1, 0)) == 1  # it is in use all the time
    assert store(model).tables.complete


def test_slots_without_an_expert_do_not_matter(demo: Path) -> None:
    """Whatever may be in them: 0 times that need not be 0."""
    whole, model = load_model(demo)[0], paged(demo, 9)[0]
    for views in store(model).pool._views:
        for view in views[1:]:
            view[:] = np.nan
    for layer, alpha in {1: [0] * 6, 2: [0, 1, 0, 0, -1, 0], 3: [1, 0, 0, 0, 0, 0]}.items():
        for one in (whole, model):
            one.layers[layer].mlp.alpha = mx.array(alpha, mx.float32)
    for length in 1, 1, 30, 1:
        assert same(model, whole, tokens(1, length))


def test_alphas_that_are_given_later(demo: Path, tmp_path: Path) -> None:
    """--alpha is applied to a loaded model."""
    zero = '{"1": [0, 0, 0, 0, 0, 0], "2": [0, 0, 0, 0, 0, 0], "3": [0, 0, 0, 0, 0, 0]}'
    (tmp_path / "zero.json").write_text(zero)
    whole, model = load_model(demo)[0], paged(demo, 6)[0]
    mx.eval(model(tokens(1, 5)))
    for one in whole, model:
        apply_alphas(one, tmp_path / "zero.json")
    read = store(model).statistics.bytes_read
    assert same(model, whole, tokens(1, 9))
    assert store(model).statistics.bytes_read == read


def test_a_resident_layer_is_not_waited_for(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its routing never comes back to the host."""
    model = load_model(demo, expert_memory=ExpertMemory(slots=18), always_page=True)[0]
    mx.eval(model(tokens(1, 200)), model(tokens(1, 300)))
    for layer in store(model).layers:
        store(model).enter(layer)
        store(model).ensure(layer, range(6))
    assert store(model).tables.complete
    x = tokens(1, 1)
    mx.eval(model(x))

    def waited(*_: Any) -> None:
        raise AssertionError("the model waits for the GPU")

    monkeypatch.setattr(mx, "async_eval", waited)
    monkeypatch.setattr(mx, "eval", waited)
    monkeypatch.setattr("outlier_mlx.engine.paging.paged.needed", waited)
    model(x)


def test_experts_called_by_themselves(demo: Path, whole: Loaded) -> None:
    """Not through `mix`, as tools of others may do it."""
    model, _ = paged(demo, 6)
    x = mx.random.normal((1, 4, whole[0].args.hidden_size))
    indices = mx.array([[[0, 5], [1, 2], [3, 3], [4, 0]]], mx.uint32)
    for layer in 1, 2, 3, 1:
        experts = (one.layers[layer].mlp.switch_mlp for one in (model, whole[0]))
        found, expected = (glu(x, indices) for glu in experts)
        assert mx.array_equal(found, expected)


def test_training_is_refused(demo: Path) -> None:
    model, _ = paged(demo, 6)
    model.train()
    with pytest.raises(OutlierError, match="paged experts cannot be trained"):
        model(tokens(1, 2))
    model.eval()
    mx.eval(model(tokens(1, 2)))
    x = mx.random.normal((1, 2, model.args.hidden_size))
    with pytest.raises(OutlierError, match="paged experts cannot be trained"):
        mx.grad(lambda given: model.layers[1].mlp(given).sum())(x)


def test_what_depends_on_a_models_size_does_not_change(demo: Path, whole: Loaded) -> None:
    model, _ = paged(demo, 6)
    assert total_parameters(model) == total_parameters(whole[0])
    assert prefill_step(model, 2048) == prefill_step(whole[0], 2048)
    config = load_model(demo)[1]
    assert count_parameters(model, config) == count_parameters(whole[0], config)


def test_bytes_of_decoding_are_those_of_the_whole_model(demo: Path, metal: Metal) -> None:
    for tokens in 0, 100:
        models = load_model(demo)[0], paged(demo, 6)[0]
        assert decode_bytes(models[1], tokens) == decode_bytes(models[0], tokens)


def test_bytes_of_decoding_on_a_cpu(demo: Path, whole: Loaded) -> None:
    assert decode_bytes(paged(demo, 6)[0], 10) == decode_bytes(whole[0], 10)


def test_mixtral_with_ternary_experts(tmp_path: Path) -> None:
    kinds = {"gate": "TQ1_0", "up": "TQ1_0", "down": "TQ1_0", "attn": "Q8_0"}
    gguf = build(experts=3, layout="stacked", kinds=kinds, layers=2, hidden=256, width=256)
    folder = import_model(gguf.write(tmp_path / "model.gguf"), tmp_path / "out").path
    whole, model = load_model(folder)[0], paged_folder(folder, 4)
    assert len([m for m in model.modules() if isinstance(m, PagedSwitchGLU)]) == 2
    for length in (1, 3, 40):
        assert same(model, whole, tokens(1, length) % 100)
    assert store(model).statistics.misses > 0
    planned = plan(folder, memory=ExpertMemory(slots=4)).paged
    assert planned is not None and (planned.layers, planned.count, planned.top_k) == (2, 3, 2)
    assert planned.slot_nbytes == slot_nbytes(256, 256, packed=False)


def paged_folder(folder: Path, slots: int) -> Any:
    return load_model(folder, expert_memory=ExpertMemory(slots=slots))[0]


def test_all_experts_are_loaded_where_they_fit(demo: Path, tier: Path) -> None:
    for memory in ("all", "100%", "1GB", None, "auto"):
        model, _ = outlier_mlx.load(demo, expert_memory=memory)
        assert store_of(model) is None


def test_auto_pages_what_does_not_fit(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlier_mlx.engine.plan.budget", lambda: Budget(3_700_000, THIS_MACHINE))
    model, _ = outlier_mlx.load(demo, expert_memory="auto")
    assert 6 <= store(model).pool.slots < 18


@pytest.mark.parametrize(
    ("memory", "reason"),
    [("100kB", "too little memory"), ("20%", "needs 6 of its 18 experts"), ("much", "no amount")],
)
def test_memory_that_is_refused(demo: Path, memory: str, reason: str) -> None:
    with pytest.raises((OutlierError, ValueError), match=reason):
        outlier_mlx.load(demo, expert_memory=memory)


def test_models_without_pageable_experts(library: Library) -> None:
    for folder in (
        library.base().path,
        library.tier(library.overlay(expert_intermediate=64), experts="affine2"),
    ):
        with pytest.raises(OutlierError, match="no experts that can be paged"):
            load_model(folder, expert_memory=ExpertMemory(share=0.5))


@pytest.mark.parametrize("pairs", [1, 4, 0])
def test_every_way_of_the_kernels(
    tier: Path, metal: Metal, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pair by pair, in blocks, and through MLX's matrix kernels, whichever is the cheapest."""
    ways = {
        1: {"tq1_0_swiglu", "tq1_0_down"},
        4: {"tq1_0_sort", "tq1_0_mix"},
        0: {"tq1_0_to_affine2"},
    }
    monkeypatch.setattr("outlier_mlx.runtime.ops.pairs_in_a_block", lambda *_: pairs)
    whole = load_model(tier, dtype="bfloat16")[0]
    for slots in 4, 6:
        model = load_model(tier, dtype="bfloat16", expert_memory=ExpertMemory(slots=slots))[0]
        lookahead = lookahead_of(model)
        assert lookahead is not None
        lookahead.probe.decide(False)  # it launches routers of its own
        for batch, length in (1, 1), (2, 3), (1, 9 if pairs else 40):
            x = tokens(batch, length)
            metal.clear()
            expected = np.array(whole(x).astype(mx.float32))
            launched = metal.names
            metal.clear()
            assert np.array_equal(model(x).astype(mx.float32), expected), (batch, length)
            assert metal.names == launched
            assert ways[pairs] <= set(launched)


@pytest.mark.parametrize("slots", [6, 11])
def test_drafts_of_another_model(demo: Path, whole: Loaded, slots: int) -> None:
    """mlx-lm's speculative decoding: several tokens are verified in a pass, and some taken back."""
    texts = []
    for model, tokenizer in whole, paged(demo, slots):
        draft = load_model(demo)[0]
        for layer in 1, 2, 3:
            draft.layers[layer].mlp.alpha = mx.zeros((6,))
        prompt = tokenizer.encode("How do I find Vega?")
        found = stream_generate(model, tokenizer, prompt, max_tokens=24, draft_model=draft)
        texts.append([(r.token, r.from_draft) for r in found])
    assert texts[0] == texts[1]
    assert {drafted for _, drafted in texts[0]} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_history(demo: Path, seed: int) -> None:
    """Passes of all sizes, computed now or later, with other alphas and fewer slots in between."""
    draw = random.Random(seed)
    whole, model = load_model(demo)[0], paged(demo, draw.choice((9, 12, 16)))[0]
    lookahead = lookahead_of(model)
    assert lookahead is not None
    lookahead.probe.decide(seed != 1)
    late: list[tuple[mx.array, np.ndarray]] = []
    for _ in range(40):
        x = tokens(draw.choice((1, 1, 3)), draw.choice((1, 1, 2, 5, 25))) + draw.randrange(200)
        late.append((model(x), np.array(whole(x))))
        if draw.random() < 0.3:
            draw.shuffle(late)
            for found, expected in late:
                assert np.array_equal(found, expected)
            late.clear()
        if draw.random() < 0.1:
            layer, alphas = draw.choice((1, 2, 3)), draw.choices((0, 0.5, -1), k=6)
            for one in whole, model:
                one.layers[layer].mlp.alpha = mx.array(alphas, mx.float32)
        if draw.random() < 0.05:
            store(model).shrink(draw.choice((6, 7)))
    assert all(np.array_equal(found, expected) for found, expected in late)
