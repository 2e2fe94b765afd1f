"""Grammars of tool calls: those that a model writes in its own format, with valid arguments."""

import json
import keyword
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from outlier_mlx.engine.constraint import Grammars, json_rule
from outlier_mlx.engine.schemas import SchemaError, checked_schema
from outlier_mlx.serve.calls import NAME

_ANYTHING = "(?s:.*)"
_SIMPLE = ("string", "integer", "number", "boolean", "array", "object")


@dataclass(frozen=True)
class Function:
    """A function that may be called.

    Attributes:
        name: its name.
        parameters: JSON schema of its arguments.
    """

    name: str
    parameters: dict[str, Any]


class CallGrammar:
    """The grammar of calls in the format of a model.

    Args:
        grammars: of the model.

    Raises:
        SchemaError: the format is not known, or no grammar can express it.
    """

    def __init__(self, grammars: Grammars) -> None:
        tokenizer = grammars.tokenizer
        self._grammars = grammars
        self._mark = grammars.mark
        self._open: str = tokenizer.tool_call_start or ""
        self._close: str = tokenizer.tool_call_end or ""
        parser = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
        formats: dict[str, Callable[[Sequence[Function], bool], list[str]]] = {
            "json_tools": self._json,
            "mistral": self._mistral,
            "kimi_k2": self._kimi,
            "pythonic": self._pythonic,
            "qwen3_coder": self._qwen_coder,
            "glm47": self._glm,
            "laguna": self._glm,
        }
        if parser not in formats:
            raise SchemaError("calls in this model's format cannot be forced")
        self._rules = formats[parser]

    def forced(self, functions: Sequence[Function], *, several: bool) -> str:
        """Rules of the symbol `calls`: one call of these functions at least.

        Args:
            functions: at least one.
            several: whether there may be more than one call.

        Raises:
            SchemaError: names the function whose calls cannot be expressed.
        """
        for function in functions:
            if not NAME.fullmatch(function.name):
                raise SchemaError(f"{function.name[:40]!r} cannot be forced: it is no plain name")
        return "\n".join(self._rules(functions, several))

    def free(self, functions: Sequence[Function], *, several: bool) -> str:
        """Rules of the symbol `answer`: any text, in which calls are as `forced` makes them.

        Raises:
            SchemaError: names the function whose calls cannot be expressed.
        """
        rules = self.forced(functions, several=several)
        if not self._mark(self._open).startswith("<["):
            raise SchemaError("strict arguments need a token of its own before a call")
        answer = "(TEXT? calls)* TEXT?" if several else "TEXT? calls?"
        return f"{rules}\nanswer: {answer}\nTEXT: /{_ANYTHING}/"

    def _json(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`."""
        rules = [
            _calls(several=several),
            f'call: {self._mark(self._open)} "\\n"? body "\\n"? {self._mark(self._close)}',
        ]
        return rules + self._objects(functions)

    def _objects(self, functions: Sequence[Function]) -> list[str]:
        """The rule of `body`: an object with name and arguments."""
        heads = [f'{{"name": "{f.name}", "arguments": ' for f in functions]
        return self._choices(functions, [(_text(head), '"}"') for head in heads])

    def _choices(
        self, functions: Sequence[Function], around: Sequence[tuple[str, str]]
    ) -> list[str]:
        """The rule of `body`: the arguments of any function in JSON, with symbols around them."""
        rules = ["body: " + " | ".join(f"body{n}" for n in range(len(functions)))]
        for number, (function, (before, after)) in enumerate(zip(functions, around, strict=True)):
            rules.append(f"body{number}: {before} arguments{number} {after}")
            rules.append(f"arguments{number}: {_arguments(function)}")
        return rules

    def _mistral(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`[TOOL_CALLS]f[ARGS]{...}`, or `[TOOL_CALLS][{"name": "f", "arguments": {...}}]`."""
        opened = self._mark(self._open)
        if "[ARGS]" in self._grammars.tokenizer.get_vocab():
            for function in functions:
                if not re.fullmatch(r"[\w-]+", function.name):
                    raise SchemaError(f"calls of {function.name} cannot be written as name[ARGS]")
            more = " body*" if several else ""
            heads = [(f"{_text(f.name)} {self._mark('[ARGS]')}", "") for f in functions]
            return [f"calls: {opened} body{more}", *self._choices(functions, heads)]
        more = ' (", " body)*' if several else ""
        return [f'calls: {opened} " "? "[" body{more} "]"', *self._objects(functions)]

    def _kimi(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""
        begins, argument, ends = (
            self._mark(f"<|tool_call_{name}|>") for name in ("begin", "argument_begin", "end")
        )
        heads = [f"{begins} {_text(f'functions.{f.name}:')} NUMBER {argument}" for f in functions]
        more = " body*" if several else ""
        return [
            f"calls: {self._mark(self._open)} body{more} {self._mark(self._close)}",
            "NUMBER: /[0-9]{1,2}/",
            *self._choices(functions, [(head, ends) for head in heads]),
        ]

    def _pythonic(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`<|tool_call_start|>[f(a="text", b=1)]<|tool_call_end|>`, with values as in JSON."""
        more = ' (", " body)*' if several else ""
        opened, closed = self._mark(self._open), self._mark(self._close)
        rules = [f'calls: {opened} "[" body{more} "]" {closed}']
        rules.append("body: " + " | ".join(f"body{n}" for n in range(len(functions))))
        for number, function in enumerate(functions):
            name = f"body{number}"
            named = _parameters(function)
            if not all(map(_is_python_name, [*function.name.split("."), *named])):
                raise SchemaError(f"calls of {function.name} cannot be written in Python")
            rules.append(f"{name}: {_text(function.name + '(')} {name}_list {_text(')')}")
            parts = {}
            for place, (key, (schema, required)) in enumerate(named.items()):
                rules.append(f"{name}_{place}: {_text(key + '=')} {json_rule(schema)}")
                parts[f"{name}_{place}"] = required
            rules += _comma_list(f"{name}_list", parts)
        return rules

    def _qwen_coder(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`<function=f><parameter=a>text</parameter></function>`, with texts as they are."""
        opened, closed = self._mark(self._open), self._mark(self._close)
        rules = [
            _calls(several=several),
            f'call: {opened} "\\n"? body "\\n"? {closed}',
            "body: " + " | ".join(f"body{n}" for n in range(len(functions))),
        ]
        for number, function in enumerate(functions):
            parts = []
            for place, (key, (schema, required)) in enumerate(_parameters(function).items()):
                if schema.get("type") not in _SIMPLE or not NAME.fullmatch(key):
                    text = "has no simple type, which this model's format of calls needs"
                    raise SchemaError(f"{function.name}: the parameter {key[:40]!r} {text}")
                rule = f"body{number}_{place}"
                value = _value(rule, schema, _text("\n</parameter>\n"), "\n</parameter>\n")
                rules += [f"{rule}: {_text(f'<parameter={key}>' + chr(10))} {value[0]}", *value[1]]
                parts.append(rule if required else f"{rule}?")
            head, tail = _text(f"<function={function.name}>\n"), _text("</function>")
            rules.append(f"body{number}: {' '.join([head, *parts, tail])}")
        return rules

    def _glm(self, functions: Sequence[Function], several: bool) -> list[str]:
        """`<tool_call>f<arg_key>a</arg_key><arg_value>text</arg_value></tool_call>`."""
        opened, closed = self._mark(self._open), self._mark(self._close)
        rules = [
            _calls(several=several),
            f'call: {opened} body "\\n"? {closed}',
            "body: " + " | ".join(f"body{n}" for n in range(len(functions))),
        ]
        key_opens, key_closes, opens, closes = (
            self._mark(tag) for tag in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
        )
        for number, function in enumerate(functions):
            parts = [_text(function.name)]
            for place, (key, (schema, required)) in enumerate(_parameters(function).items()):
                if not key or key != key.strip() or "</arg_key>" in key:
                    text = "has a name that cannot be written in this model's format of calls"
                    raise SchemaError(f"{function.name}: the parameter {key[:40]!r} {text}")
                rule = f"body{number}_{place}"
                value, more = _value(rule, schema, closes, "</arg_value>")
                around = f'{key_opens} {_text(key)} {key_closes} "\\n"? {opens}'
                rules += [f'{rule}: "\\n"? {around} {value}', *more]
                parts.append(rule if required else f"{rule}?")
            rules.append(f"body{number}: {' '.join(parts)}")
        return rules


def _calls(*, several: bool) -> str:
    """The rule of calls that stand each between the marks."""
    return 'calls: call ("\\n"? call)*' if several else "calls: call"


def _arguments(function: Function) -> str:
    """The JSON object of a function's arguments, as a symbol."""
    try:
        return json_rule({"type": "object"} | function.parameters)
    except SchemaError as error:
        raise SchemaError(f"{function.name}: {error}") from None


def _parameters(function: Function) -> dict[str, tuple[dict[str, Any], bool]]:
    """The schema of each parameter, and whether it is required."""
    try:
        clean = checked_schema({"type": "object"} | function.parameters)
    except SchemaError as error:
        raise SchemaError(f"{function.name}: {error}") from None
    assert isinstance(clean, dict)
    known = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    properties, required = clean.get("properties", {}), clean.get("required", [])
    if not clean.keys() <= known or not set(required) <= properties.keys():
        raise SchemaError(f"{function.name}: its parameters must be an object of properties")
    shared = {name: clean[name] for name in ("$defs", "definitions") if name in clean}
    schemas = {name: {} if s is True else s for name, s in properties.items() if s is not False}
    return {name: (schema | shared, name in required) for name, schema in schemas.items()}


def _value(rule: str, schema: dict[str, Any], closing: str, tag: str) -> tuple[str, list[str]]:
    """The symbols of a value up to its closing tag, and their rules; a text is as it is."""
    shared = {"$defs", "definitions"}
    kind = {name: value for name, value in schema.items() if name not in shared}
    if kind.get("type") != "string":
        return f"{json_rule(schema)} {closing}", []
    choices = [kind["const"]] if "const" in kind else kind.get("enum")
    if not kind.keys() <= {"type", "enum", "const", "minLength", "maxLength"}:
        raise SchemaError("texts with a pattern or format have no form in this model's calls")
    if choices is not None:
        texts = [choice for choice in choices if isinstance(choice, str)]
        if any(text != text.strip() or text.lower() in ("", "null") for text in texts):
            raise SchemaError("a text that is empty, null or has blanks around it has no form here")
        return f"({' | '.join(map(_text, texts))}) {closing}", []
    length = _free_text(kind.get("minLength", 0), kind.get("maxLength"))
    if closing.startswith("<["):
        return f"{rule}_text {closing}", [f"{rule}_text: /{length}/"]
    return f"{rule}_text", [f"{rule}_text[lazy]: /{_pattern(length, tag)}/"]


def _free_text(least: int, most: int | None) -> str:
    """A regular expression of texts, without blanks around them if their least length counts."""
    inner = "" if most is None else max(0, most - 2)
    if least == 0:
        return f"(?s:.{{0,{'' if most is None else most}}})"
    if most == 1:
        return r"\S"
    if least == 1:
        return rf"\S((?s:.{{0,{inner}}})\S)?"
    return rf"\S(?s:.{{{least - 2},{inner}}})\S"


def _is_python_name(name: str) -> bool:
    """Whether Python reads a name as it is written; it composes some letters."""
    plain = unicodedata.normalize("NFKC", name) == name
    return name.isidentifier() and plain and not keyword.iskeyword(name)


def _comma_list(name: str, parts: dict[str, bool]) -> list[str]:
    """Rules of a list of symbols in their order, with commas; True: the symbol is required."""
    rules = []
    symbols = list(parts)
    # `name_n`: what may follow when something is written already; `name`: when nothing is.
    for n, symbol in enumerate(symbols):
        rest = f"{name}_{n + 1}"
        once = f'", " {symbol} {rest}'
        rules.append(f"{name}_{n}: {once if parts[symbol] else f'({once}) | {rest}'}")
    rules.append(f'{name}_{len(symbols)}: ""')
    firsts = []
    for n, symbol in enumerate(symbols):
        firsts.append(f"{symbol} {name}_{n + 1}")
        if parts[symbol]:
            break
    else:
        firsts.append('""')
    return [*rules, f"{name}: {' | '.join(firsts)}"]


def _pattern(before: str, text: str) -> str:
    """A regular expression within slashes, that ends with a text."""
    return before + re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


def _text(text: str) -> str:
    """A text as a symbol of a grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
