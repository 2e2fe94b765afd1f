"""Writing what was trained as an overlay in the V3.2 form, with its model card."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.checkpoints.base import open_base
from outlier_mlx.checkpoints.export_shared import (
    Origin,
    expert_key,
    overlay_config,
    write_alphas,
)
from outlier_mlx.checkpoints.overlay_card import UPCYCLED, overlay_card
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import BASE_TYPE, spell_config
from outlier_mlx.models.description import PROJECTIONS, ModelConfig
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.stages import TrainedLayer, Upcycled
from outlier_mlx.train.texts import Corpora, Corpus
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.card import origin_of
from outlier_mlx.writing.folders import Sources
from outlier_mlx.writing.model_folder import Written, write_model
from outlier_mlx.writing.parts import Chunk, Part, Parts
from outlier_mlx.writing.writer import TensorSpec


def write_overlay(
    base: Source,
    made: Upcycled,
    settings: Settings,
    corpora: Corpora,
    out: Path,
    *,
    teacher: str | None = None,
    inputs: Sources = (),
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write the result of a training as an overlay that names its base and does not contain it.

    Args:
        base: the base; its tokenizer and licence files come along.
        made: what was trained.
        settings: with nothing open, see `Settings.resolved`.
        corpora: what it was trained on, for the card.
        out: the folder to make.
        teacher: the name of a model whose predictions were learned.
        inputs: files and folders that are never replaced, besides the base.
        force: replace `out` if this project wrote it.
        progress: called with bytes done so far, and in all.

    Raises:
        OutputExistsError: `out` exists and may not be replaced.
        OutlierError: a number that was trained is not finite, or the disk is too small.
    """
    config = overlay_dimensions(open_base(base.folder).config, settings, len(corpora.domains))
    parts = overlay_parts(config, settings, lambda number: made.layers[number])
    alphas = {each.layer: each.alphas.astype(np.float32, copy=False) for each in made.layers}

    def assets(folder: Path) -> None:
        write_alphas(alphas, folder)
        copy_assets([base.folder], folder)

    origin = origin_of("base", base)
    licence = origin.licence.as_json() if origin.licence else {}
    return write_model(
        out,
        parts,
        overlay_config(config, Origin(out.name, base.name)),
        source=base.name,
        inputs=[*inputs, base.folder],
        assets=assets,
        manifest={
            "format": "overlay",
            "source": {"name": base.name, "revision": base.revision, "form": "base", **licence},
            UPCYCLED: _account(made, settings, corpora, teacher),
        },
        card=lambda folder: overlay_card(folder, f"./{out.name}"),
        force=force,
        progress=progress,
    )


def overlay_dimensions(config: ModelConfig, settings: Settings, domains: int) -> ModelConfig:
    """The base's config with what the settings make of it."""
    assert settings.layers is not None
    return replace(
        config,
        experts=domains * settings.experts_per_domain,
        top_k=settings.top_k,
        moe_layers=settings.layers,
        raw=spell_config(config) | {BASE_TYPE: config.family},
    )


def overlay_parts(
    config: ModelConfig, settings: Settings, layer: Callable[[int], TrainedLayer]
) -> Parts:
    """The tensors of an overlay, in the order in which they are written.

    Args:
        config: of the overlay, see `overlay_dimensions`.
        settings: with nothing open.
        layer: gives one of the trained layers, counted from 0; called when it is written.
    """
    assert settings.expert_size is not None
    shapes = {
        name: (config.hidden, settings.expert_size)
        if name == "down"
        else (settings.expert_size, config.hidden)
        for name in PROJECTIONS
    }
    parts: list[Part] = []
    for at, number in enumerate(config.moe_layers):
        prefix = f"model.layers.{number}.mlp"
        router = [
            TensorSpec(f"{prefix}.router.weight", "F32", (config.experts, config.hidden)),
            TensorSpec(f"{prefix}.alpha_values", "F32", (config.experts,)),
        ]
        parts.append(_LayerPart(prefix, "router", router, partial(_router, layer, at)))
        experts = [
            TensorSpec(f"{expert_key(number, expert, name)}_{what}", dtype, stored)
            for expert in range(config.experts)
            for name, shape in shapes.items()
            for what, dtype, stored in (("ternary", "I8", shape), ("scale", "F16", (shape[0], 1)))
        ]
        parts.append(_LayerPart(prefix, "experts", experts, partial(_experts, layer, at)))
    return Parts(parts, "the overlay")


def overlay_bytes(config: ModelConfig, settings: Settings, domains: int) -> int:
    """Bytes of an overlay's tensors, given the base's config."""
    whole = overlay_dimensions(config, settings, domains)

    def none(number: int) -> TrainedLayer:
        raise AssertionError("nothing is written")

    return overlay_parts(whole, settings, none).nbytes


@dataclass(frozen=True)
class _LayerPart(Part):
    """The router and alphas of a layer, or its experts; `arrays` gives them in order."""

    tensors: Sequence[TensorSpec]
    arrays: Callable[[], Iterator[np.ndarray]]

    @property
    def params(self) -> int:
        """Weights; scales of rows are not counted, as elsewhere."""
        counted = (spec for spec in self.tensors if not spec.name.endswith("_scale"))
        return sum(int(np.prod(spec.shape)) for spec in counted)

    @property
    def source_bytes(self) -> int:
        """As many as are written."""
        return self.nbytes

    def specs(self) -> list[TensorSpec]:
        """Names, dtypes and shapes."""
        return list(self.tensors)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes, some rows at a time."""
        for spec, array in zip(self.tensors, self.arrays(), strict=True):
            if array.size * array.itemsize != spec.nbytes:
                raise OutlierError(f"{spec.name}: {array.dtype} {array.shape}, expected {spec}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise OutlierError(f"{spec.name}: holds NaN or infinity: the training diverged")
            rows = array.shape[0]
            for start, stop in row_ranges(rows, array.nbytes // max(1, rows)):
                data = np.ascontiguousarray(array[start:stop]).reshape(-1).data.cast("B")
                yield spec.name, data, data.nbytes


def _router(layer: Callable[[int], TrainedLayer], at: int) -> Iterator[np.ndarray]:
    made = layer(at)
    yield made.router.astype(np.float32, copy=False)
    yield made.alphas.astype(np.float32, copy=False)


def _experts(layer: Callable[[int], TrainedLayer], at: int) -> Iterator[np.ndarray]:
    made = layer(at)
    for expert in range(len(made.alphas)):
        for name in PROJECTIONS:
            yield made.trits[f"{name}_proj"][expert]
            yield made.scales[f"{name}_proj"][expert]


def _account(
    made: Upcycled, settings: Settings, corpora: Corpora, teacher: str | None
) -> dict[str, Any]:
    """How the overlay was made, as JSON values; no path of this machine."""
    return {
        "settings": settings.as_json(),
        "teacher": teacher,
        "window": corpora.keep.train.shape[1] - 1,
        "data": [describe(corpus) for corpus in corpora],
        "before": made.before,
        "after": made.after,
        # A stage that is read from the work folder has its name there, too.
        "stages": [{k: v for k, v in of.items() if k != "stage"} for of in made.stages],
    }


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a corpus is, as JSON values; no path of this machine."""
    return {
        "name": corpus.name,
        "files": list(corpus.files),
        "documents": corpus.documents,
        "train_windows": len(corpus.train),
        "held_out_windows": len(corpus.held_out),
        "tokens": corpus.tokens,
        "copies_left_out": corpus.copies,
    }
