"""The values of a stored model: packed bytes that stand for trits, and numbers that are finite."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from outlier_mlx.checkpoints.stored_model import StoredModel
from outlier_mlx.checkpoints.tier import expert_matrix
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.stored import FLOATS, is_packed, stored_modules
from outlier_mlx.storage.rounding import all_finite
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix, PackedTrits, row_ranges
from outlier_mlx.storage.ternary_matrix import TernarySource, slabs
from outlier_mlx.terminal import Progress, no_progress

_SLAB_BYTES = 1 << 24

#: How many bytes a check reads, and the check.
_Check = tuple[int, Callable[[], None]]


def check_values(model: StoredModel, progress: Progress = no_progress) -> None:
    """Check everything in a model's files that headers do not tell.

    Args:
        model: a tier, or another model that this project wrote.
        progress: called with bytes read so far, and in all.

    Raises:
        CheckpointError: bytes of an expert that no trits are packed into, scales that are no scales
            of ternary weights, or a number that is not finite; names the tensor.
    """
    checks = [*_experts(model), *_matrices(model), *_floats(model)]
    total = sum(nbytes for nbytes, _ in checks)
    done = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            running = [(nbytes, pool.submit(check)) for nbytes, check in checks]
            for nbytes, future in running:
                future.result()
                done += nbytes
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _experts(model: StoredModel) -> Iterator[_Check]:
    """Checks of ternary experts, an expert's slab of rows at a time."""
    config = model.config
    for module in stored_modules(config) if config is not None else ():
        assert config is not None
        ternary = "ternary" in config.raw or is_packed(module, config)
        if module.kind != "experts" or not ternary:
            continue
        for number in range(module.shape[0]):
            matrix = expert_matrix(model.tensors, module.path, number, module.shape[-1])
            yield 0, partial(_check_scales, matrix)
            rows = matrix.trits.shape[0]
            row = matrix.trits.nbytes // rows
            for start, stop in row_ranges(rows, row, _SLAB_BYTES):
                yield (stop - start) * row, partial(_check_trits, matrix, start, stop)


def _matrices(model: StoredModel) -> Iterator[_Check]:
    """Checks of the matrices of a ternary model, a slab of rows at a time."""
    matrices = model.ternary.matrices.values() if model.ternary is not None else ()
    for source in (matrix.source for matrix in matrices):
        for start, stop in slabs(source):
            nbytes = source.nbytes * (stop - start) // source.shape[0]
            yield nbytes, partial(_examine, source, start, stop)


def _examine(source: TernarySource, start: int, stop: int) -> None:
    source.examine(start, stop)


def _check_scales(matrix: ExpertMatrix) -> None:
    matrix.row_scales()


def _check_trits(matrix: ExpertMatrix, start: int, stop: int) -> None:
    trits = matrix.trits
    if isinstance(trits, PackedTrits):
        trits.read_rows(start, stop)
    else:
        trits.read(start, stop)


def _floats(model: StoredModel) -> Iterator[_Check]:
    """Checks of all tensors of floats, a slab of rows at a time."""
    for tensor in model.tensors.values():
        if tensor.dtype not in FLOATS:
            continue
        rows = tensor.shape[0] if tensor.shape else 1
        row = tensor.nbytes // max(1, rows)
        for start, stop in row_ranges(rows, row, _SLAB_BYTES):
            yield (stop - start) * row, partial(_check_finite, tensor, start, stop)


def _check_finite(tensor: TensorRef, start: int, stop: int) -> None:
    values = tensor.read(start, stop)
    if tensor.dtype == "F32":
        finite = bool(np.isfinite(values).all())
    else:
        dtype = "float16" if tensor.dtype == "F16" else "bfloat16"
        finite = all_finite(values.view(np.uint16), dtype)
    if not finite:
        raise CheckpointError(f"{tensor.where}: holds NaN or infinity")
