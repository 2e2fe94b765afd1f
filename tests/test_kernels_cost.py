"""What the decode kernels cost by the emulator's count, beside MLX's own 2-bit kernel."""

from __future__ import annotations

import sys

import pytest

from kernels.costs import CHIPS, KERNELS, SHAPES, mlx_two_bit, ours
from outlier_mlx.runtime.variants import Variant
from tests.program import ROOT, run_command

# Of a weight: main-pipe plus half of second-pipe cycles, and bytes.
ALLOWED = {
    ("14B", "swiglu"): (3.4, 0.202),
    ("14B", "down"): (3.3, 0.202),
    ("7B", "swiglu"): (3.7, 0.203),
    ("7B", "down"): (3.3, 0.202),
}


def check(shape: str, kernel: str) -> None:
    hidden, width = SHAPES[shape]
    found = ours(kernel, hidden, width, Variant())
    cycles, nbytes = ALLOWED[shape, kernel]
    assert 2.5 < found.cycles <= cycles
    assert 0.2 <= found.bytes <= nbytes
    assert found.loads <= 0.11
    assert not found.private
    theirs = mlx_two_bit(hidden if kernel == "swiglu" else width)
    assert theirs.bytes == pytest.approx(2 / 8 + 4 / 128)
    for chip in CHIPS:
        for overlapping in (True, False):
            mine, other = (chip.picoseconds(f, overlapping) for f in (found, theirs))
            assert mine <= 0.75 * other, f"{chip.name}, {overlapping=}: {mine / other:.2f}"


def test_the_14b_shapes():
    check("14B", "swiglu")
    check("14B", "down")


@pytest.mark.slow
def test_the_7b_shapes():
    check("7B", "swiglu")
    check("7B", "down")


@pytest.mark.slow
def test_the_page_is_what_the_kernels_cost():
    run_command(sys.executable, ROOT / "scripts" / "kernel_costs.py", "--check", cwd=ROOT)


def test_other_forms_cost_more():
    """What the choice of the default rests on; floor is what loading alone costs."""
    hidden, width = SHAPES["14B"]
    default = ours("swiglu", hidden, width, Variant())
    floor = ours("swiglu", hidden, width, Variant(decode="floor"))
    assert floor.cycles < 0.2 * default.cycles
    assert (floor.bytes, floor.loads) == (default.bytes, pytest.approx(default.loads))


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["exact", "telescoped"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_decodes_cost_more(kernel: str, decode: str):
    hidden, width = SHAPES["14B"]
    default = ours(kernel, hidden, width, Variant())
    assert ours(kernel, hidden, width, Variant(decode=decode)).cycles > 1.25 * default.cycles
