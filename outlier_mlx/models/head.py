"""Whether a model's head is its embedding. The files decide, not the config."""

from collections.abc import Mapping

from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges

NOTE = "config.json ties the head to the embedding, but the files hold one of its own: it is kept"
_SLAB_BYTES = 1 << 22


def settle_head(stated: object, tensors: Mapping[str, TensorRef]) -> tuple[bool, str | None]:
    """Whether the head is the embedding.

    A stored head is used, as in transformers, unless it equals the embedding and the config ties
    them. Without a stored head, the head is tied unless the config says that it is not.

    Args:
        stated: `tie_word_embeddings` of the config, or None.
        tensors: the model's, by mlx-lm's names; the head and the embedding may be compared.

    Returns:
        Whether it is tied, and a note if the config says otherwise.

    Raises:
        CheckpointError: a file is damaged.
    """
    if not any(name.startswith("lm_head.") for name in tensors):
        return stated is not False, None
    if stated is not True:
        return False, None
    return (True, None) if _equal(tensors) else (False, NOTE)


def _equal(tensors: Mapping[str, TensorRef]) -> bool:
    """Whether head and embedding are the same, byte for byte."""
    head, embedding = (
        {name.removeprefix(side): t for name, t in tensors.items() if name.startswith(side)}
        for side in ("lm_head.", "model.embed_tokens.")
    )
    return head.keys() == embedding.keys() and all(_same(head[k], embedding[k]) for k in head)


def _same(one: TensorRef, other: TensorRef) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    rows = one.shape[0] if one.shape else 1
    for start, stop in row_ranges(rows, one.nbytes // max(1, rows), _SLAB_BYTES):
        a, b = (tensor.read(start, stop) for tensor in (one, other))
        if a.tobytes() != b.tobytes():
            return False
    return True
