"""`/v1/responses` of OpenAI's API: items in, items out, and what was said is kept for the next."""

from dataclasses import fields
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.items import Conversation, items_of
from outlier_mlx.serve.apis.output import ResponseAnswer, TokenCount
from outlier_mlx.serve.apis.store import ResponseStore
from outlier_mlx.serve.fields import (
    ACCEPTED,
    ALTERNATIVES,
    CHAT,
    EFFORT,
    FIELDS,
    FLAG,
    LENGTH,
    LIST,
    OBJECT,
    STRING,
    TOOL_CHOICE,
    Either,
    Field,
    check_fields,
    honoured,
    refused,
    typed,
    wrong,
)
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.request import Request, Sampling
from outlier_mlx.serve.structured import Form, schema_of_format, tool_choice

RESPONSES = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
#: Fields that the Responses API has, with those of this server.
OWN_FIELDS: dict[str, Field] = {
    "input": honoured(Either((STRING, LIST))),
    "instructions": honoured(STRING),
    "previous_response_id": honoured(STRING),
    "store": honoured(FLAG),
    "max_output_tokens": honoured(LENGTH),
    "stream": honoured(FLAG),
    **{known.name: FIELDS[known.name] for known in fields(Sampling)},
    "seed": FIELDS["seed"],
    "stop": FIELDS["stop"],
    "include": honoured(LIST),
    "top_logprobs": honoured(ALTERNATIVES),
    "text": honoured(OBJECT),
    "reasoning": honoured(OBJECT),
    "tools": honoured(LIST),
    "tool_choice": honoured(TOOL_CHOICE),
    "parallel_tool_calls": honoured(FLAG),
    "metadata": honoured(OBJECT),
    "chat_template_kwargs": honoured(OBJECT),
    "access_programs": refused(),
    "background": refused(False),
    "background_options": refused(),
    "context_management": refused([]),
    "conversation": refused(),
    "moderation": refused(),
    "prompt": refused(),
    "truncation": refused("disabled"),
    "image": ACCEPTED,
    "max_tool_calls": ACCEPTED,
    "stream_options": ACCEPTED,
}
#: What `/v1/chat/completions` calls otherwise is named, and not taken for unknown.
RESPONSE_FIELDS: dict[str, Field] = OWN_FIELDS | {
    name: Field(field.use, field.values, field.harmless, field.endpoint or CHAT)
    if field.use == "honoured"
    else field
    for name, field in FIELDS.items()
    if name not in OWN_FIELDS
}
TEXT_FIELDS: dict[str, Field] = {
    "format": honoured(OBJECT),
    "verbosity": refused("medium"),
}
REASONING_FIELDS: dict[str, Field] = {
    "effort": honoured(EFFORT),
    "context": refused("auto"),
    "mode": refused("standard"),
    "summary": ACCEPTED,
    "generate_summary": ACCEPTED,
}
TOOL_FIELDS: dict[str, Field] = {
    "type": honoured(STRING),
    "name": honoured(STRING),
    "description": honoured(STRING),
    "parameters": honoured(OBJECT),
    "strict": honoured(FLAG),
    "defer_loading": refused(False),
    "async": refused(False),
    "allowed_callers": refused(["direct"]),
    "output_schema": ACCEPTED,
}
# What else can be included belongs to items that there never are.
INCLUDABLE = (
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
)


class Responses(Api):
    """Translates responses, and keeps them."""

    def __init__(self) -> None:
        self.store = ResponseStore()

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """The request of a conversation.

        Raises:
            Refused: 400, with the parameter's name.
        """
        unused: list[str] = []
        read = check_fields(body, RESPONSE_FIELDS, unused, endpoint=RESPONSES)
        reasoning = check_fields(read.get("reasoning", {}), REASONING_FIELDS, unused, "reasoning")
        text = check_fields(read.get("text", {}), TEXT_FIELDS, unused, "text")
        _check_metadata(read.get("metadata", {}))
        conversation = self._conversation(read)
        if limits.reader.probes.leaves_out("system messages after the first message"):
            conversation.join_instructions()
        unknown: list[str] = []
        places = conversation.places
        messages = limits.reader.messages(conversation.messages, unknown, places)
        unused += conversation.unused
        unused += [f"input.{name.removeprefix('messages.')}" for name in unknown]
        tools = _tools(read.get("tools", []), unused)
        template = limits.template_variables(read.get("chat_template_kwargs", {}), unused)
        effort = limits.effort(reasoning.get("effort"), "reasoning.effort", unused)
        length = read.get("max_output_tokens", 0)
        choice = tool_choice(read.get("tool_choice", "auto"), limits.reader.tools(tools))
        several = read.get("parallel_tool_calls", True)
        schema = schema_of_format(text.get("format", {"type": "text"}), "text.format")
        request = Request(
            messages=messages,
            tools=choice.tools,
            parallel_calls=several,
            constraint=Form(schema, "text.format", choice, several).constraint(limits.grammars),
            template=effort | template,
            stop=limits.stop_words(read.get("stop", []), "stop"),
            max_tokens=min(length or limits.max_tokens, limits.max_tokens),
            asked_tokens=length,
            sampling=limits.sampling_of(read),
            seed=read["seed"] % (1 << 64) if "seed" in read else None,
            alternatives=_alternatives(read, limits),
            stream=read.get("stream", False),
            unused=tuple(dict.fromkeys(unused)),
        )
        return [request]

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> ResponseAnswer:
        """A response.

        Raises:
            Refused: 400, the response to continue has been dropped since.
        """
        given = {name: value for name, value in body.items() if value is not None}
        items = self._before(given) + items_of(given.get("input"))
        store = self.store if given.get("store", True) else None
        return ResponseAnswer(given, items, requests[0], model, store)

    def kept(self, name: str) -> dict[str, Any]:
        """The response of this id.

        Raises:
            Refused: 404, it is not kept.
        """
        kept = self.store.get(name)
        if kept is None:
            raise _not_kept(404, name)
        return kept.response

    def drop(self, name: str) -> dict[str, Any]:
        """Drop a response.

        Raises:
            Refused: 404, it is not kept.
        """
        if not self.store.drop(name):
            raise _not_kept(404, name)
        return {"id": name, "object": "response", "deleted": True}

    def _before(self, body: dict[str, Any]) -> list[Any]:
        """The items of the conversation that is continued."""
        name = body.get("previous_response_id")
        if not name:
            return []
        kept = self.store.get(name)
        if kept is None:
            raise _not_kept(400, name)
        return kept.items

    def _conversation(self, body: dict[str, Any]) -> Conversation:
        conversation = Conversation()
        if body.get("instructions"):
            conversation.instruct(body["instructions"])
        for item in self._before(body):
            conversation.add(item, "previous_response_id")
        for number, item in enumerate(items_of(body.get("input"))):
            conversation.add(item, f"input[{number}]")
        return conversation


class InputTokens(Api):
    """Translates requests for the number of tokens of an input.

    Args:
        responses: reads the input.
    """

    generates = False

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """What `Responses` makes of the input."""
        return self._responses.requests(body, limits)

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> TokenCount:
        """The number of tokens."""
        return TokenCount()


def _not_kept(status: int, name: str) -> Refused:
    text = f"there is no response {name[:80]!r}: it was not stored, or was dropped since"
    if status == 404:
        return Refused(404, text, "response_not_found")
    return Refused(400, text, "previous_response_not_found", "previous_response_id")


def _check_metadata(metadata: dict[str, Any]) -> None:
    texts = all(isinstance(value, str) and len(value) <= 512 for value in metadata.values())
    if not texts or len(metadata) > MAX_METADATA or any(len(name) > 64 for name in metadata):
        text = (
            f"metadata must be up to {MAX_METADATA} strings of up to 512 characters, with names of"
            " up to 64"
        )
        raise Refused(400, text, "invalid_value", "metadata")


def _alternatives(body: dict[str, Any], limits: Limits) -> int | None:
    included = body.get("include", [])
    for name in included:
        if name not in INCLUDABLE:
            text = f"include: {str(name)[:60]!r} is not supported"
            raise Refused(400, text, "unsupported_value", "include")
    alternatives = body.get("top_logprobs", 0)
    return min(alternatives, limits.vocab) if LOGPROBS in included or alternatives else None


def _tools(given: list[Any], unused: list[str]) -> list[dict[str, Any]]:
    """Tools as `/v1/chat/completions` has them; `unused` gets names of fields of no effect."""
    tools = []
    for number, tool in enumerate(given):
        where = f"tools[{number}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise wrong(where, f"is a tool {typed(kind)}; only functions are supported")
        function = check_fields(tool, TOOL_FIELDS, unused, where)
        tools.append({"type": function.pop("type"), "function": function})
    return tools
