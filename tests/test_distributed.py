"""One model over several processes, connected by MLX's ring on the loopback device."""

from __future__ import annotations

import json
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.distributed import pipeline as pipeline_module
from outlier_mlx.engine.distributed import ranks as ranks_module
from outlier_mlx.engine.distributed.cuts import Cut, Run, spans
from outlier_mlx.engine.distributed.launcher import LOST
from outlier_mlx.engine.distributed.pipeline import divided
from outlier_mlx.engine.distributed.ranks import Ranks, agreed, connect, gathered, least, shared
from outlier_mlx.engine.distributed.tensor_parallel import TensorParallel, heads_of
from outlier_mlx.engine.needs import needs_of
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.ternary import rows as ternary_rows
from tests.evaluating import GENERATE, metrics, write_task
from tests.library import Library
from tests.program import SCRIPT, assert_refused, run
from tests.ranks import assert_ended, ended, run_python_ranks, run_ranks, start_ranks
from tests.serving import running

PROMPT = [1, 5, 7, 200, 31, 8, 9, 100]

LOGITS = """
import json, sys
import mlx.core as mx
import numpy as np
import outlier_mlx
from outlier_mlx.engine.distributed.ranks import connect, finish
from outlier_mlx.engine.paging.paged import store_of

folder, prompt, how = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
own = connect(pipeline=how.pop("pipeline", False))
model, _ = outlier_mlx.load(folder, dtype="float32", **how)
mx.eval(model.parameters())
loaded = mx.get_active_memory(), mx.get_peak_memory()
logits = np.array(model(mx.array([prompt])))
finish()
paged = store_of(model) is not None
print(json.dumps({"logits": logits.tolist(), "loaded": loaded, "paged": paged}))
"""


def logits_of_ranks(
    size: int, folder: Path, model: Path, prompt: list[int] = PROMPT, **how: Any
) -> list[Any]:
    """What `LOGITS` finds on each rank."""
    words = json.dumps(prompt), json.dumps(how)
    return run_python_ranks(size, folder, LOGITS, model, *words)


def logits_here(model: Path, prompt: list[int] = PROMPT) -> np.ndarray:
    """The logits of one process."""
    return np.array(outlier_mlx.load(model, dtype="float32")[0](mx.array([prompt])))


def assert_same_logits(found: list[Any], model: Path) -> None:
    # Sums in another order round differently: by 1e-5 where logits are 5, as those of a text are.
    expected = logits_here(model)
    for rank in found:
        np.testing.assert_allclose(rank["logits"], expected, rtol=0, atol=2e-6 * expected.max())


# -- what a rank has ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "parts", "unit", "expected"),
    [
        (173 * 16, 2, 16, [(0, 86 * 16), (86 * 16, 173 * 16)]),
        (100, 3, 32, [(0, 32), (32, 64), (64, 100)]),
        (16, 4, 16, [(0, 4), (4, 8), (8, 12), (12, 16)]),
        (5, 2, 1, [(0, 2), (2, 5)]),
    ],
)
def test_a_width_is_split_at_multiples_of_a_unit_where_it_has_enough(
    total: int, parts: int, unit: int, expected: list[tuple[int, int]]
) -> None:
    assert spans(total, parts, unit) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(40, 8, 2), (40, 8, 3), (4, 2, 4), (6, 2, 5)]
)
def test_every_head_is_on_one_rank_with_the_keys_it_reads(
    heads: int, kv_heads: int, size: int
) -> None:
    found = [heads_of(rank, size, heads, kv_heads) for rank in range(size)]
    queries = [head for own in found for head in range(*own.queries)]
    assert queries == list(range(heads))
    for own in found:
        count, keys = own.counts
        assert count % keys == 0
        group = heads // kv_heads
        for place, head in enumerate(range(*own.queries)):
            assert own.keys[0] + place // (count // keys) == head // group


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(OutlierError, match="4 attention heads cannot be split over 5 ranks"):
        heads_of(0, 5, 4, 2)


@pytest.mark.parametrize("width", [13824 // 16, 80, 96, 33])
@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_packed_rows_are_rows_of_the_same_layout(width: int, size: int) -> None:
    # h is what gate and up give: the sum over ranks of down times h is that of one process.
    rng = np.random.default_rng(width)
    trits = rng.integers(-1, 2, (6, width)).astype(np.int8)
    h = rng.integers(-9, 10, width)
    packed = ternary_rows.pack_rows(trits)
    nbytes = row_bytes(width)
    total = np.zeros(6, np.int64)
    covered = np.zeros(width, int)
    for start, stop in spans(nbytes, size, 16):
        own = -(-(stop - start) // 16) * 16
        part = np.full((6, own), 128, np.uint8)
        part[:, : stop - start] = packed[:, start:stop]
        columns = np.full(5 * own, -1)
        for n in range(5):
            for byte in range(start, stop):
                if n * nbytes + byte < width:
                    columns[n * own + byte - start] = n * nbytes + byte
        there = columns >= 0
        local = ternary_rows.unpack_rows(part, 5 * own)
        total += local[:, there].astype(np.int64) @ h[columns[there]]
        assert not local[:, ~there].any()
        covered[columns[there]] += 1
    assert (covered == 1).all()
    np.testing.assert_array_equal(total, trits.astype(np.int64) @ h)


def test_a_rank_reads_its_columns_and_rows_only(tier: Path) -> None:
    tensors = read_shards(tier)
    config = describe(raw_config(tier))
    for rank in range(3):
        split = TensorParallel(tensors, config, rank, 3)
        for name, cut in split.cuts.items():
            tensor = tensors[name]
            whole = mx.array(tensor.read())
            expected = cut.of(whole)
            assert mx.array_equal(cut.read(tensor), expected), name
            assert split.shapes()[name].shape == expected.shape


def test_a_cut_fills_what_no_run_covers() -> None:
    cut = Cut(-1, (Run(1, 3), Run(4, 5, 3)), 5, fill=7)
    assert cut.of(mx.arange(6)[None]).tolist() == [[1, 2, 7, 4, 7]]


# -- the same results -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_the_logits_of_one_process(size: int, tier: Path, tmp_path: Path) -> None:
    assert_same_logits(logits_of_ranks(size, tmp_path, tier), tier)


@pytest.mark.slow
def test_quantized_heads_that_divide_groups_give_the_same_logits(
    place: Path, tmp_path: Path
) -> None:
    # A head has 16 columns, and a group 64.
    assert_same_logits(logits_of_ranks(2, tmp_path, place / "tier"), place / "tier")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--pipeline",)])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_the_same_text_and_only_the_first_talks(
    size: int, how: tuple[str, ...], demo: Path, tmp_path: Path
) -> None:
    words = ("generate", demo, "--prompt", "How do I find Vega?", "--max-tokens", 12)
    found = run_ranks(size, tmp_path, *words, *how)
    assert found[0].out == run(*words).out
    assert "prompt: " in found[0].err


# -- layers, and paging ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "budgets", "everywhere", "expected"),
    [
        ([1] * 8, [10, 10], 0, [(0, 4), (4, 8)]),
        ([1] * 8, [30, 10], 0, [(0, 6), (6, 8)]),
        ([1] * 8, [14, 6], 2, [(0, 6), (6, 8)]),
        ([1, 1, 6], [10, 10, 10], 0, [(0, 1), (1, 2), (2, 3)]),
        ([9, 1, 1], [10, 10], 0, [(0, 1), (1, 3)]),
        ([1] * 4, [100, 1, 1], 50, [(0, 2), (2, 3), (3, 4)]),
    ],
)
def test_layers_are_divided_by_memory(
    layers: list[int], budgets: list[int], everywhere: int, expected: list[tuple[int, int]]
) -> None:
    assert divided(layers, budgets, everywhere) == expected


def test_more_ranks_than_layers_are_refused() -> None:
    with pytest.raises(OutlierError, match="2 layers cannot be divided between 3 ranks"):
        divided([1, 1], [1, 1, 1])


@pytest.fixture(scope="session")
def wide_tier(library: Library) -> Path:
    """A float32 tier of which a half is many times larger than what is on every rank."""
    dims = {"hidden": 256, "intermediate": 1024, "expert_intermediate": 800}
    return library.tier(library.overlay(**dims, heads=8, kv_heads=4, experts=8))


def share(model: Path, rank: int, monkeypatch: pytest.MonkeyPatch, *, pipeline: bool) -> Any:
    """What the plan counts for one of two ranks of equal memory."""
    with monkeypatch.context() as patch:
        patch.setattr(ranks_module, "_ranks", Ranks(rank, 2, pipeline))
        patch.setattr(pipeline_module, "gathered", lambda text: [text, text])
        pipeline_module.stages.cache_clear()
        found = needs_of(model, on_cpu=True)
    pipeline_module.stages.cache_clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [False, True])
def test_a_rank_takes_its_share_of_memory_and_computes_the_same(
    pipeline: bool, wide_tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = logits_of_ranks(2, tmp_path, wide_tier, pipeline=pipeline)
    assert_same_logits(found, wide_tier)
    whole = needs_of(wide_tier, on_cpu=True).weights
    for rank, own in enumerate(found):
        needs = share(wide_tier, rank, monkeypatch, pipeline=pipeline)
        active, peak = own["loaded"]
        assert 0.85 * needs.weights < active <= needs.weights < 0.6 * whole
        # What is cut at a time comes on top: how much depends on which of MLX's threads is first.
        assert peak < needs.weights + 6e6 < 0.8 * whole
        assert 0 < needs.replicated < 0.1 * needs.weights


@pytest.mark.slow
def test_parts_of_experts_are_paged(tier: Path, tmp_path: Path) -> None:
    found = logits_of_ranks(2, tmp_path, tier, expert_memory="50%")
    assert_same_logits(found, tier)
    assert all(rank["paged"] for rank in found)


# -- commands -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_perplexity_is_that_of_one_process(place: Path, tmp_path: Path) -> None:
    of = ("perplexity", place / "tier", "--text", place / "text.txt")
    words = (*of, "--window", 32, "--windows", 2, "--json")
    found, expected = run_ranks(2, tmp_path, *words)[0].json, run(*words).json
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
def test_bench_runs_on_a_pipeline(place: Path, tmp_path: Path) -> None:
    words = ("-p", 8, "-g", 4, "-n", 1, "--json", "--pipeline")
    found = run_ranks(2, tmp_path, "bench", place / "tier", *words)[0].json
    assert found["generation_tokens_per_s"]["median"] > 0


@pytest.mark.slow
def test_a_chat_goes_on_where_the_first_rank_reads_a_line(place: Path, tmp_path: Path) -> None:
    words = ("chat", place / "tier", "--max-tokens", 6, "--temp", 0)
    lines = "the cat\nthe dog\n/exit\n"
    results = ended(start_ranks(2, tmp_path, SCRIPT, *words), lines)
    assert [result.code for result in results] == [0, 0], results
    assert results[0].out == run(*words, input=lines).out
    assert results[1].both == ""


@pytest.mark.slow
def test_eval_scores_as_one_process_does(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "the cat", "answer": "x"}, {"question": "the dog sat", "answer": "y"}]
    write_task(tmp_path / "tasks", "short", rows, GENERATE % '"\\n"')
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
    score = metrics(bits_per_byte="-bits_per_byte")
    write_task(tmp_path / "tasks", "rolling", rows, rolling + score)
    words = ("eval", place / "tier", "--tasks", tmp_path / "tasks", "--json")
    found, expected = run_ranks(2, tmp_path, *words)[0].json, run(*words).json
    assert len(found["results"]) == 2
    for one, other in zip(found["results"], expected["results"], strict=True):
        assert one["metric"] == other["metric"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)


@pytest.mark.slow
def test_requests_at_the_same_time_get_the_answers_of_one_process(
    place: Path, tmp_path: Path
) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": heat}
        | {"seed": 7, "model": "tier"}
        for text, heat in (("the cat", 0), ("the dog sat on", 0.9))
    ]
    started = start_ranks(2, tmp_path, SCRIPT, "serve", place / "tier", "--port", 0)
    try:
        assert started[0].stderr is not None
        url = next(line for line in started[0].stderr if "serving" in line).split()[3]
        with ThreadPoolExecutor() as pool:
            first = list(pool.map(partial(answer, url), bodies))
        again = [answer(url, body) for body in bodies]  # with kept caches
        started[0].terminate()
        assert [process.wait(30) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    with running(place / "tier") as server:
        expected = [answer(server.server.url, body) for body in bodies]
    assert first == again == expected


def answer(url: str, body: dict[str, Any]) -> str:
    """The text that a server answers."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", data, kind)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


# -- ranks that fail ------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_with_other_options_or_another_model_end_all(
    place: Path, small_tier: Path, tmp_path: Path
) -> None:
    words = (SCRIPT, "generate", place / "tier", "--prompt", "x")
    for other, *said in (
        ((*words, "--max-tokens", 3), "rank 1 differs from rank 0 in options", "--max-tokens 3"),
        ((SCRIPT, "generate", tmp_path / "no", "--prompt", "x"), "rank 1: ", "no such folder"),
    ):
        started = start_ranks(2, tmp_path, *words, each={1: other})
        assert_ended(ended(started), *said)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/tier").symlink_to(place / "tier")
    (tmp_path / "b/tier").symlink_to(small_tier)
    shells = {
        rank: ("sh", "-c", f"cd {tmp_path}/{folder} && exec {SCRIPT} generate ./tier --prompt x")
        for rank, folder in enumerate("ab")
    }
    assert_ended(ended(start_ranks(2, tmp_path, each=shells)), "in model", "copy the model")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--pipeline",)])
def test_a_rank_that_dies_ends_all(how: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    words: tuple[object, ...] = ("generate", place / "tier", "--prompt", "hi", *how)
    words = (*words, "--max-tokens", 4000, "--max-kv-size", 64, "--ignore-chat-template")
    started = start_ranks(2, tmp_path, SCRIPT, *words)
    assert started[0].stderr is not None and started[0].stdout is not None
    started[0].stderr.readline()  # what all need of memory: then the model is loaded
    started[0].stdout.read(1)
    started[1].kill()
    results = ended(started)
    assert [result.code for result in results] == [1, -9]
    assert results[0].err.count("\n") == 1
    assert "the connection to another rank was lost" in results[0].err


@pytest.mark.slow
def test_signals_end_a_rank_that_waits_for_others(place: Path, tmp_path: Path) -> None:
    long = ("--max-tokens", 4000, "--max-kv-size", 64, "--ignore-chat-template")
    words = (SCRIPT, "generate", place / "tier", "--prompt", "hi", *long)
    started = start_ranks(2, tmp_path, *words)
    assert started[0].stdout is not None
    started[0].stdout.read(1)
    started[1].send_signal(signal.SIGSTOP)  # it answers no more
    started[0].terminate()
    assert started[0].wait(10) == 128 + signal.SIGTERM
    started[1].kill()
    assert ended(started)[0].err.splitlines()[1:] == ["terminated"]
    # Others that never come: MLX holds Python's lock meanwhile.
    alone = start_ranks(2, tmp_path, *words, each={0: ("sleep", 60)})
    time.sleep(8)
    alone[1].terminate()
    assert alone[1].wait(5) == -signal.SIGTERM
    alone[0].kill()
    ended(alone)


UNLUCKY = """
import sys
from outlier_mlx.engine import loading

def load(*_, **__):
    raise RuntimeError("the GPU is out of memory")

loading.load = load
from outlier_mlx.cli import main
main()
"""


@pytest.mark.slow
def test_what_mlx_raises_on_one_rank_is_told(place: Path, tmp_path: Path) -> None:
    words = ("generate", place / "tier", "--prompt", "x")
    unlucky = (sys.executable, "-c", UNLUCKY, *words)
    results = ended(start_ranks(2, tmp_path, SCRIPT, *words, each={1: unlucky}))
    assert [result.code for result in results] == [1, 1]
    said = "error: rank 1: RuntimeError: the GPU is out of memory"
    assert results[0].err.splitlines()[-1] == said


@pytest.mark.slow
def test_a_server_that_waits_for_clients_notices_a_rank_that_ends(
    place: Path, tmp_path: Path
) -> None:
    started = start_ranks(2, tmp_path, SCRIPT, "serve", place / "tier", "--port", 0)
    assert started[0].stderr is not None
    assert any("conversations" in line for line in started[0].stderr)
    started[1].terminate()
    results = ended(started)
    assert [result.code for result in results] == [1, 128 + signal.SIGTERM]
    assert results[0].err == f"error: {LOST}\n"


def test_alone_nothing_is_sent_and_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    x = mx.arange(3)
    assert connect() == Ranks() and agreed(x) is x and shared([1]) == [1] and least(5) == 5
    assert gathered("text") == ["text"]


def test_a_pipeline_needs_a_launcher(small_tier: Path) -> None:
    result = run("generate", small_tier, "--prompt", "x", "--pipeline", code=None)
    assert_refused(result, "--pipeline is for several processes: start them with mlx.launch")
