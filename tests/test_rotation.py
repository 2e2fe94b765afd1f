"""The Walsh-Hadamard rotation: the kernel in the emulator and plain MLX, against NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import virtual_metal
from outlier_mlx.runtime.rotation import ROTATED_BLOCKS, rotate, tq1_0_rotate
from tests.engine import as_array
from tests.goldens import require_shared
from tests.kernel_cases import random_x
from tests.marks import slow_but
from tests.metal import Metal, needs_emulator
from tests.reference import Array
from tests.tensor_file import read_arrays

# One rounding to the dtype, of values near 1 to 4.
STEP = {mx.float32: 2.0**-21, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
# Width and block: one block, several, and a number that does not fill the last threadgroup.
SHAPES = [(512, 512), (2560, 512), (5120, 1024), (2048, 2048), (12288, 4096), (8192, 8192)]


def random_signs(wide: int) -> Array:
    return np.random.default_rng(wide).choice([-1.0, 1.0], wide).astype(np.float32)


def transformed(x: Array, block: int) -> Array:
    """H x in blocks of the last axis, float64: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, block)
    return (blocks @ matrix / block**0.5).reshape(x.shape)


def expected(x: mx.array, signs: Array, block: int, inverse: bool = False) -> Array:
    values = as_array(x)
    return transformed(values, block) * signs if inverse else transformed(values * signs, block)


def half(signs: Array) -> mx.array:
    return mx.array(signs).astype(mx.float16)


# The kernel


@pytest.mark.parametrize(("wide", "block"), slow_but(SHAPES[:4], SHAPES, names=2))
@pytest.mark.parametrize("inverse", [False, True])
def test_every_block(wide: int, block: int, inverse: bool, metal: Metal):
    x, signs = random_x(0, (3, wide), mx.float32), random_signs(wide)
    y = rotate(x, half(signs), block, inverse=inverse)
    assert y.dtype == mx.float32 and metal.names == ["tq1_0_rotate"]
    np.testing.assert_allclose(y, expected(x, signs, block, inverse), atol=4 * 2.0**-21)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_one_rounding(dtype: mx.Dtype, metal: Metal):
    """Half precision: the exact value rounded to x's dtype, or its neighbour where it is a tie."""
    x, signs = random_x(1, (2, 3, 2048), dtype), random_signs(2048)
    for inverse in (False, True):
        y = rotate(x, half(signs), 1024, inverse=inverse)
        assert y.dtype == dtype and y.shape == x.shape
        exact = expected(x, signs, 1024, inverse)
        np.testing.assert_allclose(as_array(y), exact, rtol=STEP[dtype] / 4, atol=2.0**-21)


def test_every_basis_vector(metal: Metal):
    """The columns of H, exactly: no element goes astray, and the order is the natural one."""
    for block in (512, 1024, 2048):
        chosen = [*range(20), *(1 << n for n in range(block.bit_length() - 1)), block - 1]
        x = np.zeros((len(chosen), block), np.float32)
        x[np.arange(len(chosen)), chosen] = 1
        y = np.array(rotate(mx.array(x), mx.ones((block,), mx.float16), block))
        exact = transformed(x, block)
        np.testing.assert_array_equal(np.sign(y), np.sign(exact))
        np.testing.assert_allclose(y, exact, rtol=2.0**-22)


def test_a_token_has_the_same_bits_alone(metal: Metal):
    x, signs = random_x(2, (5, 1536), mx.float16), half(random_signs(1536))
    together = rotate(x, signs, 512)
    for token in range(5):
        np.testing.assert_array_equal(rotate(x[token], signs, 512), together[token])


@pytest.mark.parametrize(("wide", "block"), [(384, 128), (640, 128), (1024, 2)])
def test_other_blocks_run_in_plain_mlx(wide: int, block: int, metal: Metal):
    x, signs = random_x(3, (2, wide), mx.float32), random_signs(wide)
    y = rotate(x, half(signs), block)
    np.testing.assert_allclose(y, expected(x, signs, block), atol=2.0**-20)
    assert metal.names == []


def test_wrong_arguments():
    x, signs = mx.zeros((1, 1024)), mx.ones((1024,), mx.float16)
    for wrong in (
        (x, signs, 768),
        (x, signs, 2048),
        (x, signs, 0),
        (x.astype(mx.int32), signs, 512),
        (x, mx.ones((1024,)), 512),
        (x, signs[:512], 512),
    ):
        with pytest.raises(ValueError, match="rotation: "):
            rotate(*wrong)
    for block in (128, 768, 2048):
        with pytest.raises(ValueError, match="tq1_0_rotate: "):
            tq1_0_rotate(x, signs, block=block)


@needs_emulator
@pytest.mark.parametrize("block", ROTATED_BLOCKS)
def test_no_element_of_a_thread_is_in_memory(block: int):
    with virtual_metal() as metal:
        rotate(mx.zeros((1, 8192), mx.float16), mx.ones((8192,), mx.float16), block)
    assert not {"private load", "private store"} & set(metal.launches[0].cost.instructions)


@needs_emulator
def test_costs():
    with virtual_metal() as metal:
        rotate(mx.zeros((1, 5120), mx.float16), mx.ones((5120,), mx.float16), 1024)
        rotate(mx.zeros((1, 5120), mx.float16), mx.ones((5120,), mx.float16), 1024, inverse=True)
    for launch in metal.launches:
        element = launch.cost.per_weight(5120)
        assert element.main < 12.7 and element.second < 1.1


# Plain MLX, and gradients


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_cpu_computes_the_same(dtype: mx.Dtype):
    x, signs = random_x(4, (2, 4096), dtype), random_signs(4096)
    for block in (256, *ROTATED_BLOCKS[:4]):
        for inverse in (False, True):
            y = as_array(rotate(x, half(signs), block, inverse=inverse))
            exact = expected(x, signs, block, inverse)
            np.testing.assert_allclose(y, exact, rtol=STEP[dtype] / 4, atol=2.0**-20)


def test_the_inverse_rotates_back():
    x, signs = random_x(5, (2, 2048), mx.float32), half(random_signs(2048))
    for block in (64, 512, 2048):
        back = rotate(rotate(x, signs, block), signs, block, inverse=True)
        np.testing.assert_allclose(back, x, atol=4e-6)


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool, metal: Metal):
    """H is symmetric, so a rotation's gradient is the rotation back of the output's."""
    x, w = (random_x(seed, (2, 1024), mx.float32) for seed in (6, 7))
    signs = half(random_signs(1024))
    for inverse in (False, True):

        def loss(x: mx.array, inverse: bool = inverse) -> mx.array:
            y = rotate(x, signs, 512, inverse=inverse, training=training)
            return (y * w).sum()

        found = mx.grad(loss)(x)
        exact = expected(w, as_array(signs), 512, not inverse)
        np.testing.assert_allclose(found, exact, atol=2e-6)
    assert metal.names == ([] if training else ["tq1_0_rotate"] * 2)


def test_the_reference_rotations():
    arrays = read_arrays(require_shared() / "goldens/ternary_models/rotation/rotation.safetensors")
    cases = sorted({name.split(".")[0] for name in arrays} - {"sylvester16"})
    assert len(cases) >= 4
    for case in cases:
        block = int(case.split("_")[1])
        x, signs = mx.array(arrays[f"{case}.x"]), half(arrays[f"{case}.signs"])
        for inverse, name in ((False, "forward"), (True, "inverse")):
            y = rotate(x, signs, block, inverse=inverse)
            np.testing.assert_allclose(y, arrays[f"{case}.{name}"], atol=2e-6)
    np.testing.assert_array_equal(transformed(np.eye(16), 16) * 4, arrays["sylvester16"])
