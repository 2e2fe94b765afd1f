"""The tokens of a request's prompt, and where in them a KV cache is worth keeping."""

from dataclasses import dataclass
from typing import Any

from outlier_mlx.engine.templates import TemplateError
from outlier_mlx.serve.prefix_cache import Kind
from outlier_mlx.serve.request import Request
from outlier_mlx.upstream import TokenizerWrapper

# What a model without a chat template gets, as from mlx-lm.
ROLES = {"system": "ASSISTANT's RULE: ", "user": "USER: ", "assistant": "ASSISTANT: "}
# A prompt may end with a mark that begins the reasoning, and a few more tokens.
TAIL = 11


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt.

    Attributes:
        tokens: at least one.
        ends: where parts end that other prompts can share, as numbers of tokens in order, and what
            ends there. The last token is never part of them: generation starts from it.
        initial: "reasoning" if the reply begins inside the marks of reasoning, else the name of
            another state of mlx-lm's `TextStateMachine`, mostly "normal".
    """

    tokens: list[int]
    ends: tuple[tuple[int, Kind], ...]
    initial: str = "normal"


def read_prompt(request: Request, tokenizer: Any) -> Prompt:
    """The prompt of a request; its tokens may be none.

    Args:
        request: a checked request.
        tokenizer: the model's, as `BoundedTokenizer`.

    Raises:
        Refused: 400, the text is too long.
        TemplateError: the chat template fails.
    """
    if request.messages is None:
        prompt = request.prompt
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Prompt(tokens, ((len(tokens) - 1, "user"),))
    if not tokenizer.has_chat_template:
        tokens = tokenizer.encode(_plain(request.messages))
        return Prompt(tokens, ((len(tokens) - 1, "user"),))
    template = {"tools": request.tools or None} | request.template
    tokens = tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, **template)
    if not tokens:
        return Prompt(tokens, ())
    system = _system_end(request.messages, tokens, tokenizer, template)
    last = len(tokens) - 1
    if tokenizer.has_thinking:
        mark = tokenizer.rfind_think_start(tokens, start=max(0, len(tokens) - TAIL))
        last = mark if mark >= 0 else last
    ends: list[tuple[int, Kind]] = [(system, "system"), (last, "user")]
    return Prompt(
        tokens,
        tuple((end, kind) for end, kind in ends if end > 0 and (kind == "user" or end < last)),
        _initial(tokens, tokenizer),
    )


def _plain(messages: list[dict[str, Any]]) -> str:
    lines = [f"{ROLES.get(message['role'], '')}{message['content']}\n" for message in messages]
    return ("".join(lines) + ROLES["assistant"]).rstrip()


def _initial(tokens: list[int], tokenizer: TokenizerWrapper) -> str:
    """The state in which the reply begins."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    opened = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
    return "reasoning" if opened else "normal"


def _system_end(
    messages: list[dict[str, Any]], tokens: list[int], tokenizer: Any, template: dict[str, Any]
) -> int:
    """Number of tokens that do not depend on what follows the system messages; 0: not known."""
    count = 0
    while count < len(messages) and messages[count]["role"] == "system":
        count += 1
    if not count or messages[-1]["role"] != "user":
        return 0
    probe = [*messages[:count], {"role": "user", "content": ""}]
    try:
        short = tokenizer.apply_chat_template(probe, add_generation_prompt=False, **template)
    except TemplateError:  # it refuses an empty message
        return 0
    pairs = enumerate(zip(short, tokens, strict=False))
    return next((place for place, (a, b) in pairs if a != b), 0)
