"""What may be fed to a model: only tokens that its embedding has rows for."""

from collections.abc import Iterable

import mlx.nn as nn

from outlier_mlx.models.config import describe_args
from outlier_mlx.models.token_ids import check_ids


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of a loaded model's embedding; None if it has none that is known."""
    vocab = describe_args(getattr(model, "args", None)).vocab
    if vocab is not None:
        return vocab
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    embeddings = (module for module in model.modules() if isinstance(module, kinds))
    return next((int(module.weight.shape[0]) for module in embeddings), None)


def check_tokens(model: nn.Module, ids: Iterable[int], what: str = "the prompt") -> None:
    """Check that a model's embedding has a row for each of these tokens.

    Every prompt and text is checked before it reaches the model: for other ids, MLX reads foreign
    memory, or ends the process.

    Raises:
        OutlierError: names the first token without a row; `what` is how messages call the tokens.
    """
    check_ids(ids, embedding_rows(model), what)
