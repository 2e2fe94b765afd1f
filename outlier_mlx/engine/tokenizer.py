"""The tokenizer of a loaded model: mlx-lm's, with templates rendered in one place."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer

from outlier_mlx.engine.templates import bound, end_of_turn, render


class Tokenizer(TokenizerWrapper):
    """mlx-lm's wrapper of a tokenizer of transformers; see `load`."""

    @classmethod
    def load(cls, folder: Path, ends: int | list[int] | None) -> "Tokenizer":
        """Load the tokenizer in a folder.

        Args:
            folder: has the tokenizer's files; no code in it is run.
            ends: the ids that end a text, besides the tokenizer's own and the chat template's.
        """
        loaded = mlx_lm_load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=ends)
        tokenizer = cls.__new__(cls)
        tokenizer.__dict__.update(loaded.__dict__)
        bound(tokenizer)
        end = end_of_turn(tokenizer)
        if end is not None:
            tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, end}
        return tokenizer

    def apply_chat_template(self, *messages: Any, tokenize: bool = True, **options: Any) -> Any:
        """The text or the tokens of a conversation; see `templates.render`.

        Raises:
            TemplateError: the template refuses the messages, fails, or exceeds its limits.
        """
        text = render(self, *messages, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text
