"""The number format against plain Python, ggml's own package and itself."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outlier_mlx.ternary import (
    TernaryError,
    arrays,
    check_rows,
    check_trits,
    flat,
    flat_to_rows,
    ggml,
    pack_rows,
    pack_tq1_0,
    pack_two_bit,
    row_bytes,
    rows,
    rows_to_flat,
    two_bit,
    unpack_rows,
    unpack_tq1_0,
    unpack_two_bit,
)

ALL_BYTES = np.arange(256, dtype=np.uint8)
PACKERS: list[Callable[[np.ndarray], Any]] = [pack_tq1_0, pack_rows, pack_two_bit, check_trits]


def random_trits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


def plain_flat(trits: list[int]) -> list[int]:
    trits = trits + [0] * (-len(trits) % 5)
    return [
        sum((trit + 1) * 3**k for k, trit in enumerate(trits[i : i + 5]))
        for i in range(0, len(trits), 5)
    ]


def plain_row(trits: list[int]) -> list[int]:
    trits = trits + [0] * (-len(trits) % 20)
    numbers = []
    for i in range(0, len(trits), 5):
        number = 0
        for trit in trits[i : i + 5]:
            number = number * 3 + trit + 1
        numbers.append(-(-256 * number // 243))
    return numbers


def plain_two_bit(trits: list[int]) -> list[int]:
    codes = [{0: 0, 1: 1, -1: 3}[trit] for trit in trits + [0] * (-len(trits) % 4)]
    return [
        codes[i] + 4 * codes[i + 1] + 16 * codes[i + 2] + 64 * codes[i + 3]
        for i in range(0, len(codes), 4)
    ]


def carried_digits(byte: int) -> list[int]:
    """The digits of a row byte as a kernel takes them: times 3, what leaves the byte."""
    digits = []
    for _ in range(5):
        digits.append(3 * byte // 256)
        byte = 3 * byte % 256
    return digits


@contextmanager
def tiny_chunks(size: int = 4) -> Iterator[None]:
    """Small inputs then take every path that large ones take, rows longer than a chunk included."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in itertools.product(
            (arrays, flat, rows, two_bit, ggml), ("CHUNK", "_CHUNK")
        ):
            if hasattr(module, name):
                patch.setattr(module, name, size)
        yield


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
    packed = ALL_BYTES.reshape(64, 4)
    expected = [
        [digit - 1 for byte in row for digit in carried_digits(byte)] for row in packed.tolist()
    ]
    assert unpack_rows(packed, 20).tolist() == expected


def test_row_bytes_that_no_encoder_produces_are_refused() -> None:
    encoded = {-(-256 * number // 243) for number in range(243)}
    refused = set()
    for byte in range(256):
        packed = np.full((2, 3, 8), 128, np.uint8)
        packed[1, 2, 5] = byte
        try:
            check_rows(packed, 40)
        except TernaryError as error:
            assert str(error) == f"byte {byte} at [1, 2, 5] encodes no five trits"
            refused.add(byte)
    assert len(refused) == 13
    assert refused == set(range(256)) - encoded


def test_every_two_bit_byte_decodes() -> None:
    expected = [[(0, 1, 0, -1)[byte >> 2 * k & 3] for k in range(4)] for byte in range(256)]
    assert unpack_two_bit(ALL_BYTES[:, None], 4).tolist() == expected


@pytest.mark.parametrize("size", range(1, 301))
def test_sizes(size: int) -> None:
    trits = random_trits(3, size, seed=size)
    lines = trits.tolist()
    packed, packed_rows = pack_tq1_0(trits), pack_rows(trits)

    assert packed.tolist() == plain_flat(trits.reshape(-1).tolist())
    assert packed_rows.tolist() == [plain_row(line) for line in lines]
    assert row_bytes(size) == packed_rows.shape[1]
    assert pack_two_bit(trits).tolist() == [plain_two_bit(line) for line in lines]

    assert (unpack_tq1_0(packed, (3, size)) == trits).all()
    assert (unpack_rows(packed_rows, size) == trits).all()
    assert (unpack_two_bit(pack_two_bit(trits), size) == trits).all()
    assert (flat_to_rows(packed, (3, size)) == packed_rows).all()
    assert (rows_to_flat(packed_rows, (3, size)) == packed).all()
    check_rows(packed_rows, size)


@pytest.mark.parametrize("shape", [(37, 13824), (130, 5120), (3, 200_003), (2, 9, 20_001)])
def test_real_chunks(shape: tuple[int, ...]) -> None:
    trits = random_trits(*shape)
    digits = np.ones(-(-trits.size // 5) * 5, np.int64)
    digits[: trits.size] = trits.reshape(-1) + 1
    padded = np.ones((*shape[:-1], row_bytes(shape[-1]), 5), np.int64)
    padded.reshape(*shape[:-1], -1)[..., : shape[-1]] = trits + 1
    packed = digits.reshape(-1, 5) @ [1, 3, 9, 27, 81]
    packed_rows = (padded @ [81, 27, 9, 3, 1] * 256 + 242) // 243

    np.testing.assert_array_equal(pack_tq1_0(trits), packed)
    np.testing.assert_array_equal(pack_rows(trits), packed_rows)
    np.testing.assert_array_equal(unpack_tq1_0(packed.astype(np.uint8), shape), trits)
    np.testing.assert_array_equal(unpack_rows(packed_rows.astype(np.uint8), shape[-1]), trits)
    np.testing.assert_array_equal(flat_to_rows(packed.astype(np.uint8), shape), packed_rows)
    np.testing.assert_array_equal(rows_to_flat(packed_rows.astype(np.uint8), shape), packed)
    np.testing.assert_array_equal(unpack_two_bit(pack_two_bit(trits), shape[-1]), trits)


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
        np.testing.assert_array_equal(unpack_two_bit(pack_two_bit(trits), width), trits)
        np.testing.assert_array_equal(flat_to_rows(packed, trits.shape), packed_rows)
        np.testing.assert_array_equal(rows_to_flat(packed_rows, trits.shape), packed)
        check_rows(packed_rows, width)
        check_trits(trits)


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


def test_padding_of_rows_is_checked() -> None:
    packed = pack_rows(random_trits(4, 7))  # 2 trits in the second byte, 2 bytes of padding
    for column, byte, message in (
        (2, 129, "byte 129 at [3, 2] pads with more than 0"),
        (3, 0, "byte 0 at [3, 3] pads with more than 0"),
        (1, plain_row([1, 1, 0, 0, 1])[0], "at [3, 1] pads with more than 0"),
    ):
        damaged = packed.copy()
        damaged[3, column] = byte
        for chunk in (1, 3, 100):
            with tiny_chunks(chunk), pytest.raises(TernaryError) as caught:
                check_rows(damaged, 7)
            assert str(caught.value).endswith(message)


def test_padding_of_flat_bytes_is_worth_a_warning() -> None:
    packed = np.array(plain_flat([1, -1, 1, 0, 1]), np.uint8)
    for read in (unpack_tq1_0, flat_to_rows):
        with pytest.warns(UserWarning, match="pads 3 trits"):
            read(packed, (3,))
    assert unpack_tq1_0(packed, (5,)).tolist() == [1, -1, 1, 0, 1]


def views(trits: np.ndarray) -> Iterator[np.ndarray]:
    """The same trits, (6, 10, 14), behind strides of every kind."""
    yield trits
    yield np.asfortranarray(trits)
    yield np.ascontiguousarray(trits[::-1])[::-1]
    yield np.ascontiguousarray(trits[..., ::-1])[..., ::-1]
    yield np.ascontiguousarray(trits.swapaxes(0, 1)).swapaxes(0, 1)
    for axis in range(3):
        wide = np.full(
            tuple(2 * n if i == axis else n for i, n in enumerate(trits.shape)), 99, np.int8
        )
        window = wide[tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(3))]
        window[:] = trits
        yield window


@pytest.mark.parametrize("chunk", [2, 7, 10_000])
def test_strided_inputs(chunk: int) -> None:
    trits = random_trits(6, 10, 14)
    packed, packed_rows, packed_bits = pack_tq1_0(trits), pack_rows(trits), pack_two_bit(trits)
    with tiny_chunks(chunk):
        for view in views(trits):
            check_trits(view)
            assert (pack_tq1_0(view) == packed).all()
            assert (pack_rows(view) == packed_rows).all()
            assert (pack_two_bit(view) == packed_bits).all()
    for view in views(packed_rows.view(np.int8)):
        assert (unpack_rows(view.view(np.uint8), 14) == trits).all()
        assert (rows_to_flat(view.view(np.uint8), (6, 10, 14)) == packed).all()
        check_rows(view.view(np.uint8), 14)
    for view in views(packed_bits.view(np.int8)):
        assert (unpack_two_bit(view.view(np.uint8), 14) == trits).all()
    assert (unpack_tq1_0(np.repeat(packed, 2)[::2], trits.shape) == trits).all()


@pytest.mark.parametrize("chunk", [2, 7, 10_000])
def test_out(chunk: int, tmp_path: Path) -> None:
    trits = random_trits(6, 10, 15)
    packed, packed_rows, packed_bits = pack_tq1_0(trits), pack_rows(trits), pack_two_bit(trits)
    shape = trits.shape

    def into(write: Callable[[np.ndarray], np.ndarray], out: np.ndarray) -> np.ndarray:
        out.view(np.uint8)[...] = 77
        with tiny_chunks(chunk):
            assert np.shares_memory(write(out), out)
        return out

    mapped = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=packed_rows.shape)
    for out in (mapped, *(v.view(np.uint8) for v in views(packed_rows.view(np.int8)))):
        assert (into(lambda o: pack_rows(trits, out=o), out) == pack_rows(trits)).all()
        assert (into(lambda o: flat_to_rows(packed, shape, out=o), out) == pack_rows(trits)).all()
    for out in views(trits.copy()):
        assert (into(lambda o: unpack_rows(pack_rows(trits), 15, out=o), out) == trits).all()
        assert (into(lambda o: unpack_two_bit(pack_two_bit(trits), 15, out=o), out) == trits).all()
    for out in (v.view(np.uint8) for v in views(packed_bits.view(np.int8))):
        assert (into(lambda o: pack_two_bit(trits, out=o), out) == pack_two_bit(trits)).all()
    for out in (np.empty(180, np.uint8), np.empty(360, np.uint8)[::2]):
        assert (into(lambda o: pack_tq1_0(trits, out=o), out) == packed).all()
        assert (into(lambda o: rows_to_flat(pack_rows(trits), shape, out=o), out) == packed).all()
    assert (
        into(lambda o: unpack_tq1_0(packed, shape, out=o), np.empty(shape, np.int8)) == trits
    ).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 7), (3, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    trits = np.empty(shape, np.int8)
    check_trits(trits)
    assert pack_tq1_0(trits).shape == (0,)
    assert unpack_tq1_0(pack_tq1_0(trits), shape).shape == shape
    packed_rows = pack_rows(trits)
    assert packed_rows.shape == (*shape[:-1], row_bytes(shape[-1]))
    check_rows(packed_rows, shape[-1])
    assert unpack_rows(packed_rows, shape[-1]).shape == shape
    assert flat_to_rows(pack_tq1_0(trits), shape).shape == packed_rows.shape
    assert rows_to_flat(packed_rows, shape).shape == (0,)
    assert unpack_two_bit(pack_two_bit(trits), shape[-1]).shape == shape


def test_a_single_number_packs_flat() -> None:
    trit = np.array(-1, np.int8)
    assert pack_tq1_0(trit).tolist() == [120]
    assert unpack_tq1_0(pack_tq1_0(trit), ()) == trit
    with pytest.raises(TernaryError, match=r"trit 5 at \[\] \(flat index 0\)"):
        pack_tq1_0(np.array(5, np.int8))


def test_row_bytes() -> None:
    assert [row_bytes(n) for n in (0, 1, 20, 21, 5120, 13824)] == [0, 4, 4, 8, 1024, 2768]
    assert row_bytes(13824, multiple=1) == 2765


TRITS = random_trits(4, 10)
FLAT, ROWS = pack_tq1_0(TRITS), pack_rows(TRITS)
FROZEN = np.empty((4, 4), np.uint8)
FROZEN.flags.writeable = False
HUGE = (2**40, 2**40)
LIST: Any = [0, 1]
FLOAT: Any = 10.0
INT: Any = 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_tq1_0(LIST), "trits: expected a NumPy array, got list"),
        (lambda: pack_tq1_0(TRITS.astype(np.int16)), "trits: expected int8, got int16"),
        (lambda: pack_rows(TRITS.astype(np.float32)), "trits: expected int8, got float32"),
        (lambda: pack_rows(np.array(0, np.int8)), "trits: expected rows, got a single number"),
        (lambda: unpack_tq1_0(FLAT.view(np.int8), (4, 10)), "packed: expected uint8, got int8"),
        (lambda: unpack_tq1_0(FLAT, (4, 11)), "expected 9 bytes in one dimension for 44 trits"),
        (lambda: unpack_tq1_0(FLAT[None], (4, 10)), "expected 8 bytes in one dimension"),
        (lambda: unpack_tq1_0(FLAT, HUGE), "bytes in one dimension for 1208925819614629174706176"),
        (lambda: unpack_tq1_0(FLAT, (-4, -10)), "shape: expected an integer of at least 0, got -4"),
        (lambda: unpack_tq1_0(FLAT, (4, FLOAT)), "shape: expected an integer of at least 0"),
        (lambda: unpack_tq1_0(FLAT, (True, 40)), "shape: expected an integer of at least 0"),
        (lambda: unpack_tq1_0(FLAT, INT), "shape: expected a tuple of integers, got 40"),
        (lambda: flat_to_rows(FLAT, ()), r"shape: expected \(\.\.\., out, in\), got \(\)"),
        (lambda: flat_to_rows(FLAT, HUGE), "bytes in one dimension for"),
        (lambda: rows_to_flat(ROWS, (5, 10)), r"rows: expected leading shape \(5,\), got \(4,\)"),
        (lambda: rows_to_flat(ROWS, HUGE), "rows: expected 219902325556 bytes a row"),
        (lambda: unpack_rows(ROWS, 21), "rows: expected 8 bytes a row for 21 trits, got 4"),
        (lambda: unpack_rows(ROWS, -1), "in_features: expected an integer of at least 0, got -1"),
        (lambda: check_rows(ROWS.view(np.int8), 10), "rows: expected uint8, got int8"),
        (lambda: row_bytes(5, 0), "multiple: expected an integer of at least 1, got 0"),
        (lambda: unpack_two_bit(ROWS, 17), "rows: expected 5 bytes a row for 17 trits, got 4"),
        (lambda: pack_rows(TRITS, out=FROZEN), "out: the array is read-only"),
        (lambda: pack_rows(TRITS, out=FLAT), r"out: expected shape \(4, 4\), got \(8,\)"),
        (lambda: pack_rows(TRITS, out=ROWS.view(np.int8)), "out: expected uint8, got int8"),
        (lambda: unpack_tq1_0(FLAT, (4, 10), out=np.empty((10, 4), np.int8).T), "not contiguous"),
    ],
)
def test_refused_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TernaryError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_scratch_is_bounded() -> None:
    trits = random_trits(600, 13_824)
    packed, packed_rows = pack_tq1_0(trits), pack_rows(trits)
    for call in (
        lambda: check_trits(trits),
        lambda: pack_tq1_0(trits, out=packed),
        lambda: pack_rows(trits, out=packed_rows),
        lambda: unpack_tq1_0(packed, trits.shape, out=trits),
        lambda: unpack_rows(packed_rows, 13_824, out=trits),
        lambda: flat_to_rows(packed, trits.shape, out=packed_rows),
        lambda: rows_to_flat(packed_rows, trits.shape, out=packed),
        lambda: check_rows(packed_rows, 13_824),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3_000_000


def test_threads_do_not_meet() -> None:
    slabs = [random_trits(64, 5003, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(pack_rows, slabs * 4))
        unpacked = list(pool.map(lambda part: unpack_rows(part, 5003), packed))
    for trits, back in zip(slabs * 4, unpacked, strict=True):
        assert (back == trits).all()


TQ1_0, TQ2_0 = gguf.GGMLQuantizationType.TQ1_0, gguf.GGMLQuantizationType.TQ2_0
BLOCK_FORMS = [
    (TQ1_0, ggml.TQ1_0_BYTES, ggml.pack_tq1_0_blocks, ggml.unpack_tq1_0_blocks),
    (TQ2_0, ggml.TQ2_0_BYTES, ggml.pack_tq2_0_blocks, ggml.unpack_tq2_0_blocks),
]


def floats(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    return trits * np.repeat(d.astype(np.float32), 256, axis=-1)


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
        trits, d = unpack(packed, strict=False)
    else:
        trits, d = unpack(packed)
    np.testing.assert_array_equal(floats(trits, d), gguf.dequantize(packed, kind))


def test_code_3_is_refused_with_its_position() -> None:
    packed = ggml.pack_tq2_0_blocks(random_trits(2, 512), np.ones((2, 2), np.float16))
    packed[1, 66 + 32 + 5] |= 3 << 4  # half 1, byte 5, third weight of the second block
    with pytest.raises(TernaryError, match=rf"weight at \[1, {256 + 128 + 5 + 64}\] has code 3"):
        ggml.unpack_tq2_0_blocks(packed)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (3, 512), elements=st.floats(-60000, 60000, width=32)))
def test_quantize_is_that_of_gguf(weights: np.ndarray) -> None:
    weights[0, :4] = [1, 0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(0))]
    weights[0, 4:256] = 0
    tiny = (
        np.abs(weights).reshape(3, 2, 256).max(-1, keepdims=True) < 1e-37
    )  # 1 / d overflows there
    weights[np.repeat(tiny, 256, axis=-1).reshape(3, 512)] = 0
    trits, d = ggml.quantize(weights)
    assert trits[0, :4].tolist() == [1, 1, -1, 0]
    for kind, _, pack, _ in BLOCK_FORMS:
        np.testing.assert_array_equal(pack(trits, d), gguf.quantize(weights, kind))


@pytest.mark.parametrize(("kind", "size", "pack", "unpack"), BLOCK_FORMS)
def test_refused_blocks(kind, size, pack, unpack) -> None:
    trits, d = random_trits(2, 512), np.ones((2, 2), np.float16)
    packed = pack(trits, d)
    with pytest.raises(TernaryError, match="trits: rows of 500 are no whole blocks of 256"):
        pack(trits[:, :500], d)
    with pytest.raises(TernaryError, match=rf"packed: rows of 100 are no whole blocks of {size}"):
        unpack(packed[:, :100])
    with pytest.raises(
        TernaryError, match=r"d: expected shape \(2, 2\), one a block, got \(2, 1\)"
    ):
        pack(trits, d[:, :1])
    with pytest.raises(TernaryError, match="d: expected float16, got float32"):
        pack(trits, d.astype(np.float32))
    trits[1, 300] = 2
    with pytest.raises(TernaryError, match=r"trit 2 at \[1, 300\]"), tiny_chunks(1):
        pack(trits, d)
    for bad in (np.nan, np.inf):
        packed[1, 2 * size - 2 :].view(np.float16)[:] = bad
        with pytest.raises(TernaryError, match=rf"the scale of block \[1, 1\] is {bad}"):
            unpack(packed)
        d[1, 0] = bad
        with pytest.raises(TernaryError, match=rf"the scale of block \[1, 0\] is {bad}"):
            pack(trits, d)
    with pytest.raises(TernaryError, match=r"the scale of block \[0, 0\] is inf"):
        ggml.quantize(np.full((1, 256), 1e5, np.float32))
