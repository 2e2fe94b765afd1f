"""The engine under test: overlays through the real converter and loader, and forward passes that
are recorded in the reference's own terms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache

import outlier_mlx
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.measure.routing import moe_blocks
from outlier_mlx.runtime.model import Model
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.switch import TernarySwitchGLU
from tests.builders import Dims
from tests.goldens import assert_logits_close
from tests.reference import Array, Routing, Trace


def tier_of(overlay: Path, base: Path | None, out: Path, **options: Any) -> Path:
    """Convert with options as `outlier_mlx.convert` takes them; float32 unless told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no tokenizer", CheckpointWarning)
        return outlier_mlx.convert(overlay, base, out, **{"tier": "f32"} | options)


def load(tier: Path, dtype: str | None = None) -> Model:
    """The model of a tier; it need not have a tokenizer."""
    model, _ = load_model(tier, dtype=dtype)
    assert isinstance(model, Model)
    return model


def engine(overlay: Path, base: Path | None, out: Path, **options: Any) -> Model:
    """Convert and load."""
    return load(tier_of(overlay, base, out, **options))


def as_array(x: mx.array) -> Array:
    """To NumPy, bfloat16 widened to float32."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def forward(model: Any, tokens: Sequence[int], cache: Any = None) -> Array:
    """Logits (T, V) of tokens (T,)."""
    return as_array(model(mx.array([list(tokens)]), cache=cache)[0])


@contextmanager
def recording(hidden: list[mx.array], routed: list[tuple[mx.array, ...]]) -> Iterator[None]:
    """Collect the residual stream around every layer, and (probs, indices, weights) of each
    MoE layer, of whatever forward passes run meanwhile."""
    route = OutlierMoE.route

    def watched(block: Any) -> Any:
        def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            if not hidden:
                hidden.append(x)
            hidden.append(block(self, x, *args, **kwargs))
            return hidden[-1]

        return call

    def recorded(
        self: OutlierMoE, x: mx.array, alpha: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        indices, weights = route(self, x)
        routed.append((mx.softmax(self.gate(x), axis=-1), indices, weights))
        return route(self, x, alpha)

    with ExitStack() as patches:
        for module in (llama, qwen2, qwen3):
            block = module.TransformerBlock
            patches.enter_context(patch.object(block, "__call__", watched(block.__call__)))
        patches.enter_context(patch.object(OutlierMoE, "route", recorded))
        yield


def trace(model: Model, tokens: Sequence[int]) -> Trace:
    """Run tokens (T,) and keep what tests/reference.py keeps."""
    hidden: list[mx.array] = []
    routed: list[tuple[mx.array, ...]] = []
    with recording(hidden, routed):
        logits = forward(model, tokens)
    routing = {
        layer: Routing(*(as_array(x[0]) for x in arrays))
        for layer, arrays in zip(model.args.moe_layers, routed, strict=True)
    }
    return Trace(logits, np.stack([as_array(x[0]) for x in hidden]), routing)


def assert_same_run(actual: Trace, expected: Trace) -> None:
    """Logits, residual streams and routing agree; experts in their order."""
    assert_logits_close(actual.logits, expected.logits)
    np.testing.assert_allclose(actual.hidden, expected.hidden, atol=2e-4, rtol=1e-4)
    assert list(actual.routing) == list(expected.routing)
    for layer, routing in actual.routing.items():
        stated = expected.routing[layer]
        np.testing.assert_array_equal(routing.indices, stated.indices)
        np.testing.assert_allclose(routing.probs, stated.probs, atol=1e-5)
        np.testing.assert_allclose(routing.weights, stated.weights, atol=1e-5)


def assert_decisive(expected: Trace, top_k: int, least: float = 2e-5) -> None:
    """The reference's own choices are not so close that rounding could make them differ."""
    for layer, routing in expected.routing.items():
        probs = -np.sort(-routing.probs, axis=-1)[:, : top_k + 1]
        gap = np.min(probs[:, :-1] - probs[:, 1:], initial=1.0)
        assert gap > least, f"layer {layer}: probabilities {gap:.1g} apart; use another seed"


def greedy_cached(
    model: Model, tokens: Sequence[int], n: int, chunks: Sequence[int] = ()
) -> tuple[list[int], Array]:
    """The next n tokens by argmax with a KV cache, and the logits (n, V) of each.

    The prompt is fed in pieces of the sizes in `chunks`, then what is left of it at once.
    """
    cache = make_prompt_cache(model)
    rest = list(tokens)
    for size in chunks:
        forward(model, rest[:size], cache)
        rest = rest[size:]
    picked: list[Array] = []
    chosen: list[int] = []
    for _ in range(n):
        picked.append(forward(model, rest, cache)[-1])
        chosen.append(int(picked[-1].argmax()))
        rest = chosen[-1:]
    return chosen, np.stack(picked)


def pack_rows(trits: Array) -> Array:
    """The row layout by its definition: trits (..., in) -> (..., row_bytes) uint8."""
    width = trits.shape[-1]
    size = -(-width // 80) * 16
    digits = np.ones((*trits.shape[:-1], 5 * size), np.int64)
    digits[..., :width] = trits + 1
    q = 3 ** np.arange(4, -1, -1) @ digits.reshape(*trits.shape[:-1], 5, size)
    return ((256 * q + 242) // 243).astype(np.uint8)


def unpack_rows(rows: Array, width: int) -> Array:
    """The trits of any bytes: (..., row_bytes) uint8 -> (..., in) int8."""
    powers = 3 ** np.arange(1, 6)[:, None]
    digits = rows[..., None, :].astype(np.int64) * powers // 256 % 3
    return (digits.reshape(*rows.shape[:-1], -1)[..., :width] - 1).astype(np.int8)


def rows_to_dense(rows: mx.array, scales: mx.array, in_features: int) -> mx.array:
    """Rows (..., out, row_bytes) times their scales (..., out): (..., out, in) float32."""
    trits = unpack_rows(np.array(rows), in_features)
    return mx.array(trits.astype(np.float32)) * scales[..., None]


def tier_name(key: str, dims: Dims) -> str:
    """The name that a base tensor has in a tier."""
    words = key.split(".")
    if "mlp" in words and int(words[2]) in dims.routed_layers:
        return key.replace(".mlp.", ".mlp.shared_expert.")
    return key


def random_experts(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array]:
    """Trits (..., out, in) and scales (..., out)."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal(shape[:-1])).astype(np.float32)
    return rng.integers(-1, 2, shape, dtype=np.int8), scales


def swiglu_experts(hidden: int, width: int, count: int) -> TernarySwitchGLU:
    """Routed experts with random trits, scaled to keep the variance."""
    glu = TernarySwitchGLU(hidden, width, count)
    for name in ("gate", "up", "down"):
        shape = (hidden, width) if name == "down" else (width, hidden)
        trits, scales = random_experts((count, *shape), seed=ord(name[0]))
        rows = {"weight": mx.array(pack_rows(trits)), "scales": mx.array(scales / shape[1] ** 0.5)}
        getattr(glu, f"{name}_proj").load_weights(list(rows.items()))
    return glu


def alphas_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """A tier's alphas, as in an alpha.json."""
    return {
        str(number): {str(e): float(a) for e, a in enumerate(block.alpha.tolist())}  # type: ignore
        for number, block in moe_blocks(model).items()
    }
