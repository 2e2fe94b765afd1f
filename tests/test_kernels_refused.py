"""What the kernels' launchers refuse, each in one line, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from outlier_mlx.runtime import kernels
from tests.kernel_cases import random_matrices
from tests.metal import Metal


def swiglu_call(**changes: Any) -> Callable[[], mx.array]:
    m = random_matrices(1, 3, 9, 20)
    arguments: dict[str, Any] = {
        "x": mx.zeros((2, 20)),
        "gate": m.rows,
        "gate_scales": mx.ones((3, 9)),
        "up": m.rows,
        "up_scales": mx.ones((3, 9)),
        "indices": mx.zeros((2, 2), mx.uint32),
    }
    return lambda: kernels.tq1_0_swiglu(**arguments | changes)


def down_call(**changes: Any) -> Callable[[], mx.array]:
    arguments: dict[str, Any] = {
        "h": mx.zeros((2, 2, 9)),
        "down": random_matrices(1, 3, 20, 9).rows,
        "scales": mx.ones((3, 20)),
        "indices": mx.zeros((2, 2), mx.uint32),
        "weights": mx.zeros((2, 2)),
        "shared": mx.zeros((2, 20)),
    }
    return lambda: kernels.tq1_0_down(**arguments | changes)


REFUSED: dict[str, tuple[Callable[[], mx.array], str]] = {
    "x-dtype": (swiglu_call(x=mx.zeros((2, 20), mx.int32)), "x is (2, 20) int32"),
    "x-shape": (swiglu_call(x=mx.zeros((20,))), "x is (20,) float32"),
    "width": (swiglu_call(x=mx.zeros((2, 81))), "expected (experts, out, 32) uint8 for rows of 81"),
    "rows-dtype": (swiglu_call(gate=mx.zeros((3, 9, 4), mx.uint32)), "gate is (3, 9, 4) uint32"),
    "up-shape": (
        swiglu_call(up=random_matrices(1, 3, 8, 20).rows, up_scales=mx.ones((3, 8))),
        "gate (3, 9, 16) and up (3, 8, 16) differ",
    ),
    "scales": (swiglu_call(gate_scales=mx.ones((3, 9), mx.float16)), "scales of gate are (3, 9)"),
    "indices": (swiglu_call(indices=mx.zeros((2, 2), mx.int32)), "indices are (2, 2) int32"),
    "tokens": (swiglu_call(indices=mx.zeros((3, 2), mx.uint32)), "indices are (3, 2) uint32"),
    "k": (swiglu_call(indices=mx.zeros((2, 65), mx.uint32)), "65 experts per token"),
    "no-k": (swiglu_call(indices=mx.zeros((2, 0), mx.uint32)), "0 experts per token"),
    "no-experts": (
        swiglu_call(gate=mx.zeros((0, 9, 16), mx.uint8), gate_scales=mx.ones((0, 9))),
        "0 stored experts; supported: 1 to 65536",
    ),
    "one-row": (
        swiglu_call(gate=mx.zeros((3, 1, 16), mx.uint8), gate_scales=mx.ones((3, 1))),
        "1 out features; supported: 2 to",
    ),
    "too-wide": (
        swiglu_call(x=mx.zeros((1, 131073))),
        "131073 in features; supported: 1 to 131072",
    ),
    "h-dtype": (down_call(h=mx.zeros((2, 2, 9), mx.float16)), "h is (2, 2, 9) float16"),
    "h-shape": (down_call(h=mx.zeros((2, 9))), "h is (2, 9) float32"),
    "h-k": (down_call(h=mx.zeros((2, 3, 9))), "differ in tokens or k"),
    "weights": (down_call(weights=mx.zeros((2, 2), mx.float16)), "weights are (2, 2) float16"),
    "shared": (down_call(shared=mx.zeros((2, 19))), "shared is (2, 19) float32"),
    "pairs": (
        lambda: kernels.tq1_0_qmv(
            mx.zeros((2, 20)), *random_matrices(1, 3, 9, 20).packed, mx.zeros((3,), mx.uint32)
        ),
        "3 pairs are not a multiple of 2 vectors",
    ),
    "pairs-shape": (
        lambda: kernels.tq1_0_qmv(
            mx.zeros((2, 20)), *random_matrices(1, 3, 9, 20).packed, mx.zeros((1, 2), mx.uint32)
        ),
        "indices are (1, 2) uint32",
    ),
    "transcode": (
        lambda: kernels.tq1_0_to_affine2(mx.zeros((3, 8), mx.uint8), 20),
        "expected uint8 rows of 16 bytes for 20 trits",
    ),
    "transcode-many": (
        lambda: kernels.tq1_0_to_affine2(
            mx.broadcast_to(mx.zeros((1,), mx.uint8), (1 << 16, 1 << 15, 16)), 20
        ),
        "2147483648 rows of 20 trits are too many for one grid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_a_launch(name: str, metal: Metal):
    call, reason = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("tq1_0_")
    assert metal.launches == []
