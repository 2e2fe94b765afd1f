"""The number format against the reference cases."""

from __future__ import annotations

import numpy as np
import pytest

from outlier_mlx.ternary import (
    TernaryError,
    check_rows,
    flat_to_rows,
    ggml,
    pack_rows,
    pack_tq1_0,
    rows_to_flat,
    unpack_rows,
    unpack_tq1_0,
)
from tests.goldens import require_shared
from tests.tensor_file import read_arrays
from tests.trits import without_code_3

CODEC = require_shared() / "goldens" / "codec"


def cases(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The numbered (trits, packed) pairs of a file."""
    tensors = read_arrays(CODEC / f"{name}.safetensors")
    numbers = sorted(key.removesuffix(".trits") for key in tensors if key.endswith(".trits"))
    assert numbers
    return [(tensors[f"{n}.trits"], tensors[f"{n}.packed"]) for n in numbers]


def test_flat() -> None:
    for trits, packed in cases("tq10_flat"):
        np.testing.assert_array_equal(pack_tq1_0(trits), packed)
        np.testing.assert_array_equal(unpack_tq1_0(packed, trits.shape), trits)
        np.testing.assert_array_equal(flat_to_rows(packed, trits.shape), pack_rows(trits))
        np.testing.assert_array_equal(rows_to_flat(pack_rows(trits), trits.shape), packed)


def test_flat_decode_table() -> None:
    table = read_arrays(CODEC / "tq10_flat_decode_table.safetensors")
    for byte, (digits, valid) in enumerate(zip(table["digits"], table["valid"], strict=True)):
        packed = np.array([byte], np.uint8)
        if valid:
            np.testing.assert_array_equal(unpack_tq1_0(packed, (5,)), digits)
        else:
            with pytest.raises(TernaryError, match=f"byte {byte} at 0"):
                unpack_tq1_0(packed, (5,))


def test_row_bytes_are_those_of_ggml() -> None:
    table = read_arrays(CODEC / "gguf_tq1_0_byte_table.safetensors")
    packed = np.full((256, 16), 128, np.uint8)
    packed[:, 0] = np.arange(256)
    np.testing.assert_array_equal(unpack_rows(packed, 80)[:, ::16], table["digits"])
    for row, canonical in zip(packed, table["canonical"], strict=True):
        if canonical:
            check_rows(row, 80)
        else:
            with pytest.raises(TernaryError, match=f"byte {row[0]} at"):
                check_rows(row, 80)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ggml_blocks(name: str) -> None:
    tensors = read_arrays(CODEC / f"gguf_{name}.safetensors")
    unpack = getattr(ggml, f"unpack_{name}_blocks")

    def floats(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
        return trits * np.repeat(d.astype(np.float32), 256, axis=-1)

    if name == "tq1_0":
        packed = ggml.pack_tq1_0_blocks(tensors["trits"], tensors["d"])
        np.testing.assert_array_equal(packed, tensors["blocks"])
    trits, d = unpack(tensors["blocks"])
    np.testing.assert_array_equal(trits, tensors["trits"])
    np.testing.assert_array_equal(d, tensors["d"])
    np.testing.assert_array_equal(floats(trits, d), tensors["dequantized"])

    np.testing.assert_array_equal(
        floats(*unpack(tensors["float_blocks"])), tensors["float_dequantized"]
    )
    blocks, expected = tensors["raw_blocks"], tensors["raw_dequantized"]
    if name == "tq2_0":
        with pytest.raises(TernaryError, match="code 3"):
            unpack(blocks)
        blocks = without_code_3(blocks)
    trits, d = unpack(blocks)
    # ggml decodes code 3 as 2.
    ones = floats(np.ones_like(trits), d)
    np.testing.assert_array_equal(floats(trits, d), np.where(expected == 2 * ones, ones, expected))
