"""Chat templates. Every template of a model is rendered here, and nowhere else."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from outlier_mlx.engine.bounded import TemplateError, render_within_limits, text_after_reply
from outlier_mlx.upstream import TokenizerWrapper, inner_tokenizer, own_template, set_own_template

# Names of the same text in a message, for which templates ask.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of a conversation, as the model's chat template writes it.

    Args:
        tokenizer: its template is used.
        messages: each with "role" and "content"; they are not changed.
        options: those of transformers' `apply_chat_template`, and variables of the template.

    Raises:
        TemplateError: the template refuses the messages, fails or exceeds its limits, or the
            model has none.
    """
    try:
        # Not the method of a subclass, which calls this function.
        text = TokenizerWrapper.apply_chat_template(
            tokenizer, messages, **options | {"tokenize": False}
        )
    except Exception as error:  # a template can raise anything
        reason = str(error) or type(error).__name__
        raise TemplateError(f"the chat template failed: {reason}") from error
    if not isinstance(text, str):
        raise TemplateError("the chat template failed: it does not give a text")
    return text


def bound(tokenizer: TokenizerWrapper) -> None:
    """Make a tokenizer of mlx-lm render its template within limits.

    A chat format that is Python code of transformers or mlx-lm stays as it is.
    """
    inner = inner_tokenizer(tokenizer)
    own = type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own_template(tokenizer) is None and not own:
        set_own_template(tokenizer, partial(_text, inner))


def _text(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    documents: list[dict[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    return_dict: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` makes it.

    Args:
        tokenizer: its chat template and special tokens are used.
        conversation: messages with "role" and "content"; fields that are None are left out.
        tools: JSON schemas of functions.
        documents: documents with "title" and "text".
        chat_template: another template, or the name of one of the tokenizer's.
        add_generation_prompt: whether to add the beginning of a reply.
        continue_final_message: whether to leave out what follows the last message's content.
        return_dict: ignored, since there are no token ids to return.
        variables: further variables of the template.

    Raises:
        TemplateError: the template fails or exceeds its limits.
        ValueError: there is no template.
    """
    if strange := variables.keys() & _NOT_VARIABLES:
        raise TypeError(f"apply_chat_template: {min(strange)} is not supported")
    template = tokenizer.get_chat_template(chat_template, tools)
    messages = [_message(message) for message in conversation]
    mark = _mark_end(messages) if continue_final_message else ""
    given = {
        "messages": messages,
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    text = render_within_limits(template, tokenizer.special_tokens_map | variables | given)
    if not continue_final_message:
        return text
    before, found, after = text.rpartition(mark)
    if not found:
        raise TemplateError("it leaves out the end of the last message")
    # Where a template strips messages, it strips this one, too.
    return before if after.startswith(" ") else before.rstrip()


_NOT_VARIABLES = (
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    - inspect.signature(_text).parameters.keys()
)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it, with its reasoning under all names they ask for."""
    found = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING:
        if name in found:
            return {"thinking": found[name], **found, "reasoning_content": found[name]}
    return found


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's content; the space shows whether a template strips it."""
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise TemplateError("there is no last message with a text to continue")
    mark = "END_OF_THE_LAST_MESSAGE"
    messages[-1]["content"] += f"{mark} "
    return mark


def end_of_turn(tokenizer: TokenizerWrapper) -> int | None:
    """The added token with which the chat template ends a reply; None if there is none.

    Models end replies with it, also where generation_config.json names another token only.
    """
    inner = inner_tokenizer(tokenizer)
    try:
        template = inner.get_chat_template()
    except ValueError:
        return None
    rest = text_after_reply(template, inner.special_tokens_map)
    added = inner.get_added_vocab()
    found = max((text for text in added if text and rest.startswith(text)), key=len, default=None)
    return None if found is None else added[found]
