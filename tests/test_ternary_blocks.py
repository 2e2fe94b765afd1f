"""Ternary codes and blocks of other formats, against reference blocks and the tests' encoder."""

from __future__ import annotations

import numpy as np
import pytest

from outlier_mlx.imports import gguf_blocks
from outlier_mlx.storage.ternary_blocks import TYPES
from outlier_mlx.ternary import TernaryError, pack_rows
from outlier_mlx.ternary.two_bits import has_code_3, pack_twos, twos_to_rows, unpack_twos
from tests.goldens import require_shared
from tests.tensor_file import read_arrays
from tests.ternary_sources import BLOCKS, encode
from tests.trits import random_trits

TWO_BITS = ["TQ2_0", "Q2_0", "PQ2_0"]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 16, 17, 1 << 16, (1 << 18) + 3])
def test_two_bits(size: int):
    codes = np.random.default_rng(size).integers(0, 4, (size, 4), np.uint8)
    packed = (codes << np.arange(0, 8, 2, dtype=np.uint8)).sum(axis=1).astype(np.uint8)
    trits = unpack_twos(packed)
    np.testing.assert_array_equal(trits, codes.reshape(-1).astype(np.int8) - 1)
    assert has_code_3(packed) is bool((codes == 3).any())
    if size > 1:
        without = np.minimum(trits, 1)
        np.testing.assert_array_equal(unpack_twos(pack_twos(without)), without)
        assert not has_code_3(pack_twos(without))


@pytest.mark.parametrize("width", [8, 16, 64, 72, 80, 88, 128, 1536, 2048, 2560, 6912, 9728])
@pytest.mark.parametrize("rows", [0, 1, 3, 700])
def test_two_bits_to_rows(rows: int, width: int):
    trits = random_trits(rows, width)
    assert np.array_equal(twos_to_rows(pack_twos(trits)), pack_rows(trits))


def test_one_code_3_is_found_wherever_it_is():
    for at in range(24):
        packed = np.full(24, 0b10010001, np.uint8)
        assert not has_code_3(packed)
        packed[at] = 0b00001100
        assert has_code_3(packed)


@pytest.mark.parametrize("kind", TYPES)
def test_reference_blocks(kind: str):
    arrays = read_arrays(require_shared() / "goldens/ternary_models/blocks/blocks.safetensors")
    raw, trits, values = (arrays[f"{kind}.{name}"] for name in ("raw", "trits", "values"))
    sound = slice(0, -1 if kind in TWO_BITS else None)  # the last block has a code 3
    found, d = TYPES[kind].unpack(raw[sound])
    np.testing.assert_array_equal(found, trits[sound])
    np.testing.assert_array_equal(found * d.astype(np.float32), values[sound])
    np.testing.assert_array_equal(gguf_blocks.values(kind, raw[sound]), values[sound])
    if kind in TWO_BITS:
        with pytest.raises(TernaryError, match=r"code 3"):
            TYPES[kind].unpack(raw)


@pytest.mark.parametrize("kind", BLOCKS)
def test_own_blocks(kind: str):
    size = BLOCKS[kind]
    trits = random_trits(5, 3 * size)
    d = np.random.default_rng(1).uniform(-1, 1, (5, 3)).astype(np.float16)
    raw = encode(kind, trits, d)
    found, scales = TYPES[kind].unpack(raw)
    np.testing.assert_array_equal(found, trits)
    np.testing.assert_array_equal(scales, d)
    expected = trits * np.repeat(d.astype(np.float32), size, axis=1)
    np.testing.assert_array_equal(gguf_blocks.values(kind, raw), expected)
    layout = gguf_blocks.AFFINE[kind]
    affine = gguf_blocks.affine_values(
        gguf_blocks.codes(kind, raw), *gguf_blocks.scales(kind, raw, layout.group)
    )
    np.testing.assert_array_equal(affine, expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_scale_that_is_not_finite(kind: str):
    d = np.array([[1, np.nan, 1]], np.float16)
    raw = encode(kind, random_trits(1, 3 * BLOCKS[kind]), d)
    with pytest.raises(TernaryError, match=r"the scale of block \[0, 1\] is nan"):
        TYPES[kind].unpack(raw)


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_that_are_not_whole_blocks(kind: str):
    raw = encode(kind, random_trits(1, BLOCKS[kind]), np.ones((1, 1), np.float16))
    with pytest.raises(TernaryError, match="not whole blocks"):
        TYPES[kind].unpack(raw[:, :-1])
