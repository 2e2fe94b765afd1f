"""The output of a response in the Responses API: as an object, and as the events of a stream."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Answer, Event, Usage
from outlier_mlx.serve.apis.store import Kept, ResponseStore
from outlier_mlx.serve.calls import Call
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.request import Request

PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
ARGUMENTS = "response.function_call_arguments"
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


def new_id(prefix: str) -> str:
    """An id that cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(24)}"


class ResponseAnswer(Answer):
    """A response, whole or streamed.

    Args:
        body: the request's body without nulls.
        items: the items of the conversation before the response.
        request: what was made of them.
        model: the model's name.
        store: where the response is kept; None: it is not.
    """

    def __init__(
        self,
        body: dict[str, Any],
        items: list[Any],
        request: Request,
        model: str,
        store: ResponseStore | None,
    ) -> None:
        self._items, self._store = items, store
        self._sent = 0
        self._open: dict[str, Any] | None = None
        self._cut = False
        self._output: list[dict[str, Any]] = []
        self.response = _response(body, request, model) | {"output": self._output}

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The response."""
        for piece in wholes:
            for _ in self.events(0, piece):
                pass
        for _ in self.end(usage):
            pass
        return self.response

    def begin(self, usage: Usage) -> Iterator[Event]:
        """The response without output."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def events(self, number: int, piece: Piece) -> Iterator[Event]:
        """Items that begin, grow and end."""
        if piece.arguments:
            yield self._argue(piece.arguments)
        if piece.reasoning:
            yield from self._begin("reasoning")
            yield self._grow("response.reasoning_text.delta", piece.reasoning)
        if piece.text:
            yield from self._begin("message")
            logprobs = [_logprob(token) for token in piece.logprobs]
            self._content().setdefault("logprobs", []).extend(logprobs)
            yield self._grow(
                "response.output_text.delta",
                piece.text,
                logprobs=[_without_bytes(token) for token in logprobs],
            )
        for call in piece.calls:
            yield from self._call(call)
        self._cut = piece.finish_reason == "length"

    def end(self, usage: Usage) -> Iterator[Event]:
        """The last item's end, and the whole response."""
        if not self._output:
            yield from self._begin("message")
        yield from self._finish(incomplete=self._cut)
        status = "incomplete" if self._cut else "completed"
        self.response |= {
            "status": status,
            "completed_at": None if self._cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if self._cut else None,
            "usage": _usage(usage),
        }
        if self._store is not None:
            self._store.keep(Kept(self.response, self._items + self._output))
        yield self._event(f"response.{status}", response=self.response)

    def failed(self, refused: Refused) -> Iterator[Event]:
        """The error, and the response as far as it came."""
        error = {"message": str(refused), "param": refused.param}
        yield self._event("error", code=refused.code or "server_error", **error)
        self.response |= {
            "status": "failed",
            "error": {"code": "server_error", "message": str(refused)},
        }
        yield self._event("response.failed", response=self.response)

    def _event(self, kind: str, **data: Any) -> Event:
        self._sent += 1
        return Event({"type": kind, "sequence_number": self._sent - 1, **data}, kind)

    def _place(self, *, part: bool) -> dict[str, Any]:
        """Where the item is that is open, or its part."""
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._output) - 1}
        return place | {"content_index": 0} if part else place

    def _content(self) -> dict[str, Any]:
        assert self._open is not None
        content: dict[str, Any] = self._open["content"][0]
        return content

    def _begin(self, kind: str) -> Iterator[Event]:
        """End the item that is open, and begin another, unless it is of this kind."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._finish()
        item: dict[str, Any] = {"id": new_id(PREFIXES[kind]), "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        yield from self._add(item)
        part: dict[str, Any] = {"type": PARTS[kind], "text": ""}
        if kind == "message":
            part["annotations"] = []
        item["content"].append(part)
        yield self._event("response.content_part.added", **self._place(part=True), part=part)

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open = item
        self._output.append(item)
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item=item)

    def _grow(self, kind: str, delta: str, **more: Any) -> Event:
        self._content()["text"] += delta
        return self._event(kind, **self._place(part=True), delta=delta, **more)

    def _call(self, call: Call) -> Iterator[Event]:
        yield from self._finish()
        item = {
            "id": new_id(PREFIXES["function_call"]),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        yield from self._add(item)
        if call.arguments:
            yield self._argue(call.arguments)

    def _argue(self, delta: str) -> Event:
        """More of the arguments of the call that is open."""
        assert self._open is not None
        self._open["arguments"] += delta
        return self._event(f"{ARGUMENTS}.delta", **self._place(part=False), delta=delta)

    def _finish(self, *, incomplete: bool = False) -> Iterator[Event]:
        """End the item that is open."""
        item = self._open
        if item is None:
            return
        if item["type"] in PARTS:
            place, part = self._place(part=True), self._content()
            done = {"text": part["text"]}
            if item["type"] == "message":
                done["logprobs"] = [_without_bytes(token) for token in part.get("logprobs", [])]
            yield self._event(f"response.{PARTS[item['type']]}.done", **place, **done)
            yield self._event("response.content_part.done", **place, part=part)
        if item["type"] == "function_call":
            place = self._place(part=False)
            yield self._event(f"{ARGUMENTS}.done", **place, arguments=item["arguments"])
        item["status"] = "incomplete" if incomplete else "completed"
        index = len(self._output) - 1
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._open = None


class TokenCount(Answer):
    """The answer to the question how many tokens an input has."""

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The number of tokens."""
        return {"object": "response.input_tokens", "input_tokens": usage.prompt}


def _response(body: dict[str, Any], request: Request, model: str) -> dict[str, Any]:
    """A response that has just begun, with what the request says, or means by not saying it."""
    effort = body.get("reasoning", {}).get("effort")
    text = {name: value for name, value in body.get("text", {}).items() if value is not None}
    tools = [
        {
            "type": "function",
            "name": tool["name"],
            "description": tool.get("description"),
            "parameters": tool.get("parameters"),
            "strict": bool(tool.get("strict")),
        }
        for tool in body.get("tools", ())
    ]
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": body.get("metadata", {}),
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_calls,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "tool_choice": _choice(body.get("tool_choice", "auto")),
        "tools": tools,
        "top_logprobs": request.alternatives or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _choice(given: Any) -> Any:
    """A choice of tools with what may be left out."""
    if isinstance(given, str):
        return given
    part = given.get(given["type"], given)
    if given["type"] == "function":
        return {"type": "function", "name": part["name"]}
    return {"type": "allowed_tools", "mode": part.get("mode", "auto"), "tools": part["tools"]}


def _usage(usage: Usage) -> dict[str, Any]:
    """Numbers of tokens; 0 cached ones where the client is not told."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached or 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning} | usage.predictions,
        "total_tokens": usage.prompt + usage.completion,
    }


def _logprob(token: dict[str, Any]) -> dict[str, Any]:
    """A token of a message; one that is part of a character has no bytes of its own."""
    told = _one_logprob(token)
    return told | {"top_logprobs": [_one_logprob(other) for other in token["top_logprobs"]]}


def _one_logprob(token: dict[str, Any]) -> dict[str, Any]:
    return {name: token[name] for name in ("token", "logprob")} | {"bytes": token["bytes"] or []}


def _without_bytes(token: dict[str, Any]) -> dict[str, Any]:
    """A token as events have it."""
    tokens = (token, *token.get("top_logprobs", ()))
    first, *others = ({name: t[name] for name in ("token", "logprob")} for t in tokens)
    return first | {"top_logprobs": others}
