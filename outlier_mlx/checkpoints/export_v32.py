"""The V3.2 form: one folder of shards with the keys `model.layers.N.mlp.experts.E.*`."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from outlier_mlx.checkpoints.export_shared import (
    FromSlabs,
    Origin,
    ScaleForms,
    copied,
    find_scale_forms,
    matrices,
    trit_slabs,
)
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.writing.parts import Part, Parts
from outlier_mlx.writing.writer import TensorSpec


def v32_tensors(overlay: Overlay, origin: Origin) -> Parts:
    """The tensors of the V3.2 form.

    Trits are int8, scales float16 where that holds all of them exactly, else float32. Alphas are
    tensors as well as in alpha.json: readers know the one or the other.
    """
    return Parts(list(_parts(overlay)), "the export")


def _parts(overlay: Overlay) -> Iterator[Part]:
    for name, tensor in overlay.base.items():
        yield copied(name, tensor)
    for layer, router in overlay.routers.items():
        yield copied(f"model.layers.{layer}.mlp.router.weight", router)
    for layer, alphas in overlay.alphas().items():
        name = f"model.layers.{layer}.mlp.alpha_values"
        yield FromSlabs(
            name, "router", TensorSpec(name, "F32", alphas.shape), partial(iter, [alphas])
        )
    scales = find_scale_forms(overlay)
    stored = "F16" if scales.wide is None else "F32"
    for name, projection, matrix in matrices(overlay):
        trits = TensorSpec(f"{name}_ternary", "I8", tuple(matrix.trits.shape))
        yield FromSlabs(name, "experts", trits, partial(trit_slabs, matrix.trits))
        scale = TensorSpec(f"{name}_scale", stored, scales.shape(projection, matrix))
        yield FromSlabs(name, "experts", scale, partial(_scale, scales, projection, matrix))


def _scale(scales: ScaleForms, projection: str, matrix: ExpertMatrix) -> Iterator[np.ndarray]:
    yield scales.values(projection, matrix, "float16" if scales.wide is None else "float32")
