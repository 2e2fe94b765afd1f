"""What drafts next tokens for a command: the text itself, or a smaller model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlier_mlx.cli.loading import load_beside, load_model
from outlier_mlx.cli.options import Drafting, Loading
from outlier_mlx.storage.hub import Source, resolve

if TYPE_CHECKING:
    from outlier_mlx import engine


def check_draft_model(source: Source, drafting: Drafting) -> None:
    """Check that the draft model, if there is one, has the tokens of a model; loads neither.

    Raises:
        OutlierError: it has others.
    """
    if drafting.draft_model is None:
        return
    from outlier_mlx.engine.drafting.draft_model import check_same_tokens

    check_same_tokens(source.folder, resolve(drafting.draft_model).folder)


def load_draft_model(folder: Path, loading: Loading) -> Any:
    """Load a draft model with all its experts, in the thread that will use it."""
    return load_model(folder, loading.dtype)[0]


def load_drafting(
    model: Any, drafting: Drafting, loading: Loading, *, quiet: bool
) -> "engine.drafting.Drafting":
    """What drafts for a loaded model; a draft model was checked by `check_draft_model`.

    Raises:
        OutlierError: the KV cache of one of the models cannot go back to an earlier token.
    """
    from outlier_mlx.engine.drafting import Drafting as Engine

    named = drafting.draft_model
    draft = None if named is None else load_beside(named, loading, quiet=quiet)[0]
    return Engine(
        model,
        lookup=drafting.prompt_lookup,
        draft_model=draft,
        num_draft_tokens=drafting.num_draft_tokens,
    )
