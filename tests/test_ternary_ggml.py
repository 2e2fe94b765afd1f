"""ggml's ternary blocks against ggml's own package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from outlier_mlx.ternary import TernaryError, ggml
from tests.trits import ALL_BYTES, random_trits, tiny_chunks, without_code_3

TQ1_0, TQ2_0 = gguf.GGMLQuantizationType.TQ1_0, gguf.GGMLQuantizationType.TQ2_0


def floats(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    return trits * np.repeat(d.astype(np.float32), 256, axis=-1)


def pack_tq2_0_blocks(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    return gguf.quantize(floats(trits, d), TQ2_0)


BLOCK_FORMS = [
    (TQ1_0, ggml.TQ1_0_BYTES, ggml.pack_tq1_0_blocks, ggml.unpack_tq1_0_blocks),
    (TQ2_0, ggml.TQ2_0_BYTES, pack_tq2_0_blocks, ggml.unpack_tq2_0_blocks),
]


@pytest.mark.parametrize(("kind", "size", "pack", "unpack"), BLOCK_FORMS)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_blocks_are_those_of_gguf(kind, size, pack, unpack, chunk) -> None:
    trits = random_trits(3, 7, 768)
    d = np.random.default_rng(1).uniform(0.01, 2, (3, 7, 3)).astype(np.float16)
    with tiny_chunks(chunk):
        packed = pack(trits, d)
        assert packed.shape == (3, 7, 3 * size)
        np.testing.assert_array_equal(packed, gguf.quantize(floats(trits, d), kind))
        np.testing.assert_array_equal(pack(np.asfortranarray(trits), d), packed)
        for view in (packed, np.asfortranarray(packed)):
            back, scales = unpack(view)
            np.testing.assert_array_equal(back, trits)
            np.testing.assert_array_equal(scales, d)


@pytest.mark.parametrize(("kind", "size", "pack", "unpack"), BLOCK_FORMS)
def test_every_block_byte_decodes_as_in_gguf(kind, size, pack, unpack) -> None:
    packed = np.empty((256, size), np.uint8)
    packed[:] = ALL_BYTES[:, None] + 7 * np.arange(size)
    packed[:, -2:].view(np.float16)[:, 0] = 0.5
    if kind == TQ2_0:
        with pytest.raises(TernaryError, match="code 3"):
            unpack(packed)
        packed = without_code_3(packed)
    trits, d = unpack(packed)
    np.testing.assert_array_equal(floats(trits, d), gguf.dequantize(packed, kind))


def test_code_3_is_refused_with_its_position() -> None:
    packed = pack_tq2_0_blocks(random_trits(2, 512), np.ones((2, 2), np.float16))
    packed[1, 66 + 32 + 5] |= 3 << 4  # half 1, byte 5, third weight of the second block
    with pytest.raises(TernaryError, match=rf"weight at \[1, {256 + 128 + 5 + 64}\] has code 3"):
        ggml.unpack_tq2_0_blocks(packed)


@pytest.mark.parametrize(("kind", "size", "pack", "unpack"), BLOCK_FORMS)
def test_refused_blocks(kind, size, pack, unpack) -> None:
    packed = pack(random_trits(2, 512), np.ones((2, 2), np.float16))
    with pytest.raises(TernaryError, match=rf"packed: rows of 100 are not whole blocks of {size}"):
        unpack(packed[:, :100])
    for bad in (np.nan, np.inf):
        packed[1, 2 * size - 2 :].view(np.float16)[:] = bad
        with pytest.raises(TernaryError, match=rf"the scale of block \[1, 1\] is {bad}"):
            unpack(packed)


def test_refused_trits_of_blocks() -> None:
    pack, trits, d = ggml.pack_tq1_0_blocks, random_trits(2, 512), np.ones((2, 2), np.float16)
    with pytest.raises(TernaryError, match="trits: rows of 500 are not whole blocks of 256"):
        pack(trits[:, :500], d)
    with pytest.raises(
        TernaryError, match=r"d: expected shape \(2, 2\), one a block, got \(2, 1\)"
    ):
        pack(trits, d[:, :1])
    with pytest.raises(TernaryError, match="d: expected float16, got float32"):
        pack(trits, d.astype(np.float32))
    for bad in (np.nan, np.inf):
        d[1, 0] = bad
        with pytest.raises(TernaryError, match=rf"the scale of block \[1, 0\] is {bad}"):
            pack(trits, d)
    d[1, 0], trits[1, 300] = 1, 2
    with pytest.raises(TernaryError, match=r"trit 2 at \[1, 300\]"), tiny_chunks(1):
        pack(trits, d)
