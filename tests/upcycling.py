"""What a training makes, without training: random experts over a small base, and their texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from outlier_mlx.storage.hub import Source
from outlier_mlx.train.overlay import write_overlay
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.stages import TrainedLayer, Upcycled
from outlier_mlx.train.texts import Corpora, Corpus
from tests.builders import Built

SETTINGS = Settings(layers=(0, 2), experts_per_domain=2, top_k=2, expert_size=96, seed=3)
WINDOW = 8
NAMES = ("cooking", "law")


def corpora(names: tuple[str, ...] = NAMES) -> Corpora:
    """A corpus for each domain, and one to keep."""
    rng = np.random.default_rng(0)

    def corpus(name: str) -> Corpus:
        train, held = (rng.integers(0, 288, (n, WINDOW + 1), dtype=np.int32) for n in (6, 2))
        return Corpus(name, train, held, (f"{name}.txt",), documents=3, copies=1)

    return Corpora(tuple(map(corpus, names)), corpus("keep"))


def trained(base: Built, settings: Settings = SETTINGS, seed: int = 0) -> Upcycled:
    """Random experts of the settings' sizes, and made-up figures."""
    rng = np.random.default_rng(seed)
    experts = len(NAMES) * settings.experts_per_domain
    hidden, width = base.dims.hidden, settings.expert_size
    assert settings.layers is not None and width is not None

    def layer(number: int) -> TrainedLayer:
        shapes = {
            "gate_proj": (experts, width, hidden),
            "up_proj": (experts, width, hidden),
            "down_proj": (experts, hidden, width),
        }
        return TrainedLayer(
            number,
            rng.standard_normal((experts, hidden)).astype(np.float32),
            rng.uniform(0.1, 1, experts).astype(np.float32),
            {name: rng.integers(-1, 2, shape, dtype=np.int8) for name, shape in shapes.items()},
            {
                name: rng.uniform(0.05, 0.2, shape[:2]).astype(np.float16)
                for name, shape in shapes.items()
            },
        )

    before = dict.fromkeys((*NAMES, "keep"), 80.0)
    after = {"cooking": 20.5, "law": 30.25, "keep": 80.5}
    stages = [{"name": "routers", "steps": 4, "before": before, "after": after, "kept": True}]
    return Upcycled([layer(number) for number in settings.layers], before, after, stages, peak=7)


def write(
    base: Built,
    out: Path,
    *,
    change: Callable[[Upcycled], Upcycled] = lambda made: made,
    settings: Settings = SETTINGS,
    seed: int = 0,
    force: bool = False,
) -> Upcycled:
    """Write an overlay of random experts; returns what was written."""
    made = change(trained(base, settings, seed))
    source = Source(base.path, base.path.name)
    write_overlay(source, made, settings, corpora(), out, force=force)
    return made
