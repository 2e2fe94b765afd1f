"""The command eval: scores of local tasks are those that a NumPy model of the same weights has."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import outlier_mlx
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load_tokenizer
from tests.affine import with_quantized_base
from tests.builders import write_base, write_overlay
from tests.engine import tier_of
from tests.evaluating import BASE_DIMS, DIMS, GENERATE, metrics, write_task
from tests.folders import copy_writable
from tests.program import run
from tests.reference import ReferenceModel, forward, greedy, with_alphas
from tests.reference_reader import read_overlay

LONGEST = 512  # max_position_embeddings of what the builders write
QUESTIONS = ["The cat sat on the", "Why?", "", "A blank ends this ", "One and one is", "So"]
CHOICES = [
    ["mat", "log"],
    ["so", "no", "never"],
    ["it", "be"],
    ["dog", "owl"],
    ["2", "3"],
    ["a", "b"],
]
GREEDY = "What comes next"  # continued by the likeliest tokens


pytestmark = pytest.mark.usefixtures("offline")


@dataclass(frozen=True)
class Case:
    """A model on disk, and what it computes by the reference."""

    folder: Path
    reference: ReferenceModel
    nbytes: int

    def encode(self, text: str) -> list[int]:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json")).encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json")).decode(tokens)

    def answer(self, prompt: str, length: int = 6) -> str:
        tokens, _ = greedy(self.reference, self.encode(prompt), length)
        text = list(takewhile(lambda token: token not in (0, 2), tokens))  # these end it
        assert 1 not in text  # <|im_start|>, which is not shown
        return self.decode(text)

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood by the harness's rules, and whether it is the greedy continuation."""
        blanks = len(context) - len(context.rstrip())
        head = self.encode(context[: len(context) - blanks]) or [0]
        tail = self.encode(context[len(context) - blanks :] + continuation)
        return log_likelihood(self.reference, head, tail)


def log_likelihood(
    reference: ReferenceModel, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    logits = forward(reference, [*context, *continuation][:-1])[-len(continuation) :]
    logits = logits.astype(np.float64)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = normal[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((normal.argmax(-1) == continuation).all())


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the headers' offsets."""
    total = 0
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        total += len(data) - 8 - int.from_bytes(data[:8], "little")
    return total


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A tier, the bare base it is made from, and a plain quantized MLX model of that."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("models")
    overlay = write_overlay(folder / "overlay", **DIMS)
    write_base(folder / "base", **BASE_DIMS)
    convert(str(folder / "base"), str(folder / "mlx"), quantize=True, q_group_size=32, q_bits=8)
    tier_of(overlay.path, None, folder / "tier")
    whole = read_overlay(overlay.path)
    base = with_alphas(whole, lambda _, alpha: 0 * alpha)
    references = {"tier": whole, "base": base, "mlx": with_quantized_base(base, 32, 8)}
    return {
        name: Case(folder / name, reference, tensor_bytes(folder / name))
        for name, reference in references.items()
    }


def write_tasks(folder: Path, case: Case) -> Path:
    """One of each kind. Every third answer is wrong; the others are what the model writes."""
    rows: list[dict[str, Any]] = [
        {"question": question, "choices": choices, "answer": number % len(choices)}
        for number, (question, choices) in enumerate(zip(QUESTIONS, CHOICES, strict=True))
    ]
    write_task(
        folder,
        "choices",
        rows,
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n' + metrics(acc="mean", acc_norm="mean"),
    )
    endings = [{"text": question, "ending": " end"} for question in QUESTIONS]
    endings += [{"text": GREEDY, "ending": case.answer(GREEDY, 2)}]
    write_task(
        folder,
        "cloze",
        endings,
        'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{ending}}"\n'
        + metrics(perplexity="-perplexity", acc="mean"),
    )
    write_task(
        folder,
        "rolling",
        [{"text": text} for text in TEXTS],
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        + metrics(word_perplexity="-weighted_perplexity", bits_per_byte="-bits_per_byte"),
    )
    prompts = [f"{question} {number}:" for number, question in enumerate(QUESTIONS)]
    answers = [case.answer(prompt) for prompt in prompts]
    stop = next(answer[2] for answer in answers if len(answer) > 3)
    cut = [answer.partition(stop)[0] for answer in answers]
    wrong = ["wrong answer" if n % 3 == 2 else answer for n, answer in enumerate(cut)]
    pairs = zip(prompts, wrong, strict=True)
    generated = [{"question": prompt, "answer": answer} for prompt, answer in pairs]
    write_task(folder, "answers", generated, GENERATE % json.dumps(stop))
    return folder


LONG = "the heron stands in the water and waits " * 15 + "still"  # longer than the model's context
TEXTS = ["A short text.", LONG, "Another one, of two lines.\nThis is the second."]


def rolling(case: Case, text: str) -> float:
    tokens = case.encode(text)
    total, _ = log_likelihood(case.reference, [0], tokens[:LONGEST])
    if len(tokens) > LONGEST:
        # The rest with as much before it as the model was made for.
        rest = len(tokens) - LONGEST
        total += log_likelihood(case.reference, tokens[-LONGEST - 1 : -rest], tokens[-rest:])[0]
    return total


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def expected(case: Case) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    """Value, standard error (None: the harness has none) and n by task and metric."""
    acc: list[float] = []
    acc_norm: list[float] = []
    for number, (question, choices) in enumerate(zip(QUESTIONS, CHOICES, strict=True)):
        scores = np.array([case.score(question, f" {choice}")[0] for choice in choices])
        lengths = np.array([len(choice) for choice in choices])
        for values, kept in ((scores, acc), (scores / lengths, acc_norm)):
            assert np.diff(np.sort(values))[-1] > 1e-3  # else use other choices
            kept.append(float(values.argmax() == number % len(choices)))
    cloze = [case.score(question, " end") for question in QUESTIONS]
    cloze.append(case.score(GREEDY, case.answer(GREEDY, 2)))
    assert [found for _, found in cloze].count(True) == 1
    totals = sum(rolling(case, text) for text in TEXTS)
    words = sum(len(text.split()) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    return {
        ("choices", "acc"): (*mean_and_error(acc), 6),
        ("choices", "acc_norm"): (*mean_and_error(acc_norm), 6),
        ("cloze", "perplexity"): (math.exp(-np.mean([score for score, _ in cloze])), None, 7),
        ("cloze", "acc"): (*mean_and_error([float(found) for _, found in cloze]), 7),
        ("rolling", "word_perplexity"): (math.exp(-totals / words), None, 3),
        ("rolling", "bits_per_byte"): (-totals / size / math.log(2), None, 3),
        ("answers", "exact_match"): (*mean_and_error([1, 1, 0, 1, 1, 0]), 6),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tier", "base", "mlx"])
def test_scores_are_the_references(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    case = cases[name]
    tasks = write_tasks(tmp_path / "tasks", case)
    done = run("eval", case.folder, "--tasks", tasks, "--batch-size", 2, "--json")
    found = done.json
    assert found["bytes_in_memory"] == case.nbytes and found["gb"] == case.nbytes / 1e9
    assert (found["model"], found["config"]["dtype"]) == (name, "float32")
    wanted = expected(case)
    rows = {(row["task"], row["metric"]): row for row in found["results"]}
    assert rows.keys() == wanted.keys()
    for key, (value, error, n) in wanted.items():
        row = rows[key]
        assert row["n"] == n, key
        assert row["value"] == pytest.approx(value, rel=1e-4), key
        if key[1] == "perplexity":  # its error is drawn
            assert row["stderr"] > 0
        else:
            assert row["stderr"] == (error if error is None else pytest.approx(error)), key
        higher = "perplexity" not in key[1] and key[1] != "bits_per_byte"
        assert row["higher_is_better"] is higher
        per_gb = row["value"] / found["gb"] if higher else None
        assert row["score_per_gb"] == (per_gb if per_gb is None else pytest.approx(per_gb))


def test_where_words_begin_changes_no_score() -> None:
    """With a tokenizer that joins blanks to words, and puts a BOS token before every text."""
    from outlier_mlx.measure.eval_model import HarnessModel

    model, tokenizer = outlier_mlx.load(FOLDER / "base")
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    adapter = HarnessModel(
        model,
        tokenizer,
        max_length=512,
        batch_size=1,
        max_tokens=None,
        chat=False,
        stages=lambda title, unit: nullcontext(lambda done, total: None),
    )
    pairs = [("The kitten sat", " down."), ("The kitten sat ", "down."), ("", "The kitten")]
    inside, before, alone = adapter.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    assert inside == before and np.isfinite(inside[0])
    assert adapter.loglikelihood_rolling([SimpleNamespace(args=("The kitten",))]) == [alone[0]]


def test_settings_are_used_and_noted(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["tier"]
    prompts = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in "abc"
    ]
    rows = [
        {"question": question, "answer": case.answer(prompt)[:2]}
        for question, prompt in zip("abc", prompts, strict=True)
    ]
    task = write_task(tmp_path / "tasks", "talk", rows, GENERATE % '"<|im_end|>"')
    out = tmp_path / "found.json"
    command = ["eval", case.folder, "--tasks", task, "--limit", 2, "--max-tokens", 2]
    done = run(*command, "--apply-chat-template", "--seed", 7, "--out", out)
    found = json.loads(out.read_text())
    assert [(row["value"], row["n"]) for row in found["results"]] == [(1.0, 2)]
    assert found["config"]["tasks"] == ["talk.yaml"]
    assert found["config"]["limit"] == 2 and found["config"]["seed"] == 7
    assert found["config"]["apply_chat_template"] is True and found["config"]["max_tokens"] == 2
    assert {"outlier-mlx", "lm-eval", "mlx", "mlx-lm"} == set(found["versions"])
    assert found["date"].endswith("+00:00")
    assert "at most 2 documents a task" in done.out and "1.0000" in done.out
    again = run(*command, "--out", out, code=1)
    assert "--force replaces it" in again.err
    assert again.out == "" and json.loads(out.read_text()) == found
    plain = run(*command, "--json", "--out", out, "--force")
    assert plain.json == json.loads(out.read_text())
    assert plain.json["results"][0]["value"] == 0.0  # asked without the template
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_answers_end_where_generation_config_says(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert outlier_mlx.load(case.folder)[1].eos_token_ids == {0, 2}


@pytest.mark.parametrize("until", ["", '""', '"never", ""'])
def test_without_a_stop_text_the_whole_answer_counts(
    cases: dict[str, Case], tmp_path: Path, until: str
) -> None:
    case = cases["base"]
    task = write_task(
        tmp_path, "whole", [{"question": "a", "answer": case.answer("a")}], GENERATE % until
    )
    done = run("eval", case.folder, "--tasks", task, "--json")
    assert done.json["results"][0]["value"] == 1.0


def test_texts_of_answers_are_the_harnesses(cases: dict[str, Case], tmp_path: Path) -> None:
    """Without special tokens, which can be stops, and without what the model thinks."""
    from outlier_mlx.measure.eval_model import answer_text

    folder = copy_writable(cases["tier"].folder, tmp_path / "tier")
    content = json.loads((folder / "tokenizer.json").read_text())
    like = content["added_tokens"][0]
    for number, (text, special) in enumerate((("<think>", False), ("</think>", True))):
        content["added_tokens"].append(like | {"id": 300 + number, "content": text})
        content["added_tokens"][-1]["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder, {})
    tokens = tokenizer.encode("<think>no: 1\n</think> a<|im_start|> b: c\n<|im_end|>")
    for stops, expected in {
        (): "a b: c\n",
        ("\n",): "a b: c",
        ("never", "b", "a b: "): "a ",
        ("<|im_start|>", "c"): "a",
        ("1",): "a b: c\n",  # thoughts are left out first
    }.items():
        assert answer_text(tokenizer, tokens, list(stops)) == expected
    assert answer_text(tokenizer, tokens, ["<think>"]) == "a b: c\n"
    assert answer_text(tokenizer, [], ["a"]) == ""


def test_how_long_answers_may_be(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the harness has it, where neither the command nor the task says it."""
    limits: list[int] = []

    def none(_: Any, __: Any, prompts: list[Any], *, max_tokens: list[int], **___: Any) -> Any:
        limits.extend(max_tokens)
        return SimpleNamespace(token_ids=[[] for _ in prompts])

    monkeypatch.setattr("outlier_mlx.measure.eval_model.batch_generate", none)
    for name, limit in (("a", ""), ("b", ", max_gen_toks: 7"), ("c", ", max_new_tokens: 9")):
        text = GENERATE.replace(", max_gen_toks: 6", limit) % '"never"'
        task = write_task(tmp_path / name, "t", [{"question": "a", "answer": "a"}], text)
        run("eval", cases["base"].folder, "--tasks", task)
    run("eval", cases["base"].folder, "--tasks", task, "--max-tokens", 3)
    assert limits == [256, 7, 9, 3]


def test_examples_come_before_the_question(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["base"]
    answer = case.answer("Q: a x\n\nQ: b")
    rows = [{"question": "Q: b", "answer": answer}]
    shown = [{"question": "Q: a", "answer": "x"}]
    text = f"fewshot_config: {{sampler: first_n, samples: {json.dumps(shown)}}}\n"
    task = write_task(tmp_path / "tasks", "shots", rows, text + GENERATE % '"never"')
    for number, score in ((1, 1.0), (0, 0.0)):
        done = run("eval", case.folder, "--tasks", task, "--num-fewshot", number, "--json")
        row = done.json["results"][0]
        assert (row["fewshot"], row["value"]) == (number, score)


def test_groups_of_a_folder_are_asked_once(cases: dict[str, Case], tmp_path: Path) -> None:
    for name, answer in (("one", "b"), ("two", cases["base"].answer("a"))):
        write_task(tmp_path, name, [{"question": "a", "answer": answer}], GENERATE % '"never"')
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [one, two]\n"
        "aggregate_metric_list: [{metric: exact_match, weight_by_size: false}]\n"
    )
    done = run("eval", cases["base"].folder, "--tasks", tmp_path, "--json")
    rows = {row["task"]: row for row in done.json["results"]}
    assert {task: (row["value"], row["n"]) for task, row in rows.items()} == {
        "one": (0.0, 1),
        "two": (1.0, 1),
        "both": (0.5, 2),
    }
