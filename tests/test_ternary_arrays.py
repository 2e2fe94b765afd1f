"""Arrays of any shape, stride and size go in and out, and what is none is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

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
from tests.trits import random_trits, tiny_chunks


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
    packed, packed_rows = pack_tq1_0(trits), pack_rows(trits)
    with tiny_chunks(chunk):
        for view in views(trits):
            assert (pack_tq1_0(view) == packed).all()
            assert (pack_rows(view) == packed_rows).all()
    for view in views(packed_rows.view(np.int8)):
        assert (unpack_rows(view.view(np.uint8), 14) == trits).all()
        assert (rows_to_flat(view.view(np.uint8), (6, 10, 14)) == packed).all()
        check_rows(view.view(np.uint8), 14)
    assert (unpack_tq1_0(np.repeat(packed, 2)[::2], trits.shape) == trits).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 7), (3, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    trits = np.empty(shape, np.int8)
    assert pack_tq1_0(trits).shape == (0,)
    assert unpack_tq1_0(pack_tq1_0(trits), shape).shape == shape
    packed_rows = pack_rows(trits)
    assert packed_rows.shape == (*shape[:-1], row_bytes(shape[-1]))
    check_rows(packed_rows, shape[-1])
    assert unpack_rows(packed_rows, shape[-1]).shape == shape
    assert flat_to_rows(pack_tq1_0(trits), shape).shape == packed_rows.shape
    assert rows_to_flat(packed_rows, shape).shape == (0,)


def test_a_single_number_packs_flat() -> None:
    trit = np.array(-1, np.int8)
    assert pack_tq1_0(trit).tolist() == [120]
    assert unpack_tq1_0(pack_tq1_0(trit), ()) == trit
    with pytest.raises(TernaryError, match=r"trit 5 at \[\] \(flat index 0\)"):
        pack_tq1_0(np.array(5, np.int8))


def test_row_bytes() -> None:
    widths = {0: 0, 1: 16, 80: 16, 81: 32, 160: 32, 3584: 720, 5120: 1024}
    widths |= {13824: 2768, 18944: 3792}
    assert {width: row_bytes(width) for width in widths} == widths


TRITS = random_trits(4, 10)
FLAT, ROWS = pack_tq1_0(TRITS), pack_rows(TRITS)
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
        (lambda: rows_to_flat(ROWS, HUGE), "rows: expected 219902325568 bytes a row"),
        (lambda: unpack_rows(ROWS, 81), "rows: expected 32 bytes a row for 81 trits, got 16"),
        (lambda: unpack_rows(ROWS, -1), "in_features: expected an integer of at least 0, got -1"),
        (lambda: check_rows(ROWS.view(np.int8), 10), "rows: expected uint8, got int8"),
        (lambda: row_bytes(FLOAT), "in_features: expected an integer of at least 0, got 10.0"),
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
        lambda: pack_tq1_0(trits),
        lambda: pack_rows(trits),
        lambda: unpack_tq1_0(packed, trits.shape),
        lambda: unpack_rows(packed_rows, 13_824),
        lambda: flat_to_rows(packed, trits.shape),
        lambda: rows_to_flat(packed_rows, trits.shape),
        lambda: check_rows(packed_rows, 13_824),
    ):
        tracemalloc.start()
        with ThreadPoolExecutor(1) as thread:  # a new thread has no buffers yet
            result = thread.submit(call).result()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 100_000 < peak - (0 if result is None else result.nbytes) < 3_000_000


def test_threads_do_not_meet() -> None:
    slabs = [random_trits(64, 5003, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(pack_rows, slabs * 4))
        unpacked = list(pool.map(lambda part: unpack_rows(part, 5003), packed))
    for trits, back in zip(slabs * 4, unpacked, strict=True):
        assert (back == trits).all()
