"""Recording who is routed to while a tier runs."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.calls import watched_calls
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.expert_trace import About, Trace
from outlier_mlx.measure.routing import moe_blocks
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.models.sizes import bytes_read
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.shards import read_shards

_SMALLEST, _LARGEST = np.float16(2.0**-24), np.float16(65504)


class Recorder:
    """Collects what the routers of a model choose; `recording` makes one."""

    def __init__(self) -> None:
        self._routed: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._foreseen: dict[int, list[np.ndarray]] = {}
        self._busy = False

    def trace(self, about: About) -> Trace:
        """All passes so far.

        Raises:
            OutlierError: there was none.
        """
        if not self._routed:
            raise OutlierError("nothing to trace: the model has read no token")
        dtype = np.uint8 if about.experts <= 256 else np.uint16
        routed = [self._routed[number] for number in about.layers]
        experts = np.stack([np.concatenate([e for e, _ in layer]) for layer in routed], axis=1)
        weights = np.stack([np.concatenate([w for _, w in layer]) for layer in routed], axis=1)
        foreseen = None
        if len(self._foreseen) == len(about.layers) - 1:
            above = [np.concatenate(self._foreseen[number]) for number in about.layers[1:]]
            foreseen = np.stack([experts[:, 0], *above], axis=1).astype(dtype)
        passes = np.array([len(chosen) for chosen, _ in routed[0]], np.uint32)
        return Trace(about, experts.astype(dtype), _halves(weights), passes, foreseen)

    def note(self, number: int, block: Any, given: tuple[Any, ...], _: Any) -> None:
        """Note what the MoE block of a layer was called with."""
        indices, weights = block.route(given[0], block.alpha)
        flat = (-1, indices.shape[-1])
        pair = np.array(indices).reshape(flat), np.array(weights).reshape(flat)
        self._routed.setdefault(number, []).append(pair)

    def note_residual(self, above: int, layer: Any, given: tuple[Any, ...], _: Any) -> None:
        """Note what a layer's router makes of the residual stream below it."""
        if self._busy:  # the norm that is called here may be watched, too
            return
        self._busy = True
        try:
            indices, _ = layer.mlp.route(layer.post_attention_layernorm(given[0]))
        finally:
            self._busy = False
        chosen = np.array(indices).reshape(-1, indices.shape[-1])
        self._foreseen.setdefault(above, []).append(chosen)


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Record what a tier's routers choose until the block ends; its results stay the same.

    Raises:
        OutlierError: the model has no Outlier MoE layer.
    """
    blocks = moe_blocks(model)
    recorder = Recorder()
    with ExitStack() as watching:
        for number, block in blocks.items():
            told = partial(recorder.note, number, block)
            watching.enter_context(watched_calls(block, "__call__", told))
        for below, above in pairwise(blocks):
            norm = getattr(model.layers[below], "post_attention_layernorm", None)
            if norm is not None:
                told = partial(recorder.note_residual, above, model.layers[above])
                watching.enter_context(watched_calls(norm, "__call__", told))
        yield recorder


def _halves(weights: np.ndarray) -> np.ndarray:
    """Weights as float16; none becomes 0 or infinite that is not."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = weights.astype(np.float16)
    rounded = np.where((rounded == 0) & (weights != 0), np.copysign(_SMALLEST, weights), rounded)
    return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.float16)


def trace_about(source: Source, model: nn.Module, text: str, context: int) -> About:
    """What is written about a tier in its traces.

    Args:
        source: its folder, or where it was found on the hub.
        model: the model, as loaded.
        text: name of the text.
        context: tokens in the KV cache that decoding reads, 16 bits a value.

    Raises:
        OutlierError: the model has no Outlier MoE layer.
    """
    blocks = moe_blocks(model)
    first = next(iter(blocks.values()))
    experts = first.alpha.shape[0]
    folder = source.folder
    tensors = read_shards(folder)
    routed = sum(ref.nbytes for name, ref in tensors.items() if ".switch_mlp." in name)
    shared = sum(ref.nbytes for name, ref in tensors.items() if ".mlp.shared_expert." in name)
    rest = [
        (name, ref.nbytes, (*ref.shape, 1)[0])
        for name, ref in tensors.items()
        if ".switch_mlp." not in name
    ]
    manifest = folder / "tier.json"
    return About(
        model=source.name,
        sha256=hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else "",
        text=text,
        layers=tuple(blocks),
        experts=experts,
        top_k=first.top_k,
        expert_bytes=routed // (len(blocks) * experts),
        base_bytes=bytes_read(rest, describe(raw_config(folder)), context, 2) or 0,
        shared_bytes=shared,
    )
