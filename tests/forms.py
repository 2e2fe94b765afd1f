"""A table of every form of overlay, what is read of one, and how its refusals are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints import Overlay
from outlier_mlx.checkpoints.base import join, open_base
from outlier_mlx.errors import CheckpointError
from tests.builders import PARTS, Built, write_overlay
from tests.engine import tier_of
from tests.form_builders import to_expert_files, to_gguf, to_packed, to_repacked, to_toy
from tests.reference import Array

Form = Callable[[Built], Built]

# Widths that 5 and 256 do not divide, so that packed rows share bytes.
ODD: dict[str, Any] = {"hidden": 44, "heads": 2, "expert_intermediate": 37}
BLOCKS: dict[str, Any] = {"hidden": 256, "intermediate": 96, "expert_intermediate": 512}
BLOCKS |= {"layers": 2, "moe_layers": (1,), "experts": 2}
TOY: dict[str, Any] = {"moe_layers": None, "alpha": "none"}

FORMS: dict[str, tuple[Form, dict[str, Any], str]] = {
    "per-file": (to_expert_files, {"with_base": False}, "per-file"),
    "per-file-with-base": (to_expert_files, {"alpha": "json"}, "per-file"),
    "per-file-names": (
        lambda built: to_expert_files(built, name="{}_expert_{:03}"),
        {"with_base": False, "alpha": "partial", "scale_form": ("0d", "per_row", "flat_row")},
        "per-file",
    ),
    "trainer": (
        lambda built: to_expert_files(built, trainer=True),
        {"with_base": False, "alpha": "none"},
        "trainer output",
    ),
    "repacked": (to_repacked, {"scale_dtype": "F32"}, "real"),
    "packed": (to_packed, ODD | {"scale_form": ("0d", "per_row", "one")}, "packed"),
    "packed-v32-keys": (lambda built: to_packed(built, prefix=""), ODD, "packed"),
    "monolith": (
        lambda built: to_packed(built, monolith=True),
        ODD | {"scale_form": "per_row", "alpha": "json", "with_base": False},
        "monolith",
    ),
    "toy": (to_toy, TOY | {"scale_form": "0d"}, "toy"),
    "toy-one-head-a-kv-head": (
        lambda built: to_toy(built, biases=False),
        TOY | {"kv_heads": 4},
        "toy",
    ),
    "gguf": (to_gguf, BLOCKS | {"scale_form": "per_row"}, "gguf"),
    "gguf-tq2_0": (lambda built: to_gguf(built, kind="TQ2_0"), BLOCKS, "gguf"),
    "gguf-split": (
        lambda built: to_gguf(built, naming="split", routers=False),
        BLOCKS | {"with_base": False},
        "gguf",
    ),
    "gguf-overlay-names": (lambda built: to_gguf(built, naming="overlay"), BLOCKS, "gguf"),
}


def build(path: Path, name: str, **changes: Any) -> Built:
    """An overlay in one of the forms above."""
    form, options, _ = FORMS[name]
    return form(write_overlay(path, "v32", tokenizer=False, **(options | changes)))


def contents(overlay: Overlay) -> dict[str, Array]:
    """Every value of an overlay by a name that does not depend on the form."""
    values = {name: tensor.read_float32() for name, tensor in overlay.base.items()}
    for layer, router in overlay.routers.items():
        values[f"router {layer}"] = router.read_float32()
    for layer, alphas in overlay.alphas().items():
        values[f"alpha {layer}"] = alphas
    for layer, experts in overlay.experts.items():
        for number, expert in enumerate(experts):
            for part in PARTS:
                matrix = getattr(expert, part)
                values[f"trits {layer} {number} {part}"] = matrix.trits.read()
                values[f"scales {layer} {number} {part}"] = matrix.row_scales()
    return values


def written(built: Built) -> dict[str, Array]:
    """The same, as the builder says it wrote it."""
    values = dict(built.base)
    values |= {f"router {n}": router for n, router in built.routers.items()}
    values |= {f"alpha {n}": alphas for n, alphas in built.alphas.items()}
    for (n, e, part), trits in built.trits.items():
        values[f"trits {n} {e} {part}"] = trits
        scale = built.scales[n, e, part].reshape(-1)
        values[f"scales {n} {e} {part}"] = np.broadcast_to(scale, len(trits))
    return values


def assert_same_contents(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def refused(
    built: Built, *said: str, base: Path | None = None, convert: Path | None = None
) -> None:
    """It is refused in one short line that has all of `said` in it."""
    with pytest.raises(CheckpointError) as error:
        overlay = open_overlay(built.path)
        contents(overlay)
        join(overlay, open_base(base) if base else None)
        if convert:
            tier_of(built.path, base, convert)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and len(message) < 600
    assert not (convert and convert.exists())
