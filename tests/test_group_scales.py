"""One scale a group of weights: tiles of scales, and what MLX computes with them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.runtime.affine2 import affine_product, rows_to_affine2
from outlier_mlx.ternary import TernaryError
from outlier_mlx.ternary.scales import tile_scales, untile_scales
from tests.engine import pack_rows
from tests.goldens import require_shared
from tests.tensor_file import read_arrays

# Rows, width and group: whole tiles or not, groups that begin in the middle of a digit's part.
SHAPES = [(8, 128, 128), (13, 320, 64), (3, 2048, 128), (17, 1536, 64), (1, 64, 64)]


def test_a_tile_has_eight_rows_of_a_group():
    scales = np.arange(2 * 11 * 3, dtype=np.float16).reshape(2, 11, 3)
    tiles = tile_scales(scales)
    assert tiles.shape == (2, 2, 3, 8) and tiles.dtype == np.float16
    for expert, row, group in np.ndindex(2, 11, 3):
        assert tiles[expert, row // 8, group, row % 8] == scales[expert, row, group]
    assert (tiles[:, 1, :, 3:] == 0).all()
    np.testing.assert_array_equal(untile_scales(tiles, 11), scales)
    strided = np.asfortranarray(scales)
    np.testing.assert_array_equal(tile_scales(strided), tiles)


def test_the_bits_of_bfloat16_are_kept():
    bits = np.random.default_rng(0).integers(0, 1 << 16, (9, 5), dtype=np.uint16)
    assert tile_scales(bits).dtype == np.uint16
    np.testing.assert_array_equal(untile_scales(tile_scales(bits), 9), bits)


def test_no_rows_and_no_groups():
    for shape in ((0, 4), (4, 0), (2, 0, 3)):
        tiles = tile_scales(np.zeros(shape, np.float16))
        assert untile_scales(tiles, shape[-2]).shape == shape


def test_wrong_scales():
    with pytest.raises(TernaryError, match="scales: expected float16 or uint16"):
        tile_scales(np.zeros((8, 2), np.float32))
    with pytest.raises(TernaryError, match="at least 2 dimensions"):
        tile_scales(np.zeros(8, np.float16))
    with pytest.raises(TernaryError, match=r"expected \(..., 2, groups, 8\) for 9 rows"):
        untile_scales(np.zeros((1, 4, 8), np.float16), 9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("out", "wide", "group"), SHAPES)
def test_what_mlx_reads(out: int, wide: int, group: int, dtype: mx.Dtype):
    """Exactly trit times scale, in the dtype of the scales."""
    rng = np.random.default_rng([out, wide])
    trits = rng.integers(-1, 2, (2, out, wide), dtype=np.int8)
    scales = mx.array(rng.uniform(0.01, 2, (2, out, wide // group))).astype(dtype)
    tiles = mx.array(tile_scales(np.array(scales.view(mx.uint16)))).view(dtype)
    affine = rows_to_affine2(mx.array(pack_rows(trits)), tiles, wide)
    assert affine[1].dtype == dtype and affine[1].shape == (2, out, wide // group)
    exact = trits * np.repeat(np.array(scales.astype(mx.float32)), group, axis=-1)
    found = mx.dequantize(*affine, group, 2).astype(mx.float32)
    np.testing.assert_array_equal(found, exact)
    x = rng.standard_normal((3, 1, wide)).astype(np.float32)
    experts = np.array([1, 0, 1], np.uint32)
    y = affine_product(mx.array(x), affine, mx.array(experts))
    assert y.dtype == mx.float32
    product = np.einsum("tik,tnk->tin", x.astype(np.float64), exact[experts])
    np.testing.assert_allclose(y, product, rtol=1e-5, atol=1e-4)


def test_the_reference_layout():
    folder = require_shared() / "goldens/ternary_models/layout"
    arrays = read_arrays(folder / "layout.safetensors")
    for name in [name for name in arrays if ".scales_g" in name]:
        wide, group = (int(part) for part in name.split(".scales_g"))
        scales = arrays[name].astype(np.float16)
        tiles = mx.array(tile_scales(scales))
        affine = rows_to_affine2(mx.array(arrays[f"{wide}.strided"]), tiles, wide)
        exact = arrays[f"{wide}.trits"] * np.repeat(scales, group, axis=-1)
        np.testing.assert_array_equal(mx.dequantize(*affine, group, 2), exact)
