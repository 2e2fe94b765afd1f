"""Drafts of next tokens: from the text itself, or from a smaller model."""

from typing import Any

import mlx.nn as nn

from outlier_mlx.engine.distributed.ranks import ranks
from outlier_mlx.engine.drafting.gate import Costs
from outlier_mlx.engine.drafting.lookup import PromptLookup
from outlier_mlx.engine.prompts import embedding_rows
from outlier_mlx.engine.steps import Drafts, draft_room


class Drafting:
    """What guesses at next tokens, for all texts of a model; it knows what steps cost.

    Args:
        model: the model that checks drafts.
        lookup: whether drafts are looked up in the text, if there is no draft model.
        draft_model: a smaller model with the same tokens.
        num_draft_tokens: tokens of a draft of that model, at most.

    Raises:
        OutlierError: a draft model is of no use, since its cache or that of the model cannot go
            back to an earlier token.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lookup: bool = True,
        draft_model: nn.Module | None = None,
        num_draft_tokens: int = 3,
    ) -> None:
        self._lookup = lookup
        self._draft_model, self._most = draft_model, num_draft_tokens
        self._rows = embedding_rows(model)
        self._costs = Costs()
        if draft_model is not None:
            from outlier_mlx.engine.drafting.draft_model import check_caches

            check_caches(model, draft_model)

    def new(self, cache: list[Any]) -> Drafts | None:
        """Drafts for a new text with this cache; None if there are none.

        Over several ranks there are none: the times by which they pay differ from rank to rank.
        """
        if draft_room(cache) < 1 or ranks().size > 1:
            return None
        if self._draft_model is not None:
            from outlier_mlx.engine.drafting.draft_model import ModelDrafts

            return ModelDrafts(self._draft_model, self._costs, self._most, self._rows or 1 << 31)
        return PromptLookup(self._costs) if self._lookup else None
