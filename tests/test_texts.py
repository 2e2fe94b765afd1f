"""JSON and YAML are read in one strict way, and in one place."""

from __future__ import annotations

import ast
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import outlier_mlx
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.limits import parse_body
from outlier_mlx.storage.texts import (
    MAX_DEPTH,
    compose_yaml,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
)

PACKAGE = Path(outlier_mlx.__file__).parent
DEEP = MAX_DEPTH + 1
TOO_LARGE = "is too large"
# Text after `{"a": `, and what the message says of it.
REFUSED_JSON = [
    ("1e999}", f"a: the number 1e999 {TOO_LARGE}"),
    ("-1e999}", f"a: the number -1e999 {TOO_LARGE}"),
    ("[2, 1e400]}", f"the number 1e400 {TOO_LARGE}: line 1 column 11"),
    ("1" + 400 * "0" + "}", f"of 401 digits {TOO_LARGE}"),
    ("-" + 5000 * "7" + "}", f"of 5001 digits {TOO_LARGE}"),
    ("NaN}", "NaN is not a number"),
    ("-Infinity}", "-Infinity is not a number"),
    ('1, "a": 1}', "the key 'a' appears twice"),
    ('{"b": 1, "b": 1}}', "the key 'b' appears twice"),
    (r'"\ud800"}', r"\ud800 is half a surrogate pair"),
    (r'"x\uDC00y"}', r"\udc00 is half a surrogate pair"),
    (r'1, "\udbff": 2}', r"\udbff is half a surrogate pair"),
    (DEEP * "[" + DEEP * "]" + "}", "nested deeper than 100"),
    (DEEP * '{"a":' + "1" + DEEP * "}" + "}", "nested deeper than 100"),
    (100_000 * "[", "nested deeper than 100"),
    ("1", "Expecting"),
    ("'x'}", "Expecting value"),
    ('"\n"}', "control character"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED_JSON)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_json('{"a": ' + text, "x.json")
    message = str(error.value)
    assert message.startswith("x.json: not valid JSON (") and said in message
    assert len(message) < 300


@pytest.mark.parametrize(("text", "said"), REFUSED_JSON)
def test_a_request_is_read_as_strictly_as_a_file(text: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_body(b'{"a": ' + text.encode())
    assert refused.value.status == 400
    assert "the body is not JSON: " in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("data", [b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), b"\xef\xbb\xbf{}"])
def test_json_is_utf8(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: not valid JSON"):
        parse_json(data, "x.json")


def test_large_but_sound() -> None:
    """What configs and tokenizers really hold."""
    sound = {
        "model_max_length": 1000000000000000019884624838656,
        "seed": 2**64 - 1,
        "small": 1e-320,
        "large": 1.7976931348623157e308,
        "pair": "\U0001f600",
        "deep": eval(MAX_DEPTH * "[" + MAX_DEPTH * "]")[0],
    }
    assert parse_json(json.dumps(sound), "x.json") == sound
    assert parse_json(r'{"a": "\\ud800 spelled out"}', "x.json") == {"a": r"\ud800 spelled out"}


JSON_VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON_VALUES, ascii_only=st.booleans())
def test_whatever_is_written_reads_back(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        assert parse_json(text.encode(), "x.json") == value
    except UnicodeEncodeError:
        assert not ascii_only


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40) | st.text('{}[]":,1eE+-.\\ud8Nafntrls \n', max_size=40))
def test_any_text_gives_a_value_or_one_line(data: str | bytes) -> None:
    for parse in (parse_json, parse_yaml, compose_yaml):
        try:
            value = parse(data, "x")
            if parse is parse_json:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except CheckpointError as error:
            assert str(error).startswith("x: not valid ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: .nan", ".nan is not a finite number at line 1, column 4"),
        ("a: -.inf", "-.inf is not a finite number"),
        ("a: 1.0e+999", "1.0e+999 is not a finite number"),
        ("a: 0x" + 5000 * "f", TOO_LARGE),
        ("a: " + 5000 * "7", TOO_LARGE),
        ("a: 0x" + 300 * "f", TOO_LARGE),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "duplicate key 'b'"),
        (r'a: "\ud800"', "half a surrogate pair"),
        (DEEP * "[", "nested deeper than 100"),
        (DEEP * "- ", "nested deeper than 100"),
        ("a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_yaml(text, "x.yaml")
    assert str(error.value).startswith("x.yaml: not valid YAML: ") and said in str(error.value)


def test_yaml_that_is_sound(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("base: &b {a: 1, f: 2.5}\nmore: {<<: *b, a: 3}\nhex: 0xff\nlist: [é, ~, on]\n")
    expected = {"base": {"a": 1, "f": 2.5}, "more": {"a": 3, "f": 2.5}, "hex": 255}
    assert read_yaml(file) == expected | {"list": ["é", None, True]}
    file.write_bytes(b"a: \xff")
    with pytest.raises(OutlierError, match=r"x\.yaml: not valid YAML"):
        read_yaml(file)
    file.write_text("#" * 1_000_001)
    with pytest.raises(OutlierError, match="larger than 1000000 bytes"):
        read_yaml(file)


def test_a_pipe_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlier_mlx.storage.texts.MAX_JSON_BYTES", 1000)
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)

    def feed(data: bytes) -> threading.Thread:
        thread = threading.Thread(target=lambda: pipe.write_bytes(data))
        thread.start()
        return thread

    writer = feed(b'{"a": 1}')
    assert read_json(pipe) == {"a": 1}
    writer.join()
    writer = feed(b" " * 1001)
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_json(pipe)
    writer.join()


# What parses JSON or YAML, by module. mlx-lm, transformers and lm-eval read files with their own.
PARSERS = {"json": {"load", "loads", "JSONDecoder"}, "yaml": {"load", "compose", "parse", "scan"}}
# `runtime` imports nothing of the rest; it ignores what is no file of kernel variants. What a model
# writes is neither a file nor a request: calls of tools that cannot be read are text.
ALLOWED = {("storage/texts.py", "json.loads"), ("storage/texts.py", "yaml.load")}
ALLOWED |= {("storage/texts.py", "yaml.compose"), ("runtime/variants.py", "json.loads")}
ALLOWED |= {("serve/calls.py", "json.loads"), ("serve/calls.py", "json.JSONDecoder")}
# Calls whose arguments were read before.
ALLOWED |= {("serve/apis/anthropic.py", "json.loads")}
# Responses as the server wrote them.
ALLOWED |= {("serve/apis/store.py", "json.loads")}
# What processes of this project say to each other, and how the tokenizers library describes itself.
ALLOWED |= {("engine/bounded.py", "json.loads"), ("engine/template_process.py", "json.loads")}
ALLOWED |= {("serve/prompts.py", "json.loads"), ("measure/bench_settings.py", "json.loads")}
ALLOWED |= {
    ("engine/constraint.py", "json.loads"),
    ("checkpoints/gguf_vocabulary.py", "json.loads"),
}
# What ranks say to each other.
ALLOWED |= {("engine/distributed/ranks.py", "json.loads")}


def test_nothing_else_parses_json_or_yaml() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name, source = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if re.search("json|yaml", source) else ():
            if isinstance(node, ast.ImportFrom) and node.module in PARSERS:
                found |= {(name, f"{node.module}.{alias.name}") for alias in node.names}
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            module, parser = node.value.id, node.attr
            starts = parser.startswith(tuple(PARSERS.get(module, ())))
            if starts or (module == "yaml" and parser.endswith(("load", "load_all"))):
                found.add((name, f"{module}.{parser}"))
    assert found == ALLOWED
