"""`/v1/chat/completions` of OpenAI's API."""

from collections.abc import Iterable, Iterator
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.completions import CompletionAnswer, common_fields
from outlier_mlx.serve.fields import CHAT, FIELDS, OUTLIER_FIELDS, check_fields
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.structured import Form, given_schema, tool_choice


class Chat(Api):
    """Translates chat completions."""

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """The request of a conversation.

        Raises:
            Refused: 400, with the parameter's name.
        """
        unused: list[str] = []
        body = check_fields(body, FIELDS, unused, endpoint=CHAT)
        common = common_fields(body, limits, unused)
        tools = limits.reader.tools(body.get("tools", []))
        messages = limits.reader.messages(body.get("messages", []), unused)
        template = limits.template_variables(body.get("chat_template_kwargs", {}), unused)
        effort = limits.effort(body.get("reasoning_effort"), "reasoning_effort", unused)
        choice = tool_choice(body.get("tool_choice", "auto"), tools)
        several = body.get("parallel_tool_calls", True)
        experts = _experts(body.get("outlier", {}), limits, unused)
        request = Request(
            messages=messages,
            tools=choice.tools,
            parallel_calls=several,
            constraint=Form(*given_schema(body), choice, several).constraint(limits.grammars),
            template=effort | template,
            alternatives=_alternatives(body, limits),
            experts=experts,
            unused=tuple(dict.fromkeys(unused)),
            **common,
        )
        return [request]

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> "ChatAnswer":
        """A chat completion."""
        return ChatAnswer(model, include_usage=requests[0].include_usage)


class ChatAnswer(CompletionAnswer):
    """A chat completion: whole, or as the chunks of a stream."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        kinds = "chatcmpl", "chat.completion", "chat.completion.chunk"
        super().__init__(*kinds, model, include_usage=include_usage)
        self._calls = 0

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """A message, or what is new in it."""
        message: dict[str, Any] = {"role": "assistant"}
        if piece.text or not stream:
            message["content"] = piece.text or None
        if piece.reasoning:
            # Programs look for the one or the other name.
            message["reasoning"] = message["reasoning_content"] = piece.reasoning
        if calls := list(self._calls_of(piece, stream=stream)):
            message["tool_calls"] = calls
        logprobs = {"logprobs": {"content": piece.logprobs}} if piece.logprobs else {}
        return logprobs | {"delta" if stream else "message": message}

    def more(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The experts of the tokens, if the client asked for them."""
        experts = [token for piece in pieces for token in piece.experts]
        return {"outlier": {"experts": experts}} if experts else {}

    def _calls_of(self, piece: Piece, *, stream: bool) -> Iterator[dict[str, Any]]:
        """Calls of functions; in a stream, also more of the arguments of the one before."""
        if piece.arguments:
            yield {"index": self._calls - 1, "function": {"arguments": piece.arguments}}
        for call in piece.calls:
            number = {"index": self._calls} if stream else {}
            function = {"name": call.name, "arguments": call.arguments}
            yield number | {"id": call.id, "type": "function", "function": function}
            self._calls += 1


def _experts(given: dict[str, Any], limits: Limits, unused: list[str]) -> bool:
    """Whether experts are to be told."""
    options = check_fields(given, OUTLIER_FIELDS, unused, "outlier")
    experts: bool = options.get("experts", False)
    if experts and not limits.has_experts:
        text = "outlier.experts: only a tier has experts to tell; this model is none"
        raise Refused(400, text, "unsupported_parameter", "outlier")
    return experts


def _alternatives(body: dict[str, Any], limits: Limits) -> int | None:
    logprobs, alternatives = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(logprobs, bool):
        text = "logprobs must be true or false; top_logprobs is the number of alternatives"
        raise Refused(400, text, "invalid_value", "logprobs")
    return min(alternatives, limits.vocab) if logprobs or alternatives else None
