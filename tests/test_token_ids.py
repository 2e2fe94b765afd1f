"""Tokens that the embedding has no row for: MLX would read foreign memory, or end the process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError
from outlier_mlx.measure.outliers import measure
from outlier_mlx.measure.perplexity import compare
from outlier_mlx.measure.routing import observe_routing
from outlier_mlx.measure.tuning import tune
from outlier_mlx.models.token_ids import check_ids, check_tokenizer
from tests.damage import edit_json
from tests.library import TEXT, Library
from tests.plain_models import SIZES, write_model
from tests.program import assert_refused, run
from tests.serving import Running, running

ROWS = 300
FAR = 1_000_000
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
REFUSED = f"has the token {ROWS}, but the model's embedding has {ROWS} rows"


def add_token(folder: Path, number: int, text: str = "<far>") -> Path:
    """An added token of this id."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": number, "content": text, "special": True, **FLAGS}
    edit_json(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], added])
    return folder


def surround(folder: Path, number: int) -> Path:
    """A token of this id before every text, as a post-processor adds it."""
    special = {"<far>": {"id": "<far>", "ids": [number], "tokens": ["<far>"]}}
    single = [{"SpecialToken": {"id": "<far>", "type_id": 0}}]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    processor = {"single": single, "pair": pair, "special_tokens": special}
    edit_json(folder / "tokenizer.json", post_processor={"type": "TemplateProcessing"} | processor)
    return folder


# The files of a tokenizer


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 9}}}}, "'b' has id 9"),
    "unigram": ({"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 10}}}, "has id 9"),
    "added": (
        {"tokenizer.json": {"added_tokens": [{"id": 9, "content": "<x>"}]}},
        "tokenizer.json: the token '<x>' has id 9",
    ),
    "padding": ({"tokenizer.json": {"padding": {"pad_id": 9, "pad_token": "<p>"}}}, "'<p>' has id"),
    "template": (
        {
            "tokenizer.json": {
                "post_processor": {
                    "type": "Sequence",
                    "processors": [{"special_tokens": {"<s>": {"id": "<s>", "ids": [0, 9]}}}],
                }
            }
        },
        "'<s>' has id 9",
    ),
    "bert": ({"tokenizer.json": {"post_processor": {"sep": ["</s>", 9]}}}, "'</s>' has id 9"),
    "added-file": ({"tokenizer.json": {}, "added_tokens.json": {"<p>": 9}}, "added_tokens.json: "),
    "decoder": (
        {"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<d>"}}}},
        "tokenizer_config.json: the token '<d>' has id 9",
    ),
    "slow": ({"vocab.json": {"a": 9}}, "vocab.json: the token 'a' has id 9"),
    "words": ({"vocab.txt": "a\n" * 10}, "vocab.txt: the token 'a' has id 9"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_numbers_tokens_counts(name: str, tmp_path: Path):
    files, words = FILES[name]
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / file).write_text(text)
    check_tokenizer(tmp_path, 10)
    with pytest.raises(CheckpointError, match=f"{words}.*9 rows, numbered from 0"):
        check_tokenizer(tmp_path, 9)


def test_what_numbers_nothing_is_no_fault(tmp_path: Path):
    check_tokenizer(tmp_path, 1)
    odd = {"model": 1, "added_tokens": "x", "padding": [], "post_processor": {"processors": 3}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(odd))
    check_tokenizer(tmp_path, 1)


def test_ids_of_a_prompt():
    check_ids([0, 9], 10)
    check_ids([10**9], None)
    for number in (10, -1, 2**31):
        with pytest.raises(OutlierError, match=f"the text has the token {number}, "):
            check_ids([0, number], 10, "the text")


# Models


def test_a_tier_with_such_a_tokenizer_is_not_loaded(small_tier: Path, tmp_path: Path):
    tier = shutil.copytree(small_tier, tmp_path / "tier")
    add_token(tier, 288, "<x>")
    result = run("generate", tier, "--prompt", "the", "--quiet", code=None)
    assert_refused(result, "tokenizer.json: the token '<x>' has id 288", "has 288 rows")
    surround(shutil.copytree(small_tier, tmp_path / "other"), 10**6)
    with pytest.raises(CheckpointError, match=r"'<far>' has id 1000000, but .* 288 rows"):
        outlier_mlx.load(tmp_path / "other")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that this project does not describe, with a placeholder without a row."""
    config = SIZES | {"model_type": "olmo2", "eos_token_id": [0, FAR]}
    return add_token(write_model(tmp_path_factory.mktemp("foreign") / "model", config), ROWS)


def test_a_model_of_another_family_is_warned_of(foreign: Path):
    with pytest.warns(CheckpointWarning, match=f"'<far>' has id {ROWS}, .* {ROWS} rows"):
        _, tokenizer = outlier_mlx.load(foreign)
    ends = tokenizer.eos_token_ids
    assert 0 in ends and max(ends) < ROWS  # MLX would use others as an index
    done = run("generate", foreign, "--prompt", "the", "-m", 2, "--xtc-probability", 1, "--temp", 1)
    assert "<far>" in done.err and "2 tokens" in done.err


@pytest.mark.parametrize(
    "line",
    [
        "generate {} --prompt <far> --quiet",
        "generate {} --prompt <far> --quiet --ignore-chat-template",
        "chat {} --quiet",
        "perplexity {} --text text.txt --window 16 --quiet",
        "outliers {} --text text.txt --length 16 --sequences 1 --quiet --out out",
    ],
)
def test_no_prompt_with_such_a_token_reaches_the_model(
    line: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(f"{TEXT}<far>{TEXT}"[len(TEXT) - 9 :])
    result = run(*line.format(foreign).split(), input="<far>\n", code=None)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("error: ") and REFUSED in result.err


def test_nor_a_text_of_tokens_from_elsewhere(small_tier: Path):
    model, _ = outlier_mlx.load(small_tier)
    texts = [[1, 2], [3, 288], [4, 5]]
    for measured in (compare, observe_routing, tune, measure):
        with pytest.raises(OutlierError, match=r"the text has the token 288, .* has 288 rows"):
            measured(model, texts)


def test_nor_one_of_a_task(foreign: Path):
    from outlier_mlx.measure.eval_model import HarnessModel

    with pytest.warns(CheckpointWarning):
        model, tokenizer = outlier_mlx.load(foreign)
    how: dict[str, Any] = {"max_length": 64, "batch_size": 1, "max_tokens": 2, "chat": False}
    adapter = HarnessModel(
        model, tokenizer, **how, stages=lambda *_: nullcontext(lambda done, total: None)
    )
    asked = [SimpleNamespace(args=("the <far>", {"until": ["x"]}))]
    with pytest.raises(OutlierError, match=f"a task's text {REFUSED}"):
        adapter.generate_until(asked)
    with pytest.raises(OutlierError, match=f"a task's text {REFUSED}"):
        adapter.loglikelihood([SimpleNamespace(args=("the", "<far>"))])
    assert len(adapter.generate_until([SimpleNamespace(args=("the", {"until": ["x"]}))])) == 1


def test_the_teacher_of_alphas_has_rows_of_its_own(small_tier: Path, library: Library):
    model, _ = outlier_mlx.load(small_tier)
    teacher, _ = outlier_mlx.load(
        library.tier(library.overlay(layers=2, moe_layers=(1,), vocab=200))
    )
    with pytest.raises(OutlierError, match="the token 250, but the model's embedding has 200 rows"):
        tune(model, [[1, 2], [3, 250], [4, 5]], teacher=teacher)


# The server


@pytest.fixture(scope="module")
def server(foreign: Path) -> Iterator[Running]:
    with pytest.warns(CheckpointWarning), running(foreign) as started:
        yield started


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_one_request_does_not_end_the_server(path: str, stream: bool, server: Running):
    def body(text: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        prompt = {"messages": messages} if "chat" in path else {"prompt": text}
        return prompt | {"max_tokens": 2, "stream": stream}

    status, _, answer = server.post(body("a <far> b"), path)
    assert status == 400 and REFUSED in answer["error"]["message"]
    assert server.status(body("a b"), path) == 200


@pytest.mark.parametrize("prompt", [[1, ROWS], [[1, 2], [3, ROWS]], [-1], [2**31], [2**70]])
def test_a_prompt_of_tokens(prompt: list[Any], server: Running):
    status, _, answer = server.post({"prompt": prompt, "max_tokens": 2}, "/v1/completions")
    assert status == 400 and answer["error"]["message"]
    ids = {"prompt": [1, ROWS - 1], "max_tokens": 2}
    assert server.post(ids, "/v1/completions")[0] == 200, server.post(ids, "/v1/completions")
