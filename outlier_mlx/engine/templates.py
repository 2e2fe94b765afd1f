"""Chat templates. Every template of a model is rendered here, and nowhere else."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from outlier_mlx.errors import OutlierError


class TemplateError(OutlierError):
    """A chat template refuses the messages, or fails."""


def render(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of a conversation, as the model's chat template writes it.

    Args:
        tokenizer: its template is used.
        messages: each with "role" and "content"; they are not changed.
        options: those of transformers' `apply_chat_template`, and variables of the template.

    Raises:
        TemplateError: the template refuses the messages or fails, or the model has none.
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
