"""What a request demands of the form of its answer, as a constraint: a JSON schema, or calls."""

from dataclasses import dataclass, field
from typing import Any

from outlier_mlx.engine.constraint import Constraint, Grammars, json_rule
from outlier_mlx.engine.schemas import SchemaError
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.call_grammar import CallGrammar, Function

ANY_OBJECT = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolChoice:
    """Which functions may be called.

    Attributes:
        tools: all that the model is told of, in the format of `/v1/chat/completions`.
        must_call: whether the answer must be calls.
        name: the only function that may be called; None: all may.
    """

    tools: list[dict[str, Any]] = field(default_factory=list)
    must_call: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Form:
    """The form of an answer.

    Attributes:
        schema: JSON schema of a text; None: texts are free.
        place: the request's field that has the schema, for messages.
        choice: which functions may be called.
        several: whether there may be more than one call.
    """

    schema: Any = None
    place: str = "response_format"
    choice: ToolChoice = ToolChoice()
    several: bool = True

    def constraint(self, grammars: Grammars) -> Constraint | None:
        """What holds answers to the form; None: they are free.

        Called in the request's own thread: a hard grammar takes tenths of a second.

        Raises:
            Refused: 400, with the field and the reason why it cannot be had.
        """
        must_call = self.choice.must_call
        functions = self._functions()
        strict = any(function.get("strict") for function in functions)
        if self.schema is None and not must_call and not strict:
            return None
        rules = ["start: " + " | ".join(self._starts(calls=bool(functions)))]
        place = self.place
        try:
            if self.schema is not None and not must_call:
                rules.append(f"json: {json_rule(self.schema)}")
            if functions:
                place = "tool_choice" if must_call else "tools"
                rules.append(self._call_rules(CallGrammar(grammars), functions))
            return grammars.grammar("\n".join(rules))
        except SchemaError as error:
            raise Refused(400, f"{place}: {error}", "invalid_json_schema", place) from None
        except OutlierError as error:
            raise Refused(400, f"{place}: {error}", "unsupported_parameter", place) from None

    def _functions(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        name = self.choice.name
        functions = [tool["function"] for tool in self.choice.tools]
        if name is not None:
            functions = [function for function in functions if function["name"] == name]
        if self.choice.must_call and not functions:
            missing = "are no tools" if name is None else f"is no function {name[:80]!r} in tools"
            text = f"tool_choice: there {missing}"
            raise Refused(400, text, "invalid_value", "tool_choice")
        return functions

    def _starts(self, *, calls: bool) -> list[str]:
        if self.choice.must_call:
            return ["calls"]
        if self.schema is None:
            return ["answer"]
        return ["json", "calls"] if calls else ["json"]

    def _call_rules(self, grammar: CallGrammar, chosen: list[dict[str, Any]]) -> str:
        functions = [Function(f["name"], f.get("parameters") or NO_ARGUMENTS) for f in chosen]
        if self.choice.must_call or self.schema is not None:
            return grammar.forced(functions, several=self.several)
        return grammar.free(functions, several=self.several)


def schema_of_format(given: dict[str, Any], place: str) -> Any:
    """The JSON schema that a format of OpenAI's APIs demands; None for plain text.

    `/v1/chat/completions` has it in `response_format`, `/v1/responses` in `text.format`, where the
    fields of `json_schema` stand beside the type.

    Raises:
        Refused: 400, with what is wrong in the field `place`.
    """
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        text = f"{place}.type must be text, json_object or json_schema"
        raise Refused(400, text, "invalid_value", place)
    holder = given.get("json_schema", given)
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        raise Refused(400, f"{place} has no schema that is an object", "invalid_value", place)
    return holder["schema"]


def given_schema(body: dict[str, Any]) -> tuple[Any, str]:
    """The JSON schema in the fields of a body, and the field that has it; None: there is none.

    Besides OpenAI's `response_format`, there are vLLM's `guided_json` and llama.cpp's
    `json_schema`, which are the schema itself.

    Raises:
        Refused: 400, one of them is wrong, or there are several.
    """
    found = [name for name in ("response_format", "guided_json", "json_schema") if name in body]
    if len(found) > 1:
        text = f"{found[1]} cannot be used together with {found[0]}"
        raise Refused(400, text, "invalid_value", found[1])
    place = found[0] if found else "response_format"
    if place == "response_format":
        return schema_of_format(body.get(place, {"type": "text"}), place), place
    return body[place], place


def tool_choice(given: Any, tools: list[dict[str, Any]]) -> ToolChoice:
    """A choice of tools in the format of OpenAI's APIs.

    Args:
        given: "auto", "none", "required", or an object that names a function, or those allowed.
            `/v1/responses` has in the object itself what `/v1/chat/completions` has in a part.
        tools: in the format of `/v1/chat/completions`.

    Raises:
        Refused: 400.
    """
    if given == "none":
        return ToolChoice()
    if given in ("auto", "required"):
        return ToolChoice(tools, given == "required")
    kind = given.get("type") if isinstance(given, dict) else None
    part = given.get(kind, given) if kind in ("function", "allowed_tools") else None
    if kind == "function" and isinstance(part, dict) and isinstance(part.get("name"), str):
        return ToolChoice(tools, True, part["name"])
    if kind == "allowed_tools" and isinstance(part, dict) and isinstance(part.get("tools"), list):
        allowed = _allowed(part["tools"], {tool["function"]["name"] for tool in tools})
        chosen = [tool for tool in tools if tool["function"]["name"] in allowed]
        if part.get("mode", "auto") in ("auto", "required"):
            return ToolChoice(chosen, part.get("mode") == "required")
    text = 'tool_choice must be "auto", "none", "required", a function or allowed_tools'
    raise Refused(400, text, "invalid_value", "tool_choice")


def _allowed(given: list[Any], known: set[str]) -> set[str]:
    """The names of functions in the entries of `allowed_tools`."""
    allowed = set()
    for one in given:
        part = one.get("function", one) if isinstance(one, dict) else None
        name = part.get("name") if isinstance(part, dict) else None
        if not isinstance(name, str) or name not in known:
            text = f"tool_choice: {str(name)[:80]!r} is allowed, but is no function in tools"
            raise Refused(400, text, "invalid_value", "tool_choice")
        allowed.add(name)
    return allowed
