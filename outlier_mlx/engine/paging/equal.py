"""Which experts have the same bytes, so that one slot can serve them all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256

from outlier_mlx.engine.paging.policies import Key
from outlier_mlx.storage.safetensors import TensorRef

# Rows of each array by which experts are told apart before all of their bytes are read.
_FIRST_ROWS = 8
_ROWS_AT_A_TIME = 1024


def equal_experts(stacks: Mapping[int, Sequence[TensorRef]]) -> dict[Key, Key]:
    """Find experts that are equal to an earlier one.

    Scales are read of all experts; first rows only where all scales of an expert are another's,
    too; and everything, of which SHA-256 is compared, only where these are, too. An expert that was
    never trained, with no trit but 0, is usually another's equal.

    Args:
        stacks: the tensors of a layer's experts, each (experts, out, ...), by the layer's number.

    Returns:
        The first (layer, expert) with the same bytes, for all others that have them.

    Raises:
        CheckpointError: a file ends before its time.
        OutlierError: a file cannot be read.
    """
    scales = {n: [t for t in stack if t.name.endswith(".scales")] for n, stack in stacks.items()}
    groups = [[(n, expert) for n in sorted(stacks) for expert in range(stacks[n][0].shape[0])]]
    groups = _split(groups, partial(_digest, scales, None))
    for rows in (_FIRST_ROWS, None):
        groups = _split(groups, partial(_digest, stacks, rows))
    return {key: first for first, *others in groups for key in others}


def _split(groups: list[list[Key]], label: Callable[[Key], bytes]) -> list[list[Key]]:
    """Split groups into those of one label; groups of one are left out."""
    found: list[list[Key]] = []
    for group in groups:
        by_label: dict[bytes, list[Key]] = {}
        for key in group:
            by_label.setdefault(label(key), []).append(key)
        found += [part for part in by_label.values() if len(part) > 1]
    return found


def _digest(stacks: Mapping[int, Sequence[TensorRef]], rows: int | None, key: Key) -> bytes:
    """SHA-256 of the first rows of an expert's arrays; of all rows, if `rows` is None."""
    digest, (layer, expert) = sha256(), key
    for tensor in stacks[layer]:
        for part in _parts(tensor, expert, rows):
            digest.update(part)
    return digest.digest()


def _parts(tensor: TensorRef, expert: int, rows: int | None) -> Iterator[memoryview]:
    """Some rows at a time of an expert's array."""
    experts, *shape = tensor.shape
    begin = tensor.offset + expert * (tensor.nbytes // experts)
    one = TensorRef(tensor.name, tensor.file, tensor.dtype, tuple(shape), begin)
    rows = one.shape[0] if rows is None else min(rows, one.shape[0])
    for row in range(0, rows, _ROWS_AT_A_TIME):
        yield one.read(row, min(row + _ROWS_AT_A_TIME, rows)).data
