"""A small training that tests run: a base of the library, two domains, and text to keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from outlier_mlx.engine.loading import load_model
from outlier_mlx.runtime.affine2 import ROWS
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.storage.hub import Source
from outlier_mlx.ternary import pack_rows
from outlier_mlx.train.experts import Mode
from outlier_mlx.train.lessons import Lessons
from outlier_mlx.train.loop import Batch
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.stages import Upcycled, upcycle
from outlier_mlx.train.texts import Corpora, Corpus
from tests.library import Library

WINDOW = 12
SETTINGS = Settings(
    layers=(1, 3),
    expert_size=64,
    expert_steps=4,
    joint_steps=3,
    batch=4,
    learning_rate=0.1,
    keep_bound=10.0,
)


def corpora(vocab: int = 288, windows: int = 16, held_out: int = 16) -> Corpora:
    """Texts that count: each domain has its own tokens and its own step."""
    rng = np.random.default_rng(0)
    made = []
    for number, name in enumerate(("law", "sea", "keep")):
        start = rng.integers(0, 40, (windows + held_out, 1))
        counted = (start + (number + 1) * np.arange(WINDOW + 1)) % 40
        tokens = (counted + 50 * number + 3).astype(np.int32)
        assert tokens.max() < vocab
        made.append(Corpus(name, tokens[:windows], tokens[windows:]))
    return Corpora((made[0], made[1]), made[2])


def train(library: Library, work: Path, log: Any = None, **how: Any) -> Upcycled:
    """Run `upcycle` on a base of four layers; `how` are settings, or arguments of `upcycle`."""
    given = {
        name: how.pop(name) for name in ("teacher", "save_every", "dtype", "so_far") if name in how
    }
    more = {"held_out": how.pop("held_out")} if "held_out" in how else {}
    texts, settings = corpora(**more), replace(SETTINGS, **how)
    base = Source(library.base().path, "base")
    return upcycle(base, texts, settings, work, log=log or (lambda event: None), **given)


def tensors(made: Upcycled) -> dict[str, np.ndarray]:
    """Everything that is written of a training, by name."""
    found: dict[str, np.ndarray] = {}
    for layer in made.layers:
        found |= {f"{layer.layer}.router": layer.router, f"{layer.layer}.alpha": layer.alphas}
        for kind in ("trits", "scales"):
            for name, array in getattr(layer, kind).items():
                found[f"{layer.layer}.{name}.{kind}"] = array
    return found


def go_uphill(patch: pytest.MonkeyPatch, least: int) -> None:
    """Have each step in which at least so many experts take part make the loss larger."""
    whole = Lessons.loss

    def loss(self: Lessons, batch: Batch, mode: Mode) -> tuple[mx.array, ...]:
        found = whole(self, batch, mode)
        return tuple(-part for part in found) if len(mode.experts) >= least else found

    patch.setattr(Lessons, "loss", loss)


class Stopped(BaseException):
    """Ends a training, as Ctrl-C does."""


@contextmanager
def stopped_at(step: int, stage: str) -> Iterator[Any]:
    """A log that ends the training after a step of a stage whose name begins so."""

    def log(event: dict[str, Any]) -> None:
        is_step = event["event"] == "step" and event["stage"].startswith(stage)
        if is_step and event["step"] == step:
            raise Stopped

    yield log


def assert_same(one: Upcycled, other: Upcycled) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array.view(np.uint8), theirs[name].view(np.uint8), name)


def tier_model(library: Library, made: Upcycled) -> nn.Module:
    """The base with the trained experts in a tier's own modules."""
    model: Any = load_model(library.base().path)[0]
    for layer in made.layers:
        experts, hidden = layer.router.shape
        size = layer.trits["gate_proj"].shape[1]
        mlp = model.layers[layer.layer].mlp
        block = OutlierMoE(mlp, hidden, size, experts, SETTINGS.top_k, ROWS)
        block.gate.weight, block.alpha = mx.array(layer.router), mx.array(layer.alphas)
        for name, trits in layer.trits.items():
            linear = block.switch_mlp[name]
            linear.weight = mx.array(pack_rows(trits))
            linear.scales = mx.array(layer.scales[name].astype(np.float32))
            linear.prepare()
        model.layers[layer.layer].mlp = block
    return model
