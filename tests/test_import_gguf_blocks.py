"""ggml's blocks against the package `gguf`, bit for bit, on whatever bytes."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import gguf_blocks
from outlier_mlx.imports.codes import pack_codes
from outlier_mlx.imports.gguf_blocks import AFFINE, REGROUPED
from outlier_mlx.storage.rounding import narrowed, widened
from tests.gguf_builder import SCALES, blocks
from tests.goldens import require_shared
from tests.tensor_file import read_arrays

# PrismML's types, and ggml's Q2_0, are held against reference cases in `test_ternary_blocks`.
IN_PACKAGE = [kind for kind in AFFINE if kind in gguf.GGMLQuantizationType.__members__]


def mlx_weights(kind: str, raw: np.ndarray, group: int, dtype: str = "float32") -> np.ndarray:
    """What MLX makes of the codes, scales and biases of rows, in float32."""
    bits = AFFINE[kind].bits
    scales, biases = (
        widened(narrowed(a, dtype, kind), dtype) for a in gguf_blocks.scales(kind, raw, group)
    )
    packed = mx.array(pack_codes(gguf_blocks.codes(kind, raw), bits))
    return np.array(mx.dequantize(packed, mx.array(scales), mx.array(biases), group, bits))


def truth(kind: str, raw: np.ndarray) -> np.ndarray:
    return dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", IN_PACKAGE)
def test_mlx_has_every_bit(kind: str):
    raw = blocks(kind, (64, 768), np.random.default_rng(3), row_scales=False)
    for group in {AFFINE[kind].group, 32}:
        np.testing.assert_array_equal(mlx_weights(kind, raw, group), truth(kind, raw))


@pytest.mark.parametrize("kind", [kind for kind in IN_PACKAGE if AFFINE[kind].half])
def test_float16_scales_lose_nothing(kind: str):
    raw = blocks(kind, (64, 768), np.random.default_rng(4), row_scales=False)
    np.testing.assert_array_equal(mlx_weights(kind, raw, 32, "float16"), truth(kind, raw))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_float16_scales_lose_little(kind: str):
    raw = blocks(kind, (64, 768), np.random.default_rng(5))
    scales, biases = gguf_blocks.scales(kind, raw)
    bound = (np.abs(scales) * (2 ** AFFINE[kind].bits - 1) + np.abs(biases)) * 2.0**-11 + 1e-6
    error = np.abs(mlx_weights(kind, raw, 32, "float16") - truth(kind, raw))
    assert error.max() > 0
    assert (error.reshape(64, -1, 32).max(axis=-1) <= bound).all()


@pytest.mark.parametrize("kind", REGROUPED)
def test_regrouped_weights_move_by_half_a_step_at_most(kind: str):
    raw = blocks(kind, (64, 768), np.random.default_rng(6))
    weights = gguf_blocks.values(kind, raw)
    np.testing.assert_array_equal(weights, truth(kind, raw))
    steps, lowest = gguf_blocks.grid(weights, 8, 32)
    codes, found = gguf_blocks.quantize(weights, steps, lowest, 8)
    np.testing.assert_array_equal(found, gguf_blocks.affine_values(codes, steps, lowest))
    error = np.abs(found - weights).reshape(64, -1, 32).max(axis=-1)
    assert (error <= 0.5001 * steps + 1e-7).all()
    equal = np.full((1, 32), 0.3, np.float32)
    steps, lowest = gguf_blocks.grid(equal, 8, 32)
    np.testing.assert_array_equal(gguf_blocks.quantize(equal, steps, lowest, 8)[0], 0)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([*IN_PACKAGE, *REGROUPED]), st.data())
def test_any_bytes(kind: str, data: st.DataObject):
    """Whatever is on disk: the package's values, or a refusal if those are not finite numbers."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    count = 256 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    raw = np.tile(raw, count)[None]
    if kind == "TQ2_0":
        codes = raw.reshape(-1, size)[:, :64]
        if (codes & codes >> 1 & 0x55).any():
            with pytest.raises(CheckpointError, match=r"code 3|the scale of block"):
                gguf_blocks.codes(kind, raw)
            return
    halves = [raw[0, at : at + 2].copy().view("<f2")[0] for at in SCALES[kind]]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = truth(kind, raw)
    if kind in AFFINE and np.isfinite(halves).all():
        np.testing.assert_array_equal(mlx_weights(kind, raw, 32), expected)
    elif kind in AFFINE:
        with pytest.raises(CheckpointError, match="the scale of weight"):
            gguf_blocks.scales(kind, raw)
    elif np.isfinite(expected).all():
        np.testing.assert_array_equal(gguf_blocks.values(kind, raw), expected)
    else:
        with pytest.raises(CheckpointError, match="weight"):
            gguf_blocks.values(kind, raw)


def test_goldens():
    arrays = read_arrays(require_shared() / "goldens/frankenmoe/gguf_blocks/blocks.safetensors")
    kinds = {name.removesuffix(".raw") for name in arrays if name.endswith(".raw")}
    assert kinds == {*IN_PACKAGE, *REGROUPED}
    for kind in kinds:
        raw, expected = arrays[f"{kind}.raw"], arrays[f"{kind}.fp32"]
        raw = np.ascontiguousarray(raw.reshape(-1, raw.shape[-1]))
        found = mlx_weights(kind, raw, 32) if kind in AFFINE else gguf_blocks.values(kind, raw)
        np.testing.assert_array_equal(found, expected.reshape(found.shape), err_msg=kind)


def test_bfloat16_rounds_as_mlx_does():
    rng = np.random.default_rng(7)
    array = rng.normal(0, 1, 4096).astype(np.float32)
    array[:4] = [1.00390625, 1.01171875, -1.00390625, 3e38]  # halves go to even
    expected = np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32))
    found = widened(narrowed(array, "bfloat16", "x"), "bfloat16")
    np.testing.assert_array_equal(found, expected)
