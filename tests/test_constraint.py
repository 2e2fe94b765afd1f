"""Constrained decoding: the masks of grammars, for every kind of tokenizer and schema."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import outlier_mlx
from outlier_mlx.engine.constraint import Constraint, ConstraintError, Grammars
from outlier_mlx.engine.generate import vocabulary
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.engine.schemas import SchemaError
from tests.json_schemas import SCHEMAS, record
from tests.library import Library
from tests.program import ROOT, assert_refused, run, run_command

END, THINK, THOUGHT = "<|end|>", "<think>", "</think>"
ANSWER = {"enum": ["yes", "no"]}


def folder_of(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def byte_level(folder: Path, *marks: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, normalized=False)])
    made.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    return load_tokenizer(folder_of(made, folder), {})


def with_byte_fallback(folder: Path) -> Any:
    """As sentencepiece's are converted: bytes by name, and a mark for a blank."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["▁", *'{}[]":,.-0123456789', *"abcdefghijklmnopqrstuvwxyz", '▁"', '":', "▁{"]
    made = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return load_tokenizer(folder_of(made, folder), {})


def unigram(folder: Path) -> Any:
    letters = ["▁", *'{}[]":,.-0123456789', *"abcdefghijklmnopqrstuvwxyz", '▁"', "▁no"]
    made = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return load_tokenizer(folder_of(made, folder), {})


def word_piece(folder: Path) -> Any:
    made = Tokenizer(models.WordPiece(vocab={"yes": 0, "##no": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return load_tokenizer(folder_of(made, folder), {})


def written(constraint: Constraint, tokenizer: Any, width: int, seed: int, most: int = 600) -> str:
    """An answer of tokens at random; the constraint allows an end within `most` tokens."""
    rng = np.random.default_rng(seed)
    processor = constraint.start()
    tokens: list[int] = [0]
    while True:
        logits = mx.array(rng.normal(size=(1, width)).astype(np.float32))
        token = int(mx.argmax(processor(mx.array(tokens), logits)))
        if token in tokenizer.eos_token_ids:
            return str(tokenizer.decode(tokens[1:]))
        tokens.append(token)
        assert len(tokens) < most, tokenizer.decode(tokens)


def assert_valid(text: str, schema: Any) -> None:
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def pair(library: Library) -> Any:
    """The embedded pair's model, tokenizer and grammars."""
    model, tokenizer = outlier_mlx.load(library.demo_tier("q4"))
    return model, tokenizer, Grammars(tokenizer, vocabulary(model, tokenizer))


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback, unigram])
def test_tokens_of_any_kind_of_tokenizer(make: Any, tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "tokenizer")
    width = len(tokenizer.get_vocab()) + 70
    schema = record(answer=ANSWER, count={"type": "integer", "minimum": 3, "maximum": 40})
    constraint = Grammars(tokenizer, width).schema(schema)
    for seed in range(20):
        assert_valid(written(constraint, tokenizer, width, seed), schema)


def test_characters_of_several_tokens(tmp_path: Path) -> None:
    tokenizer = with_byte_fallback(tmp_path / "tokenizer")
    width = len(tokenizer.get_vocab())
    constraint = Grammars(tokenizer, width).schema({"enum": ["漢ü"]})
    assert json.loads(written(constraint, tokenizer, width, 0)) == "漢ü"


def test_a_tokenizer_whose_text_depends_on_neighbours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="cannot be constrained"):
        Grammars(word_piece(tmp_path / "tokenizer"), 4).schema(ANSWER)


def test_only_the_end_is_special_and_only_where_the_grammar_ends(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer", "<tool_call>")
    width = len(tokenizer.get_vocab()) + 5
    processor = Grammars(tokenizer, width).schema({"type": "string"}).start()
    quote, letter, mark, end = (
        tokenizer.encode(text)[0] for text in ('"', "a", "<tool_call>", END)
    )
    tokens, seen = [letter], []
    for token in (quote, letter, quote):
        allowed = np.isfinite(np.array(processor(mx.array(tokens), mx.zeros((1, width)))))[0]
        assert allowed[token] and not allowed[mark] and not allowed[-5:].any()
        seen.append(bool(allowed[end]))
        tokens.append(token)
    allowed = np.isfinite(np.array(processor(mx.array(tokens), mx.zeros((1, width)))))[0]
    assert seen == [False] * 3
    assert np.flatnonzero(allowed).tolist() == [end]


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_allowed_tokens_are_a_value_of_the_schema(name: str, pair: Any) -> None:
    _, tokenizer, grammars = pair
    constraint = grammars.schema(SCHEMAS[name])
    for seed in range(5):
        assert_valid(written(constraint, tokenizer, grammars.width, seed), SCHEMAS[name])


def test_fifty_schemas() -> None:
    assert len(SCHEMAS) == 50


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_of_the_embedded_pair_alone(temperature: float, pair: Any) -> None:
    model, tokenizer, grammars = pair
    mx.random.seed(3)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}])
    for schema in SCHEMAS.values():
        processor = grammars.schema(schema).start(prompt)
        sampler = make_sampler(temperature)
        text = generate(
            *(model, tokenizer, prompt),
            max_tokens=400,
            sampler=sampler,
            logits_processors=[processor],
        )
        assert_valid(text, schema)


@pytest.mark.parametrize(
    "temperature, count",
    [
        (0, 4),
        pytest.param(0, 50, marks=pytest.mark.slow),
        pytest.param(1, 50, marks=pytest.mark.slow),
    ],
)
def test_answers_of_the_embedded_pair_in_a_batch(temperature: float, count: int, pair: Any) -> None:
    """Each row has a constraint of its own, and its answer stays as it is without the others."""
    model, tokenizer, grammars = pair
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}])
    schemas = [*SCHEMAS.values()][:count]
    batch = BatchGenerator(model, stop_tokens=[[end] for end in tokenizer.eos_token_ids])
    answers: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    numbers = batch.insert(
        [prompt] * len(schemas),
        max_tokens=[400] * len(schemas),
        samplers=[make_sampler(temperature)] * len(schemas),
        logits_processors=[[grammars.schema(schema).start(prompt)] for schema in schemas],
    )
    while len(reasons) < len(schemas):
        for response in batch.next_generated():
            if response.finish_reason is not None:
                reasons[response.uid] = response.finish_reason
            if response.finish_reason != "stop":
                answers.setdefault(response.uid, []).append(response.token)
    assert set(reasons.values()) == {"stop"}
    for number, schema in zip(numbers, schemas, strict=True):
        assert_valid(tokenizer.decode(answers.get(number, [])), schema)


def test_a_constraint_begins_after_thinking(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer", THINK, THOUGHT)
    width = len(tokenizer.get_vocab())
    constraint = Grammars(tokenizer, width).schema(ANSWER)
    opens, closes, end, a, quote = (
        tokenizer.encode(text)[0] for text in (THINK, THOUGHT, END, "a", '"')
    )

    def allowed(processor: Any, tokens: list[int]) -> Any:
        return np.isfinite(np.array(processor(mx.array(tokens), mx.zeros((1, width)))))[0]

    # The template has opened it: anything but an end, until the mark.
    prompt = [a, opens]
    processor = constraint.start(prompt)
    now = allowed(processor, prompt)
    assert not now[end] and now.sum() == width - 1
    assert allowed(processor, [*prompt, a]).sum() == width - 1
    now = allowed(processor, [*prompt, a, closes])
    assert np.flatnonzero(now).tolist() == [quote]
    # Otherwise the model may open it, with the first token.
    processor = constraint.start([a, opens, closes, a])
    now = allowed(processor, [a])
    assert np.flatnonzero(now).tolist() == sorted([quote, opens])
    assert allowed(processor, [a, opens]).sum() == width - 1
    now = allowed(processor, [a, opens, closes])
    assert np.flatnonzero(now).tolist() == [quote]


def test_several_tokens_between_two_calls(pair: Any) -> None:
    """As where drafts are verified: a call for each position, or one for all that were kept."""
    _, tokenizer, grammars = pair
    constraint = grammars.schema({"const": "abcdef"})
    tokens = tokenizer.encode('"abcdef"', add_special_tokens=False)
    logits = mx.zeros((1, grammars.width))
    one, all_at_once = constraint.start(), constraint.start()
    all_at_once(mx.array([5]), logits)
    for count in range(len(tokens) + 1):
        last = one(mx.array([5, *tokens[:count]]), logits)
    assert mx.array_equal(last, all_at_once(mx.array([5, *tokens]), logits))
    # Nothing new: the same mask again.
    assert mx.array_equal(last, one(mx.array([5, *tokens]), logits))


def test_a_token_that_is_not_allowed_fails(pair: Any) -> None:
    _, tokenizer, grammars = pair
    processor = grammars.schema(ANSWER).start()
    processor(mx.array([1]), mx.zeros((1, grammars.width)))
    wrong = tokenizer.encode("x", add_special_tokens=False)
    with pytest.raises(ConstraintError, match="cannot be continued"):
        processor(mx.array([1, *wrong]), mx.zeros((1, grammars.width)))


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    """Schemas each of which refers to the next."""
    links: dict[str, Any] = {
        f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(length)
    }
    return {"$defs": links | {f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


REFUSED: dict[str, tuple[Any, str]] = {
    "no schema": ([], "must be an object"),
    "wrong type": ({"type": "strnig"}, "#/type: there is no type 'strnig'; did you mean 'string'?"),
    "type that is an object": ({"type": {"type": "string"}}, "#/type must be a string, or a list"),
    "type that is nested": ({"items": {"type": [["string"]]}}, "#/items/type must be a string, or"),
    "required that is nested": ({"required": [["a"]]}, "#/required must be a list of strings"),
    "required that is a string": ({"required": "a"}, "#/required must be a list of strings"),
    "wrong keyword": ({"type": "string", "maxlength": 3}, "'maxlength' is not supported"),
    "not": ({"not": {"type": "string"}}, "'not' is not supported"),
    "if": ({"properties": {"a": {"if": True}}}, "#/properties/a/if: the keyword 'if'"),
    "unique items": ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not supported"),
    "contains": ({"contains": {}}, "'contains' is not supported"),
    "options of llguidance": (
        {"x-guidance": {"lenient": True}, "minContains": 1},
        "'minContains' is not supported",
    ),
    "remote": ({"$ref": "https://example.com/a.json"}, "is not in the schema"),
    "dangling": ({"$ref": "#/$defs/none"}, "leads nowhere"),
    "old draft": ({"$schema": "http://json-schema.org/draft-04/schema#"}, "is not supported"),
    "format": ({"type": "string", "format": "phone"}, "Unknown format: phone"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a)b$"}, "look-ahead"),
    "nothing": ({"enum": []}, "no value|nothing|Unsatisfiable|ever ends"),
    "contradiction": ({"type": "integer", "minimum": 3, "maximum": 1}, "greater than maximum"),
    "types": ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "Unsatisfiable"),
    "endless": (record(next={"$ref": "#"}), "ever ends"),
    "endless reference": ({"$ref": "#"}, "ever ends"),
    "endless list": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "ever ends"),
    "long list": ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "shortest"),
    "long text": ({"type": "string", "minLength": 10**9}, "shortest"),
    "long record": (
        {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
        "#/minProperties: more than one",
    ),
    "deep": (deep(60), "nested too deeply"),
    "very deep": (deep(900), "nested too deeply"),
    "deep value": ({"const": json.loads("[" * 90 + "]" * 90)}, "nested too deeply"),
    "a chain of references": (chain(300), "have 602 levels, added up"),
    "a long chain of references": (chain(1600), "levels, added up"),
    "many schemas": ({"anyOf": [{"type": "null"}] * 6000}, "more than 5000 schemas"),
    "many values": ({"enum": list(range(30_000))}, "more than 20000 values"),
    "large": ({"const": "x" * 300_000}, "characters"),
    "many properties": (
        {"type": "object", "properties": {f"p{n}": True for n in range(400)}},
        "#/properties are 400; at most 300",
    ),
    "many alternatives": (
        {"anyOf": [record({f"{n}{k}": True for k in range(9)}) for n in range(400)]},
        "too|max is|more than",
    ),
    "inexact": ({"const": 2**60}, "2\\^53"),
    "ambiguous": (
        {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]},
        "oneOf",
    ),
    "explosion": (
        {
            "allOf": [
                {"anyOf": [{"properties": {f"{row}{n}": {"type": "null"}}} for n in range(3)]}
                for row in range(12)
            ]
        },
        "too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_schemas(name: str, pair: Any) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(SchemaError, match=reason):
        pair[2].schema(schema)


HARD: dict[str, dict[str, Any]] = {
    "references": chain(190),
    "groups": {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
    "long pattern": {"type": "string", "pattern": "(ab?|c*d)" * 10_000, "maxLength": 30},
    "counted": {"type": "string", "pattern": "^((((((a{9}){9}){9}){9}){9}){9}){9}$"},
    "repeats": {"type": "string", "pattern": "^(a|a?b?){1,1000}(([ab]*)*c){1,500}$"},
    "backtracking": {"type": "string", "pattern": "^(x+x+)+y$"},
    "states": {"type": "string", "pattern": "a.{2000}$", "maxLength": 3000},
    "long enum": {"enum": [f"value {n}" for n in range(5000)]},
    "many properties": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string"} for n in range(300)},
    },
}


@pytest.mark.parametrize("name", HARD)
def test_hard_schemas_take_bounded_time(name: str, pair: Any) -> None:
    """They are refused, or followed; each token needs little work, or the answer fails."""
    _, _, grammars = pair
    begun = time.perf_counter()
    try:
        processor = grammars.schema(HARD[name]).start()
    except SchemaError as error:
        assert re.search("regex|nested", str(error))
        return
    finally:
        assert time.perf_counter() - begun < 5
    rng = np.random.default_rng(0)
    tokens = [0]
    slowest = 0.0
    for _ in range(60):
        begun = time.perf_counter()
        logits = mx.array(rng.normal(size=(1, grammars.width)).astype(np.float32))
        try:
            token = int(mx.argmax(processor(mx.array(tokens), logits)))
        except ConstraintError:
            break
        slowest = max(slowest, time.perf_counter() - begun)
        tokens.append(token)
    assert slowest < 1


def test_generate_writes_a_value_of_a_schema(library: Library, tmp_path: Path) -> None:
    tier, file = library.demo_tier("q4"), tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMAS["tuple"]))
    line = ("generate", "--model", tier, "--prompt", "Who are you?", "--json-schema", file)
    assert_valid(run(*line, "--max-tokens", 100).out, SCHEMAS["tuple"])
    begins = run(*line, "--prefill-response", "Well", code=1)
    assert_refused(begins, "--json-schema and --prefill-response exclude each other")
    file.write_text('{"not": {}}')
    assert_refused(run(*line, code=1), "schema.json: #/not: the keyword 'not' is not supported")
    # What only llguidance finds.
    file.write_text('{"type": "string", "format": "phone"}')
    assert_refused(run(*line, code=1), "the JSON schema: Unknown format: phone")


@pytest.mark.slow
def test_the_script_that_measures_costs() -> None:
    script = ROOT / "scripts" / "bench_constraint.py"
    done = run_command("python", script, "--runs", 1, "--tokens", 8, "--vocabulary", 3000)
    assert re.search(r"embedded pair: .* ms a token, .* with a schema: ", done.out)
    assert "a made-up one: 3000 tokens" in done.out
    assert len(re.findall(r"^  list of records( +[\d.]+){6}$", done.out, re.MULTILINE)) == 2
