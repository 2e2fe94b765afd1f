"""Drafts by a smaller model with the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.drafting.gate import Clock, Costs, Gate
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.engine.memory import DRAFT_STEP
from outlier_mlx.engine.prompts import embedding_rows
from outlier_mlx.engine.steps import draft_room
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import raw_config
from outlier_mlx.upstream import make_prompt_cache, trim_prompt_cache

# A draft model was asked for, so it may begin.
HOPEFUL = 0.8
# So many tokens are read together with a draft.
_FEW = 16


class ModelDrafts:
    """Drafts of a model, as long as they pay; see `engine.steps.Drafts`.

    Args:
        model: the draft model.
        costs: times of steps of the large model, those of drafting included.
        most: tokens of a draft, at most.
        rows: number of ids that the large model knows.
    """

    def __init__(self, model: nn.Module, costs: Costs, most: int, rows: int) -> None:
        self._model, self._rows = model, rows
        self._cache: list[Any] = make_prompt_cache(model)
        self._costs = costs
        self._gate = Gate(costs, [HOPEFUL], most)
        self._clock = Clock(costs)
        self._tokens: list[int] = []
        # Number of tokens in the cache; all that are among `_tokens` are the first of them.
        self._cached = 0
        self._ready = self._behind = False

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin with a prompt, or go on with a text that got more tokens without drafts."""
        self._tokens = list(tokens)
        self._clock = Clock(self._costs)
        self._ready = self._behind = False

    def ready(self) -> bool:
        """Whether the next token is worth waiting for."""
        return self._ready

    def draft(self, token: int, most: int) -> list[int]:
        """The tokens that the draft model takes for the likeliest.

        None if that would not pay, and as long as it has more than a few tokens to read: nobody
        waits for more than a slice of them.
        """
        self._clock.waited()
        new = [*self._tokens[self._cached :], token]
        if max(new) >= (embedding_rows(self._model) or self._rows):
            return []
        self._behind = len(new) > _FEW
        if self._behind:
            self._read(new[: min(DRAFT_STEP, len(new) - 1)])
            return []
        # What is drafted in a window that is full could not be taken back.
        count = self._gate.longest(0, min(most, draft_room(self._cache) - len(new)))
        if not count:
            return []
        ids, drafted = mx.array(new), []
        for _ in range(count):
            ids = mx.argmax(self._model(ids[None], cache=self._cache)[:, -1, : self._rows], axis=-1)
            mx.async_eval(ids)
            drafted.append(ids)
        self._cached = len(self._tokens) + count
        found: Any = mx.concatenate(drafted).tolist()
        return list(found)

    def _read(self, tokens: list[int]) -> None:
        self._model(mx.array(tokens)[None], cache=self._cache)
        mx.eval([entry.state for entry in self._cache])
        self._cached += len(tokens)

    def note(self, tokens: Sequence[int], drafted: int) -> None:
        """Note the tokens of a step."""
        self._clock.note(drafted + 1)
        self._tokens += tokens
        if drafted:
            self._gate.judge(0, len(tokens) - 1, drafted)
        surplus = self._cached - len(self._tokens)
        if surplus > 0:
            trim_prompt_cache(self._cache, surplus)
            self._cached -= surplus
        # What made the draft worth while, before there was so much to read, is still so.
        self._ready = self._behind or self._gate.pays(0) or drafted > 0


def check_caches(model: nn.Module, draft_model: nn.Module) -> None:
    """Check that the KV caches of both models can go back to an earlier token.

    Raises:
        OutlierError: one of them cannot, such as that of linear attention.
    """
    ways = {"the model's": (model, "leave it out"), "its own": (draft_model, "name another model")}
    for whose, (checked, way) in ways.items():
        if draft_room(make_prompt_cache(checked)) < 1:
            text = f"{whose} cache cannot go back to an earlier token, which drafts need"
            raise OutlierError(f"--draft-model: {text}: {way}")


def check_same_tokens(folder: Path, draft: Path) -> None:
    """Check that two models have the same tokens, before either is loaded.

    Raises:
        OutlierError: a token of one is another token of the other, or none; or a special token is
            not special there.
    """
    mine, other = (load_tokenizer(path, raw_config(path)) for path in (folder, draft))
    difference = _difference(mine, other)
    if difference is not None:
        raise OutlierError(
            f"--draft-model {draft.name}: its tokenizer is not that of {folder.name}: {difference}"
        )


def _difference(mine: Tokenizer, other: Tokenizer) -> str | None:
    """What differs between two tokenizers; None if all tokens are the same."""
    ours, theirs = mine.get_vocab(), other.get_vocab()
    if ours != theirs:
        different = [
            token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        ]
        return f"{len(different)} tokens differ, such as {min(different)!r}"
    if mine.special_ids != other.special_ids:
        token = min(mine.special_ids ^ other.special_ids)
        return f"only one of them has {token} as a special token"
    return None
