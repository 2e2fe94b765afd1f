"""The tokenizer of a loaded model: mlx-lm's wrapper, with texts and templates made here."""

from copy import copy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from outlier_mlx.engine.detokenizer import Detokenizer, special_ids
from outlier_mlx.engine.templates import bound, end_of_turn, render
from outlier_mlx.upstream import (
    TokenizerWrapper,
    _infer_tool_parser,
    _tokenizer_defaults,
    detokenizer,
    inner_tokenizer,
    module_of,
    set_detokenizer,
)


class Tokenizer(TokenizerWrapper):
    """mlx-lm's wrapper of a tokenizer of transformers; see `load`."""

    @classmethod
    def load(cls, folder: Path, ends: int | list[int] | None) -> "Tokenizer":
        """Load the tokenizer in a folder.

        It has all that mlx-lm's `load_tokenizer` gives it, except for its detokenizers: they make
        a list of the whole vocabulary first, which takes most of the time, and fail on some.

        Args:
            folder: has the tokenizer's files; no code in it is run.
            ends: the ids that end a text, besides the tokenizer's own and the chat template's.

        Raises:
            Exception: whatever transformers raises for wrong files.
        """
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        defaults = _tokenizer_defaults(folder) or {}
        if ends is None:
            ends = defaults.get("eos_token_ids")
        tokenizer = cls(
            own,
            Detokenizer,
            eos_token_ids=[ends] if isinstance(ends, int) else ends,
            **_chat_format(own, defaults),
            **_tool_calls(own, defaults),
        )
        bound(tokenizer)
        end = end_of_turn(tokenizer)
        if end is not None:
            tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, end}
        return tokenizer

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out with `skip_special_tokens`."""
        return special_ids(inner_tokenizer(self))

    def after(self, tokens: list[int]) -> "Tokenizer":
        """The same, with a detokenizer for texts that continue a prompt of these tokens."""
        other = copy(self)
        set_detokenizer(other, detokenizer(self).after(tokens))
        return other

    def within(self, token: int) -> str:
        """The text of a token within a text: with the blank that it would lose at the beginning."""
        own = inner_tokenizer(self)
        alone, twice = own.decode([token]), own.decode([token, token])
        return str(twice)[len(alone) :]

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text, as transformers' `encode` gives them, but never with two BOS tokens.

        Most tokenizers put one before every text; then one with which the text begins is that one.
        """
        options = {"verbose": False} | options  # what is too long is told elsewhere
        own = inner_tokenizer(self)
        tokens: list[int] = own.encode(text, **options)
        if len(tokens) < 2 or tokens[0] != tokens[1]:
            return tokens
        written = own.encode(text, **options | {"add_special_tokens": False})
        added = len(tokens) > len(written) and tokens[1 : len(written) + 1] == written
        return tokens[1:] if added else tokens

    def apply_chat_template(self, *messages: Any, tokenize: bool = True, **options: Any) -> Any:
        """The text or the tokens of a conversation; see `templates.render`.

        Raises:
            TemplateError: the template refuses the messages, fails, or exceeds its limits.
        """
        text = render(self, *messages, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _chat_format(own: PreTrainedTokenizerBase, defaults: dict[str, Any]) -> dict[str, Any]:
    """The template and the form of replies that mlx-lm has in Python for a few models."""
    settings = own.init_kwargs
    name = settings.get("chat_template_type", defaults.get("chat_template_type"))
    if not name:
        return {}
    module = module_of("mlx_lm.chat_templates", name)
    # A default does not replace the model's own template.
    replaces = "chat_template_type" in settings or own.chat_template is None
    return {
        "chat_template": module.apply_chat_template if replaces else None,
        "response_format": getattr(module, "RESPONSE_FORMAT", None),
    }


def _tool_calls(own: PreTrainedTokenizerBase, defaults: dict[str, Any]) -> dict[str, Any]:
    """How the model's calls of tools are found and parsed, if mlx-lm knows it."""
    name = own.init_kwargs.get("tool_parser_type", defaults.get("tool_parser_type"))
    if name is None:
        name = _infer_tool_parser(own)
    if name is None:
        return {}
    module = module_of("mlx_lm.tool_parsers", name)
    return {
        "tool_parser": module.parse_tool_call,
        "tool_call_start": module.tool_call_start,
        "tool_call_end": module.tool_call_end,
    }
