"""What a measurement was made with: chip, versions, and the dtype that a model computes in."""

import os
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import mlx.core as mx

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


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")
