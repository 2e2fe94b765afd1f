"""Forced calls in the formats of models: mlx-lm's parsers read them, and arguments are valid."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine.constraint import Grammars
from outlier_mlx.engine.schemas import SchemaError
from outlier_mlx.serve.call_grammar import CallGrammar, Function
from outlier_mlx.serve.calls import CallReader
from tests.json_schemas import SMALL, record
from tests.test_constraint import byte_level

WEATHER = record(
    {"unit": {"type": "string", "enum": ["C", "F"]}, "deep": record(on={"type": "boolean"})},
    city={"type": "string", "minLength": 1, "maxLength": 6},
    days=SMALL,
)
OPTIONAL = {
    "type": "object",
    "properties": {"a": SMALL, "b": {"type": "boolean"}, "c": {"$ref": "#/$defs/kind"}},
    "additionalProperties": False,
    "$defs": {"kind": {"type": "string", "enum": ["x", "y"]}},
}
PARAMETERS = {"weather": WEATHER, "now": record(), "look": OPTIONAL}
PLAIN = {"weather": WEATHER, "now": record()}
CALL, CALLED = "<tool_call>", "</tool_call>"
KEYS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
FORMATS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "JSON": ("json_tools", (CALL, CALLED), PARAMETERS),
    "JSON without tokens for marks": ("json_tools", (), PARAMETERS),
    "a list": ("mistral", ("[TOOL_CALLS]",), PARAMETERS),
    "names before JSON": ("mistral", ("[TOOL_CALLS]", "[ARGS]"), PARAMETERS),
    "numbered": ("kimi_k2", (), PARAMETERS),
    "Python": ("pythonic", ("<|tool_call_start|>", "<|tool_call_end|>"), PARAMETERS),
    "tags": ("qwen3_coder", (CALL, CALLED), PLAIN),
    "pairs": ("glm47", (CALL, CALLED, *KEYS), PARAMETERS),
    "pairs without tokens for marks": ("glm47", (), PARAMETERS),
}


def tokenizer_of(parser: str, folder: Path, marks: tuple[str, ...]) -> Any:
    module = import_module(f"mlx_lm.tool_parsers.{parser}")
    tokenizer = byte_level(folder / "tokenizer", *marks)
    tokenizer._tool_parser = module.parse_tool_call
    tokenizer._tool_call_start = module.tool_call_start
    tokenizer._tool_call_end = module.tool_call_end
    return tokenizer


def written(constraint: Any, tokenizer: Any, width: int, seed: int) -> str:
    """Tokens at random, that end where they can more often than not."""
    random, processor, tokens = np.random.default_rng(seed), constraint.start([]), [0]
    while len(tokens) < 1500:
        logits = random.normal(size=(1, width)).astype(np.float32)
        logits[0, list(tokenizer.eos_token_ids)] += 3
        token = int(mx.argmax(processor(mx.array(tokens), mx.array(logits))))
        if token in tokenizer.eos_token_ids:
            return str(tokenizer.decode(tokens[1:]))
        tokens.append(token)
    raise AssertionError(tokenizer.decode(tokens))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls(name: str, several: bool, tmp_path: Path) -> None:
    parser, marks, parameters = FORMATS[name]
    tokenizer = tokenizer_of(parser, tmp_path, marks)
    grammars = Grammars(tokenizer, len(tokenizer.get_vocab()))
    functions = [Function(*pair) for pair in parameters.items()]
    rules = CallGrammar(grammars).forced(functions, several=several)
    constraint = grammars.grammar(f"start: calls\n{rules}")
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in parameters.items()
    ]
    reader = CallReader(tokenizer, tools)
    called = set()
    for seed in range(12):
        text = written(constraint, tokenizer, grammars.width, seed)
        before, *blocks = text.split(reader.start)
        assert not before
        read = []
        for block in blocks:
            inside, _, after = block.partition(reader.end) if reader.end else (block, "", "")
            assert not after.strip()
            found = tokenizer.tool_parser(inside, tools)
            read += found if isinstance(found, list) else [found]
        assert read and (several or len(read) == 1), text
        for call in read:
            called.add(call["name"])
            jsonschema.validate(call["arguments"], parameters[call["name"]])
    assert called == set(parameters)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "format": ("longcat", {}, "cannot be forced"),
    "name in Python": ("pythonic", {"properties": {"my key": SMALL}}, "cannot be written"),
    "types in tags": ("qwen3_coder", {"properties": {"a": {"anyOf": [SMALL]}}}, "no simple type"),
    "pattern in tags": (
        "qwen3_coder",
        {"properties": {"a": {"type": "string", "pattern": "^a$"}}},
        "have no form",
    ),
    "blank in tags": (
        "glm47",
        {"properties": {"a": {"type": "string", "enum": [" a"]}}},
        "blanks around it",
    ),
    "union of parameters": ("glm47", {"anyOf": [{"type": "object"}]}, "must be an object of"),
    "schema": ("json_tools", {"properties": {"a": {"not": {}}}}, "f: #/properties/a/not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_cannot_be_forced(name: str, tmp_path: Path) -> None:
    parser, parameters, told = REFUSED[name]
    tokenizer = tokenizer_of(parser, tmp_path, ())
    grammars = Grammars(tokenizer, len(tokenizer.get_vocab()))
    with pytest.raises(SchemaError, match=told):
        CallGrammar(grammars).forced([Function("f", parameters)], several=True)


def test_free_calls_need_a_mark_of_their_own(tmp_path: Path) -> None:
    grammars = Grammars(tokenizer := tokenizer_of("json_tools", tmp_path, ()), 300)
    assert tokenizer.tool_call_start == CALL
    with pytest.raises(SchemaError, match="need a token of its own"):
        CallGrammar(grammars).free([Function("f", record())], several=True)


# Names that are also rules of a grammar, or that have to be quoted.
ODD: tuple[str, ...] = (
    "list",
    "list_0",
    "0",
    "text",
    "body0",
    "City",
    "class",
    "für",
    "ﬁ",
    "a b",
    " a",
    "",
    '"a"',
)
ODD += ("\n", "\\", "]]", "<", "</arg_key>", "a</parameter>", "}", "\u2028", "\x7f", "💡", "$ref")


@pytest.mark.parametrize("name", FORMATS)
def test_odd_names(name: str, tmp_path: Path) -> None:
    """Of parameters: their calls are read as they were meant, or cannot be forced."""
    parser, marks, _ = FORMATS[name]
    tokenizer = tokenizer_of(parser, tmp_path, marks)
    grammars = Grammars(tokenizer, len(tokenizer.get_vocab()))
    refused = set()
    for names in [(odd,) for odd in ODD] + [("list", "list_0", "text", "City", "für")]:
        schema = record(**dict.fromkeys(names, SMALL))
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        try:
            rules = CallGrammar(grammars).forced([Function("f", schema)], several=False)
        except SchemaError:
            refused.add(names[0])
            continue
        constraint = grammars.grammar(f"start: calls\n{rules}")
        text = written(constraint, tokenizer, grammars.width, 3)
        block = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
        (call,) = CallReader(tokenizer, tools).read(block, whole=True)
        assert json.loads(call.arguments).keys() == set(names), text
    if parser in ("json_tools", "mistral", "kimi_k2"):
        assert not refused
    assert not refused & {"list", "list_0", "text", "body0", "City", "für"}
    if parser == "pythonic":
        assert {"class", "ﬁ", "a b", ""} <= refused


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("called", ["für", "a.b", "a/b:1", "body0", "list"])
def test_odd_names_of_functions(name: str, called: str, tmp_path: Path) -> None:
    parser, marks, _ = FORMATS[name]
    tokenizer = tokenizer_of(parser, tmp_path, marks)
    grammars = Grammars(tokenizer, len(tokenizer.get_vocab()))
    try:
        rules = CallGrammar(grammars).forced([Function(called, record())], several=False)
    except SchemaError:
        assert called in (("a.b", "a/b:1") if "[ARGS]" in marks else ("a/b:1",))
        assert "[ARGS]" in marks or parser == "pythonic"
        return
    text = written(grammars.grammar(f"start: calls\n{rules}"), tokenizer, grammars.width, 3)
    block = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
    tools = [{"type": "function", "function": {"name": called}}]
    (call,) = CallReader(tokenizer, tools).read(block, whole=True)
    assert (call.name, call.arguments) == (called, "{}")


def test_a_schema_that_is_true_leaves_calls_readable(tmp_path: Path) -> None:
    """mlx-lm's parsers look for the type of each parameter."""
    tokenizer = tokenizer_of("glm47", tmp_path, (CALL, CALLED, *KEYS))
    parameters = {"type": "object", "properties": {"a": True, "b": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    block = "f<arg_key>b</arg_key><arg_value>5</arg_value>"
    (call,) = CallReader(tokenizer, tools).read(block, whole=True)
    assert json.loads(call.arguments) == {"b": "5"}
