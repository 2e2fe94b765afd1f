"""What the decode kernels cost by the emulator's count, beside MLX's own 2-bit kernel."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from kernels.costs import CHIPS, SHAPES, mlx_two_bit, ours
from kernels.costs_decode import MODELS, Hybrid, steps
from outlier_mlx.runtime.kernels import VARIANTS
from tests.program import ROOT, run_command

# Of a weight: cycles on the main and on the second pipe, and bytes.
ALLOWED = {
    ("14B", "swiglu"): (2.55, 0.5, 0.202),
    ("14B", "down"): (2.55, 0.45, 0.202),
    ("14B", "qmv"): (2.55, 0.5, 0.202),
    ("7B", "swiglu"): (2.7, 0.55, 0.203),
    ("7B", "down"): (2.55, 0.45, 0.202),
    ("7B", "qmv"): (2.7, 0.55, 0.203),
}
MOST_REGISTERS, MOST_LOOP_BYTES = 135, 8192


def check(shape: str, kernel: str) -> None:
    wide = SHAPES[shape][kernel]
    found = ours(kernel, wide, VARIANTS[f"tq1_0_{kernel}"])
    main, second, nbytes = ALLOWED[shape, kernel]
    assert 2.3 < found.main <= main
    assert 0.3 < found.second <= second
    assert 0.2 <= found.bytes <= nbytes
    assert found.loads <= 0.11
    assert not found.private
    assert found.registers <= MOST_REGISTERS
    assert found.loop_bytes <= MOST_LOOP_BYTES
    theirs = mlx_two_bit(wide)
    assert theirs.bytes == pytest.approx(2 / 8 + 4 / 128)
    for chip in CHIPS:
        for overlapping in (True, False):
            mine, other = (chip.picoseconds(f, overlapping) for f in (found, theirs))
            assert mine <= 0.75 * other, f"{chip.name}, {overlapping=}: {mine / other:.2f}"


@pytest.mark.parametrize("kernel", SHAPES["14B"])
def test_the_14b_shapes(kernel: str):
    check("14B", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SHAPES["7B"])
def test_the_7b_shapes(kernel: str):
    check("7B", kernel)


@pytest.mark.slow
def test_the_page_is_what_the_kernels_cost():
    run_command(sys.executable, ROOT / "scripts" / "kernel_costs.py", "--check", cwd=ROOT)


def test_what_loading_alone_costs():
    wide, default = SHAPES["14B"]["swiglu"], VARIANTS["tq1_0_swiglu"]
    found = ours("swiglu", wide, default)
    floor = ours("swiglu", wide, replace(default, decode="floor"))
    assert floor.cycles < 0.2 * found.cycles
    assert (floor.bytes, floor.loads) == (found.bytes, pytest.approx(found.loads))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_ternary_models(model: Hybrid):
    """A decoding step takes at most 0.8 of MLX's time for 2 bits, rotated or not."""
    for chip in CHIPS:
        for overlapping in (True, False):
            ours, theirs = steps(model, chip, overlapping)
            assert 0 < ours.products <= 0.8 * theirs.products
            assert ours.total <= 0.8 * theirs.total
    ternary = sum(count * out * wide for count, out, wide in model.matrices())
    if model.name == "27B":  # with the embedding, the number that its publisher states
        assert ternary + model.vocab * model.hidden == 26_869_760_000
