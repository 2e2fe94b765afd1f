"""Digests by which a work folder knows the model and the texts that it belongs to."""

from hashlib import blake2b
from pathlib import Path

import numpy as np

from outlier_mlx.storage.safetensors import header_bytes
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.train.texts import Corpora

# Of each file of weights, so many pieces are read, at equal distances.
_PIECES, _PIECE = 256, 4096


def digest_of_model(folder: Path) -> str:
    """A digest of a model's config, and of its weights' headers and samples of their bytes.

    Any further training changes nearly every number, so that samples tell it; to read all of a
    large model would take minutes at every start.

    Raises:
        CheckpointError: there is no model.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted({tensor.file for tensor in read_shards(folder).values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(header_bytes(file.read(8))))
            for place in np.linspace(0, max(0, size - _PIECE), _PIECES).astype(int):
                file.seek(int(place))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def digest_of_data(corpora: Corpora) -> str:
    """A digest of all windows, and of the names of their texts."""
    digest = blake2b(digest_size=16)
    for corpus in corpora:
        for windows in (corpus.train, corpus.held_out):
            digest.update(f"{corpus.name} {windows.shape} {windows.dtype} ".encode())
            digest.update(np.ascontiguousarray(windows).data)
    return digest.hexdigest()
