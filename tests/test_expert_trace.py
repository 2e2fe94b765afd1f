"""`routing --trace`: what is recorded, how it is written, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from safetensors.numpy import save_file

from outlier_mlx import load
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.measure import expert_trace
from outlier_mlx.measure.expert_recorder import Recorder, recording, trace_about
from outlier_mlx.measure.expert_trace import About, Trace, read_trace, write_trace
from outlier_mlx.measure.replay_run import Machine, replay_all
from outlier_mlx.runtime.routing import top_experts
from outlier_mlx.storage.hub import resolve
from outlier_mlx.storage.safetensors import read_header
from tests.library import Library
from tests.program import assert_refused, run

ABOUT = About("m", "", "t", (1, 3), 4, 2, expert_bytes=100, base_bytes=900, shared_bytes=300)


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.place(expert_intermediate=64) / "tier"


@pytest.fixture(scope="module")
def recorded(tier: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trace") / "text.trace"
    run("routing", tier, "--text", text, "--window", 24, "--windows", 3, "--trace", file)
    return file


def random_trace(tokens: int = 12, seed: int = 0, about: About = ABOUT) -> Trace:
    """Passes of one token, with random experts."""
    random = np.random.default_rng(seed)
    shape = tokens, len(about.layers)
    experts, foreseen = (
        np.argsort(random.random((*shape, min(about.experts, 256))))[..., : about.top_k].astype(
            np.uint8
        )
        for _ in range(2)
    )
    weights = random.random(experts.shape).astype(np.float16) + np.float16(0.1)
    return Trace(about, experts, weights, np.ones(tokens, np.uint32), foreseen)


def test_a_recorded_text_is_what_decoding_it_routes_to(tier: Path, recorded: Path) -> None:
    """Token by token with a KV cache, by a route of the test's own."""
    trace = read_trace(recorded)
    model, tokenizer = load(tier)
    tokens = tokenizer.encode((tier.parent / "text.txt").read_text())[:24]
    with recording(model) as recorder:
        cache = make_prompt_cache(model)
        for token in tokens:
            mx.eval(model(mx.array([[token]]), cache=cache))
    decoded = recorder.trace(trace.about)
    assert trace.experts.shape == (72, 2, 2) and trace.passes.tolist() == [1] * 72
    assert decoded.passes.tolist() == [1] * 24
    np.testing.assert_array_equal(trace.experts[:24], decoded.experts)
    np.testing.assert_allclose(trace.weights[:24], decoded.weights, atol=2e-3)


def test_experts_and_weights_are_those_of_the_logits(tier: Path, recorded: Path) -> None:
    trace = read_trace(recorded)
    model, tokenizer = load(tier)
    tokens = tokenizer.encode((tier.parent / "text.txt").read_text())[:24]
    seen: dict[int, mx.array] = {}
    blocks = {number: model.layers[number].mlp for number in trace.about.layers}
    for number, block in blocks.items():
        kind = type(block)

        def call(self: Any, x: mx.array, number: int = number, kind: Any = kind) -> mx.array:
            seen[number] = self.gate(x)[0]
            return kind.__call__(self, x)

        object.__setattr__(block, "__class__", type("Seen", (kind,), {"__call__": call}))
    mx.eval(model(mx.array([tokens])))
    for at, number in enumerate(trace.about.layers):
        chosen = np.array(top_experts(seen[number], 2))
        np.testing.assert_array_equal(trace.experts[:24, at], chosen)
        logits = np.take_along_axis(np.array(seen[number], dtype=np.float64), chosen, axis=-1)
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected *= np.array(blocks[number].alpha)[chosen]
        np.testing.assert_allclose(trace.weights[:24, at], expected, rtol=2e-3)


def test_what_the_routers_above_foresee(tier: Path, recorded: Path) -> None:
    """The residual stream before layer 1's experts, as layer 3 would normalise and route it."""
    trace = read_trace(recorded)
    model, tokenizer = load(tier)
    tokens = tokenizer.encode((tier.parent / "text.txt").read_text())[:24]
    layers = model.layers
    h = model.model.embed_tokens(mx.array([tokens]))
    h = layers[0](h, "causal", None)
    h = h + layers[1].self_attn(layers[1].input_layernorm(h), "causal", None)
    logits = layers[3].mlp.gate(layers[3].post_attention_layernorm(h))[0]
    assert trace.foreseen is not None
    np.testing.assert_array_equal(trace.foreseen[:24, 1], np.array(top_experts(logits, 2)))
    np.testing.assert_array_equal(trace.foreseen[:, 0], trace.experts[:, 0])
    wanted = [
        len(set(e) & set(f)) / 2
        for e, f in zip(trace.experts[:, 1].tolist(), trace.foreseen[:, 1].tolist(), strict=True)
    ]
    assert trace.recall == pytest.approx(sum(wanted) / len(wanted))


def test_a_paged_model_gives_the_same_trace(tier: Path, text: Path, recorded: Path) -> None:
    paged = recorded.with_name("paged.trace")
    command = ["routing", tier, "--text", text, "--window", 24, "--windows", 3]
    run(*command, "--expert-memory", "50%", "--trace", paged)
    assert paged.read_bytes() == recorded.read_bytes()


def test_recording_changes_no_result(tier: Path) -> None:
    model, _ = load(tier)
    tokens = mx.array([[1, 2, 3, 4]])
    before = np.array(model(tokens))
    with recording(model):
        during = np.array(model(tokens))
    np.testing.assert_array_equal(before, during)
    np.testing.assert_array_equal(before, np.array(model(tokens)))


def test_what_is_said_of_the_model(tier: Path, recorded: Path) -> None:
    about = read_trace(recorded).about
    assert (about.model, about.text, about.layers) == ("tier", "text.txt", (1, 3))
    assert (about.experts, about.top_k) == (4, 2)
    files = [read_header(file) for file in tier.glob("*.safetensors")]
    sizes = {name: tensor.nbytes for file in files for name, tensor in file.items()}
    routed = sum(size for name, size in sizes.items() if "switch_mlp" in name)
    assert about.expert_bytes == routed / 8
    assert about.shared_bytes == sum(n for name, n in sizes.items() if "mlp.shared_expert." in name)
    # The KV cache of twelve tokens is all that is read besides weights.
    config = json.loads((tier / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    cache = 12 * 2 * 2 * width * config["num_key_value_heads"] * config["num_hidden_layers"]
    untied = [n for name, n in sizes.items() if name.startswith("model.embed_tokens")]
    unread = 0 if config["tie_word_embeddings"] else sum(untied) * (1 - 1 / config["vocab_size"])
    assert about.base_bytes == pytest.approx(sum(sizes.values()) - routed - unread + cache, abs=1)


def test_the_start_of_each_window_may_be_a_prompt(tier: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.trace"
    command = ["routing", tier, "--text", text, "--window", 24, "--windows", 2, "--trace", file]
    run(*command, "--prompt-tokens", 20)
    assert read_trace(file).passes.tolist() == [20, 1, 1, 1, 1] * 2
    run(*command, "--prompt-tokens", 100, "--force")
    assert read_trace(file).passes.tolist() == [24, 24]
    assert_refused(run(*command, code=1), "x.trace: exists; --force replaces it")
    usage = run("routing", tier, "--text", text, "--prompt-tokens", 2, code=2)
    assert "--trace" in usage.err


def test_a_long_prompt_is_read_in_chunks() -> None:
    trace = replace(random_trace(), passes=np.array([5000, 3], np.uint32))
    assert trace.decoded(4999).passes.tolist() == [2048, 2048, 903, 1, 3]
    assert trace.decoded(2048).passes.tolist()[:2] == [2048, 1]


def test_weights_never_become_zero_or_infinite(tier: Path) -> None:
    model, _ = load(tier)
    block = model.layers[1].mlp
    block.alpha = mx.array([0.0, 1e-9, 1e9, -1e-9])
    with recording(model) as recorder:
        mx.eval(model(mx.array([list(range(1, 40))])))
    trace = recorder.trace(trace_about(resolve(tier), model, "t", 1))
    weights, experts = trace.weights[:, 0], trace.experts[:, 0]
    assert set(experts.ravel().tolist()) == {0, 1, 2, 3}
    assert (weights[experts == 0] == 0).all()
    assert (weights[experts == 1] > 0).all() and (weights[experts == 3] < 0).all()
    assert (weights[experts == 2] == 65504).all()


def test_nothing_to_trace() -> None:
    with pytest.raises(OutlierError, match="nothing to trace"):
        Recorder().trace(ABOUT)


def test_a_trace_read_back(tmp_path: Path) -> None:
    for trace in (random_trace(), replace(random_trace(), foreseen=None)):
        write_trace(trace, tmp_path / "x")
        found = read_trace(tmp_path / "x")
        assert found.about == ABOUT
        for name in ("experts", "weights", "passes", "foreseen"):
            np.testing.assert_array_equal(getattr(found, name), getattr(trace, name))
    assert found.recall is None


def test_many_experts(tmp_path: Path) -> None:
    about = replace(ABOUT, experts=300, top_k=4)
    trace = random_trace(about=about)
    trace = replace(trace, experts=trace.experts + np.uint16(40), foreseen=None)
    assert trace.experts.max() > 255 and trace.experts.dtype == np.uint16
    write_trace(trace, tmp_path / "x")
    np.testing.assert_array_equal(read_trace(tmp_path / "x").experts, trace.experts)


# What is refused


def changed(path: Path, about: dict | None = None, **arrays: np.ndarray | None) -> None:
    """A trace with other tensors, or another description."""
    trace = random_trace()
    kept = {name: getattr(trace, name) for name in ("experts", "weights", "passes", "foreseen")}
    described = json.dumps({"version": 1} | asdict(ABOUT) | (about or {}))
    whole = {name: array for name, array in (kept | arrays).items() if array is not None}
    save_file(whole, path, metadata={"outlier-mlx trace": described})


def cut(path: Path) -> None:
    changed(path)
    path.write_bytes(path.read_bytes()[:-3])


EXPERTS = random_trace().experts
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda path: path.write_text("[1, 2, 3, 4]"), "not a whole safetensors file"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "cut": (lambda path: cut(path), "truncated"),
    "foreign": (lambda path: save_file({"experts": EXPERTS}, path), "not a trace"),
    "missing": (lambda path: changed(path, weights=None), "expected the tensors"),
    "more": (lambda path: changed(path, other=EXPERTS), "found experts, foreseen, other"),
    "numbers": (lambda path: changed(path, experts=EXPERTS + 2), "experts: expected numbers"),
    "guesses": (lambda path: changed(path, foreseen=EXPERTS + 2), "foreseen: expected numbers"),
    "dtype": (lambda path: changed(path, experts=EXPERTS.astype(np.int32)), "I32 (12, 2, 2)"),
    "shape": (lambda path: changed(path, weights=np.ones((11, 2, 2), np.float16)), "(11, 2, 2)"),
    "scalar": (lambda path: changed(path, experts=np.array(3, np.uint8)), "U8 ()"),
    "none": (lambda path: changed(path, experts=EXPERTS[:0]), "U8 (0, 2, 2)"),
    "sum": (lambda path: changed(path, passes=np.array([5, 8], np.uint32)), "sum to 12"),
    "zero": (lambda path: changed(path, passes=np.array([12, 0], np.uint32)), "none 0"),
    "version": (
        lambda path: changed(path, {"version": 2}),
        "version 2 of the format; supported: 1",
    ),
    "layers": (lambda path: changed(path, {"layers": [3, 1]}), "layers: expected"),
    "count": (lambda path: changed(path, {"layers": [1, 2, 3]}), "expected U8 (12, 3, 2)"),
    "experts": (lambda path: changed(path, {"experts": "4"}), "experts is '4'"),
    "most": (lambda path: changed(path, {"experts": 65536}), "whole number from 1 to 65535"),
    "all": (
        lambda path: changed(path, {"experts": 60000, "layers": list(range(100))}),
        "experts is 60000, expected a whole number from 1 to 10000",
    ),
    "k": (lambda path: changed(path, {"top_k": 5}), "top_k is 5, expected a whole number"),
    "bytes": (lambda path: changed(path, {"expert_bytes": 0}), "expert_bytes is 0"),
    "shared": (lambda path: changed(path, {"shared_bytes": 901}), "shared_bytes: expected at most"),
    "name": (lambda path: changed(path, {"model": 3}), "expected texts"),
    "json": (
        lambda path: save_file({"a": EXPERTS}, path, metadata={"outlier-mlx trace": "{"}),
        "not valid JSON",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    write, reason = CASES[name]
    write(tmp_path / "x.trace")
    with pytest.raises(CheckpointError) as caught:
        read_trace(tmp_path / "x.trace")
    assert reason in str(caught.value) and "x.trace" in str(caught.value)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header tells: nothing is read."""
    write_trace(random_trace(), tmp_path / "x")
    monkeypatch.setattr(expert_trace, "_MAX_BYTES", 239)
    with pytest.raises(CheckpointError, match="x: a trace of 240 bytes; at most 239 fit"):
        read_trace(tmp_path / "x")


@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_that_changed(places: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Either it is refused, or it can be replayed."""
    path = tmp_path_factory.getbasetemp() / "changed.trace"
    write_trace(random_trace(tokens=5), path)
    data = bytearray(path.read_bytes())
    for share, value in places:
        data[int(share * (len(data) - 1))] = value
    path.write_bytes(data)
    try:
        trace = read_trace(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    with np.errstate(all="ignore"):
        json.dumps(replay_all(trace, Machine("chip", 100, 3)).as_json())
