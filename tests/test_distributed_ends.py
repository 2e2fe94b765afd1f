"""What ends several processes that run one model, and how they say it."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outlier_mlx.engine.distributed.handshake import checksum
from outlier_mlx.engine.distributed.launcher import LOST, launched_rank
from outlier_mlx.measure import bench as bench_module
from outlier_mlx.storage.shards import read_shards
from tests.evaluating import GENERATE, write_task
from tests.library import Library
from tests.program import SCRIPT, run
from tests.ranks import assert_ended, ended, run_python_ranks, run_ranks, start_ranks
from tests.test_distributed import LOGITS, PROMPT, logits_here
from tests.test_ternary_model import CASES

LONG = ("--prompt", "the cat sat", "--ignore-chat-template", "--max-tokens", 40)

UNREADABLE = """
from outlier_mlx.engine.paging import reading
from outlier_mlx.cli import main

real, count = reading.Chunk._fill, 0

def fill(self, *arguments):
    global count
    count += 1
    if count > 40:
        raise self.failed("cannot be read: Input/output error")
    return real(self, *arguments)

reading.Chunk._fill = fill
main()
"""

OUT_OF_MEMORY = """
from outlier_mlx.engine import steps
from outlier_mlx.cli import main

real, count = steps.Steps.step, 0

def step(self):
    global count
    count += 1
    if count == 3:
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
    return real(self)

steps.Steps.step = step
main()
"""


@pytest.fixture(scope="session")
def four_layers(library: Library) -> Path:
    """A float32 tier with experts in each of four layers, so that half of them can be paged."""
    return library.tier(library.overlay(layers=4, moe_layers=(0, 1, 2, 3), experts=8))


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--pipeline",)])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_that_one_rank_cannot_read_ends_all_with_the_reason(
    rank: int, how: tuple[str, ...], four_layers: Path, tmp_path: Path
) -> None:
    words = ("generate", four_layers, *LONG, "--expert-memory", "50%", *how)
    broken = (sys.executable, "-c", UNREADABLE, *words)
    results = ended(start_ranks(2, tmp_path, SCRIPT, *words, each={rank: broken}))
    assert_ended(results, f"error: rank {rank}: {four_layers}", "cannot be read: Input/output")


@pytest.mark.slow
def test_a_server_on_ranks_of_which_one_cannot_read_ends_with_the_reason(
    four_layers: Path, tmp_path: Path
) -> None:
    words = ("serve", four_layers, "--port", 0, "--expert-memory", "50%")
    broken = (sys.executable, "-c", UNREADABLE, *words)
    started = start_ranks(2, tmp_path, SCRIPT, *words, each={1: broken})
    assert started[0].stderr is not None
    url = next(line for line in started[0].stderr if "serving" in line).split()[3]
    body = json.dumps({"prompt": "the cat sat", "max_tokens": 40}).encode()
    request = urllib.request.Request(
        f"{url}/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(OSError):
        urllib.request.urlopen(request, timeout=60).read()
    assert_ended(ended(started), f"error: rank 1: {four_layers}", "cannot be read")


@pytest.mark.slow
def test_each_rank_of_a_pipeline_pages_and_reads_early(four_layers: Path, tmp_path: Path) -> None:
    words = ("generate", four_layers, *LONG)
    results = run_ranks(2, tmp_path, *words, "--expert-memory", "50%", "--pipeline")
    assert results[0].out == run(*words).out
    assert "look-ahead foresaw" in results[0].err  # the layers of rank 1 have other numbers there


@pytest.mark.slow
def test_what_the_others_cannot_hear_of_a_rank_says_itself(
    small_tier: Path, tmp_path: Path
) -> None:
    words = ("generate", small_tier, *LONG)
    unlucky = (sys.executable, "-c", OUT_OF_MEMORY, *words)
    results = ended(start_ranks(2, tmp_path, SCRIPT, *words, each={1: unlucky}))
    assert [result.code for result in results] == [1, 1]
    said = "error: rank 1: RuntimeError: [malloc] Unable to allocate 99 bytes.\n"
    assert results[1].both.startswith(said) and "Traceback" not in results[1].both
    assert results[0].err.splitlines()[-1] == f"error: {LOST}"
    lost = (SCRIPT, *words)
    alone = ("sh", "-c", 'MLX_HOSTFILE=/none.json exec "$@"', "sh", *lost)
    started = start_ranks(2, tmp_path, *lost, each={0: ("true",), 1: alone})
    said = "error: rank 1: the other ranks cannot be reached: "
    assert ended(started)[1].err.startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [("--prompt-lookup",), ("--num-draft-tokens", 2), ("--draft-model", "x")],
)
def test_options_without_effect_on_ranks_are_refused(
    option: tuple[object, ...], small_tier: Path, tmp_path: Path
) -> None:
    words = (SCRIPT, "generate", small_tier, *LONG, *option)
    assert_ended(ended(start_ranks(2, tmp_path, *words)), f"{option[0]}: not with several ranks")


def test_a_process_that_has_no_others_beside_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert launched_rank() == 0  # MLX says that there is no file
    hosts.write_text("\n")  # what mlx.launch writes for one process
    assert launched_rank() is None
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    assert launched_rank() == 0


# -- what ranks have in common --------------------------------------------------------------------


def test_weights_and_texts_that_differ_have_another_checksum(
    small_tier: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_tier, model)
    (model / "README.md").write_text("other words")
    before = checksum(small_tier)
    assert checksum(model) == before
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes() + b"\n")
    assert checksum(model) != before
    shutil.copy(small_tier / "tokenizer.json", model)
    assert checksum(model) == before
    tensor = next(iter(read_shards(model).values()))
    with tensor.file.open("r+b") as file:  # the header stays
        file.seek(tensor.offset)
        byte = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([byte ^ 1]))
    assert checksum(model) != before
    alphas = [tmp_path / name for name in ("a.json", "b.json")]
    for alpha in alphas:
        alpha.write_text(alpha.name)
    assert checksum(alphas[0]) != checksum(alphas[1])


@pytest.mark.slow
def test_a_reason_is_told_with_tracebacks_too(small_tier: Path, tmp_path: Path) -> None:
    words = (SCRIPT, "generate", small_tier, *LONG, "--debug")
    other = (SCRIPT, "generate", tmp_path / "no", *LONG, "--debug")
    results = ended(start_ranks(2, tmp_path, *words, each={1: other}))
    assert [result.code for result in results] == [1, 1]
    said = f"PeerError: rank 1: {tmp_path / 'no'}: no such folder"
    assert said in results[0].err.splitlines()[-1]


def in_folders(tmp_path: Path, *words: object) -> dict[int, tuple[object, ...]]:
    """What ranks run, each in its own folder, `a` or `b`."""
    run_in = ("sh", "-c", 'cd "$0" && exec "$@"')
    return {rank: (*run_in, tmp_path / name, SCRIPT, *words) for rank, name in enumerate("ab")}


@pytest.mark.slow
def test_alphas_or_tasks_that_differ_end_all(small_tier: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "alpha.json").write_text(f'{{"of": "{name}"}}')
        rows = [{"question": f"the cat {name}", "answer": "x"}]
        write_task(tmp_path / name / "tasks", "short", rows, GENERATE % '"\\n"')
    words = in_folders(tmp_path, "generate", small_tier, *LONG, "--alpha", "alpha.json")
    results = ended(start_ranks(2, tmp_path, each=words))
    assert_ended(results, "rank 1 differs from rank 0 in model")
    words = in_folders(tmp_path, "eval", small_tier, "--tasks", "./tasks")
    results = ended(start_ranks(2, tmp_path, each=words))
    assert_ended(results, "rank 1 differs from rank 0 in what the tasks ask: copy the task files")


# -- three and four -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("size", "how"), [(3, ()), (4, ("--pipeline",))])
def test_more_ranks_measure_what_one_process_does(
    size: int, how: tuple[str, ...], four_layers: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/text.txt").write_text("the cat sat on the mat " * 20)  # rank 0 alone has it
    words = ("perplexity", four_layers, "--text", "text.txt", "--window", 32, "--windows", 2)
    each = in_folders(tmp_path, *words, "--json", *how)
    each |= dict.fromkeys(range(2, size), each[1])
    results = ended(start_ranks(size, tmp_path, each=each))
    assert [result.code for result in results] == [0] * size, results
    alone = ("perplexity", four_layers, "--text", tmp_path / "a/text.txt", *words[4:], "--json")
    assert results[0].json["loss"] == pytest.approx(run(*alone).json["loss"], abs=1e-5)
    bench = ("bench", four_layers, "-p", 8, "-g", 4, "-n", 1, "-b", 2, "--json")
    assert run_ranks(size, tmp_path, *bench, *how)[0].json["prompt_tokens_per_s"]["median"] > 0


@pytest.mark.slow
def test_three_ranks_score_tasks_as_one_process_does(four_layers: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "the cat", "answer": "x"}, {"question": "the dog sat", "answer": "y"}]
    write_task(tmp_path / "tasks", "short", rows, GENERATE % '"\\n"')
    words = ("eval", four_layers, "--tasks", tmp_path / "tasks", "--json")
    found = run_ranks(3, tmp_path, *words, "--pipeline")[0].json["results"]
    expected = run(*words).json["results"]
    assert [one["value"] for one in found] == [one["value"] for one in expected]


def test_the_last_rank_says_how_fast_a_batch_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first ranks of a pipeline are done with a prompt before the others.
    stats = SimpleNamespace(prompt_tps=900.0, generation_tps=2.0)
    given: Any = SimpleNamespace(stats=stats)
    monkeypatch.setattr(bench_module, "batch_generate", lambda *_, **__: given)
    monkeypatch.setattr(bench_module, "planned_step", lambda _, most: most)
    monkeypatch.setattr(bench_module, "gathered", lambda text: [text, "30.0 4.0"])
    options = bench_module.BenchOptions(8, 4, 2)
    model: Any = None
    found = bench_module._generate(model, model, [[1], [2]], options)
    assert (found.prompt_tps, found.generation_tps) == (30.0, 4.0)


# -- ternary models of others ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen3, groups, tied", "qwen2, rotated", "llama, plain embedding", "bitnet"]
)
def test_layers_of_ternary_models_are_divided(name: str, library: Library, tmp_path: Path) -> None:
    model = library.ternary(**CASES[name]).folder
    words = json.dumps(PROMPT), json.dumps({"pipeline": True})
    for rank in run_python_ranks(2, tmp_path, LOGITS, model, *words):
        expected = logits_here(model)
        np.testing.assert_allclose(rank["logits"], expected, rtol=0, atol=2e-6 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("qwen3, groups, tied", (), "a ternary model is divided by layers alone: use --pipeline"),
        ("qwen3_5", ("--pipeline",), "a model of the type qwen3_5_text cannot be split over ranks"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    name: str, how: tuple[str, ...], said: str, library: Library, tmp_path: Path
) -> None:
    words = ("generate", library.ternary(**CASES[name]).folder, *LONG, *how)
    assert_ended(ended(start_ranks(2, tmp_path, SCRIPT, *words)), said)
