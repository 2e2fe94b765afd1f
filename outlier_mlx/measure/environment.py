"""What a measurement was made with: chip, versions, and the dtype that a model computes in."""

import os
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx import __version__
from outlier_mlx.engine.buffers import VARIABLES
from outlier_mlx.engine.chips import Chip


def versions(*others: str) -> dict[str, str]:
    """The versions of this package, mlx and mlx-lm, and of other packages."""
    names = ("mlx", "mlx-lm", *others)
    return {"outlier-mlx": __version__} | {name: version(name) for name in names}


def environment(chip: Chip) -> dict[str, Any]:
    """Chip, versions, and the settings of MLX's command buffers (None: MLX's own), for programs."""
    buffers = {name: os.environ.get(name) for name in VARIABLES}
    return {"chip": asdict(chip), "versions": versions(), "command_buffers": buffers}


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype that a model computes in: that of its first norm, or of its first weights."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    floats = {name: a.dtype for name, a in arrays.items() if mx.issubdtype(a.dtype, mx.floating)}
    norms = [dtype for name, dtype in floats.items() if "norm" in name]
    return next(iter([*norms, *floats.values()]))


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")
