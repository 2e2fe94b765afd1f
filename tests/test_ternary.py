"""The number format against plain Python and itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outlier_mlx.ternary import (
    TernaryError,
    check_rows,
    flat_to_rows,
    pack_rows,
    pack_tq1_0,
    row_bytes,
    rows_to_flat,
    unpack_rows,
    unpack_tq1_0,
)
from tests.trits import ALL_BYTES, PACKERS, random_trits, tiny_chunks


def plain_flat(trits: list[int]) -> list[int]:
    trits = trits + [0] * (-len(trits) % 5)
    return [
        sum((trit + 1) * 3**k for k, trit in enumerate(trits[i : i + 5]))
        for i in range(0, len(trits), 5)
    ]


def plain_row(trits: list[int]) -> list[int]:
    size = -(-len(trits) // 80) * 16
    trits = trits + [0] * (5 * size - len(trits))
    numbers = []
    for j in range(size):
        number = 0
        for trit in trits[j::size]:
            number = number * 3 + trit + 1
        numbers.append(-(-256 * number // 243))
    return numbers


def carried_digits(byte: int) -> list[int]:
    """The digits of a row byte as a kernel takes them: times 3, what leaves the byte."""
    digits = []
    for _ in range(5):
        digits.append(3 * byte // 256)
        byte = 3 * byte % 256
    return digits


def test_worked_example() -> None:
    trits = np.array([1, 0, -1, -1, 0, 1], np.int8)
    assert pack_tq1_0(trits).tolist() == [86, 122]
    assert unpack_tq1_0(np.array([86, 122], np.uint8), (2, 3)).tolist() == [[1, 0, -1], [-1, 0, 1]]


def test_every_flat_byte_decodes() -> None:
    expected = [[byte // 3**k % 3 - 1 for k in range(5)] for byte in range(243)]
    assert unpack_tq1_0(ALL_BYTES[:243], (243, 5)).tolist() == expected
    assert (pack_tq1_0(np.array(expected, np.int8)) == ALL_BYTES[:243]).all()


@pytest.mark.parametrize("byte", range(243, 256))
def test_flat_bytes_that_encode_nothing_are_refused(byte: int) -> None:
    packed = np.full(1000, 121, np.uint8)
    packed[777] = byte
    for read in (unpack_tq1_0, flat_to_rows):
        for shape in ((5, 1000), (1000, 5), (1666, 3)):
            with (
                tiny_chunks(),
                pytest.raises(TernaryError, match=rf"^byte {byte} at 777 encodes no"),
            ):
                read(packed, shape)


def test_every_row_byte_decodes() -> None:
    packed = ALL_BYTES.reshape(16, 16)
    expected = [
        [digits[n] - 1 for n in range(5) for digits in map(carried_digits, row)]
        for row in packed.tolist()
    ]
    assert unpack_rows(packed, 80).tolist() == expected


def test_row_bytes_that_no_encoder_produces_are_refused() -> None:
    encoded = {-(-256 * number // 243) for number in range(243)}
    refused = set()
    for byte in range(256):
        packed = np.full((2, 3, 16), 128, np.uint8)
        packed[1, 2, 5] = byte
        try:
            check_rows(packed, 80)
        except TernaryError as error:
            assert str(error) == f"byte {byte} at [1, 2, 5] encodes no five trits"
            refused.add(byte)
    assert len(refused) == 13
    assert refused == set(range(256)) - encoded


@pytest.mark.parametrize("size", range(301))
def test_sizes(size: int) -> None:
    trits = random_trits(3, size, seed=size)
    lines = trits.tolist()
    packed, packed_rows = pack_tq1_0(trits), pack_rows(trits)

    assert packed.tolist() == plain_flat(trits.reshape(-1).tolist())
    assert packed_rows.tolist() == [plain_row(line) for line in lines]
    assert row_bytes(size) == packed_rows.shape[1]

    assert (unpack_tq1_0(packed, (3, size)) == trits).all()
    assert (unpack_rows(packed_rows, size) == trits).all()
    assert (flat_to_rows(packed, (3, size)) == packed_rows).all()
    assert (rows_to_flat(packed_rows, (3, size)) == packed).all()
    check_rows(packed_rows, size)


@pytest.mark.parametrize(
    "shape",
    [(37, 13824), (130, 5120), (2, 50, 3584), (31, 18944), (3, 200_003), (2, 9, 20_001)],
)
def test_real_chunks(shape: tuple[int, ...]) -> None:
    trits = random_trits(*shape)
    digits = np.ones(-(-trits.size // 5) * 5, np.int64)
    digits[: trits.size] = trits.reshape(-1) + 1
    padded = np.ones((*shape[:-1], 5 * row_bytes(shape[-1])), np.int64)
    padded[..., : shape[-1]] = trits + 1
    packed = digits.reshape(-1, 5) @ [1, 3, 9, 27, 81]
    runs = padded.reshape(*shape[:-1], 5, -1)
    packed_rows = (np.array([81, 27, 9, 3, 1]) @ runs * 256 + 242) // 243

    np.testing.assert_array_equal(pack_tq1_0(trits), packed)
    np.testing.assert_array_equal(pack_rows(trits), packed_rows)
    np.testing.assert_array_equal(unpack_tq1_0(packed.astype(np.uint8), shape), trits)
    np.testing.assert_array_equal(unpack_rows(packed_rows.astype(np.uint8), shape[-1]), trits)
    np.testing.assert_array_equal(flat_to_rows(packed.astype(np.uint8), shape), packed_rows)
    np.testing.assert_array_equal(rows_to_flat(packed_rows.astype(np.uint8), shape), packed)


SHAPES = st.tuples(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), st.integers(1, 70)).map(
    lambda shape: (*shape[0], shape[1])
)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int8, SHAPES, elements=st.integers(-1, 1)), st.integers(1, 20))
def test_round_trips(trits: np.ndarray, chunk: int) -> None:
    with tiny_chunks(chunk):
        packed, packed_rows = pack_tq1_0(trits), pack_rows(trits)
        width = trits.shape[-1]
        np.testing.assert_array_equal(unpack_tq1_0(packed, trits.shape), trits)
        np.testing.assert_array_equal(unpack_rows(packed_rows, width), trits)
        np.testing.assert_array_equal(flat_to_rows(packed, trits.shape), packed_rows)
        np.testing.assert_array_equal(rows_to_flat(packed_rows, trits.shape), packed)
        check_rows(packed_rows, width)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_wrong_trits_are_refused_with_their_position(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    index = tuple(data.draw(st.integers(0, side - 1)) for side in shape)
    value = data.draw(st.integers(-128, 127).filter(lambda v: abs(v) > 1))
    trits = random_trits(*shape)
    trits[index] = value
    if data.draw(st.booleans()):  # a later one changes nothing
        trits.reshape(-1)[-1] = 2 if index != tuple(side - 1 for side in shape) else value
    at = np.ravel_multi_index(index, shape)
    message = f"trit {value} at {list(index)} (flat index {at}) is not -1, 0 or 1"
    for pack in PACKERS:
        with tiny_chunks(data.draw(st.integers(1, 9))), pytest.raises(TernaryError) as caught:
            pack(trits)
        assert str(caught.value) == message


@pytest.mark.parametrize("width", [1, 7, 16, 17, 40, 70, 79, 80, 81, 95, 250])
def test_padding_of_rows_is_checked(width: int) -> None:
    """Any digit that no weight has, in any byte; all other bytes are as they were."""
    trits = random_trits(4, width)
    packed, size = pack_rows(trits), row_bytes(width)
    padded = np.zeros(5 * size, np.int8)
    padded[:width] = trits[3]
    for place in range(width, 5 * size):
        for trit in (-1, 1):
            padded[place] = trit
            row = plain_row(padded.tolist())
            padded[place] = 0
            column = place % size
            damaged = packed.copy()
            damaged[3] = row
            assert (damaged != packed).sum() == 1
            message = f"byte {row[column]} at [3, {column}] has padding other than 0"
            with tiny_chunks(1 + place % 40), pytest.raises(TernaryError) as caught:
                check_rows(damaged, width)
            assert str(caught.value) == message


def test_the_first_wrong_byte_of_rows_is_named() -> None:
    packed = pack_rows(random_trits(4, 79))  # byte 15 has four trits
    packed[2, 15] = 3  # the digits 0, 0, 0, 0, 2
    packed[1, 15] = packed[2, 3] = packed[3, 0] = 1
    wrong = {(1, 15): "encodes no five trits", (2, 3): "encodes no five trits"}
    wrong |= {(2, 15): "has padding other than 0", (3, 0): "encodes no five trits"}
    for (row, column), what in wrong.items():
        for chunk in (1, 7, 16, 40, 1000):
            with tiny_chunks(chunk), pytest.raises(TernaryError) as caught:
                check_rows(packed, 79)
            said = f"byte {packed[row, column]} at [{row}, {column}] {what}"
            assert str(caught.value) == said
        packed[row, column] = 128


def test_padding_of_flat_bytes_is_worth_a_warning() -> None:
    packed = np.array(plain_flat([1, -1, 1, 0, 1]), np.uint8)
    for read in (unpack_tq1_0, flat_to_rows):
        with pytest.warns(UserWarning, match="pads 3 trits"):
            read(packed, (3,))
    assert unpack_tq1_0(packed, (5,)).tolist() == [1, -1, 1, 0, 1]
