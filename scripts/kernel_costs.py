"""Writes the tables of docs/kernels.md: what the kernels cost and how accurate they are.

Everything is counted or computed by the emulator (kernels/emulator): no GPU is needed, and no time
is measured. `python scripts/kernel_costs.py --check` fails if the page is not what comes out.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from kernels.accuracy import errors, planted
from kernels.costs import CHIPS, KERNELS, SHAPES, Chip, Figures, mlx_two_bit, ours
from kernels.emulator import virtual_metal
from outlier_mlx.runtime.variants import Variant

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
VARIANTS = {
    "default": Variant(),
    "4 rows": Variant(rows=4),
    "16 rows": Variant(rows=16),
    "64-bit loads": Variant(load_bits=64),
    "exact digits": Variant(decode="exact"),
    "telescoped": Variant(decode="telescoped"),
    "floor (loads alone)": Variant(decode="floor"),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [head, [":---" if i == 0 else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(name: str, figures: Figures) -> list[str]:
    numbers = [figures.main, figures.second, figures.cycles]
    return [name, *(f"{n:.2f}" for n in numbers), f"{figures.bytes:.4f}", f"{figures.loads:.3f}"]


def cost_table(shape: str) -> str:
    """Cycles, bytes and loads of every variant, in float16."""
    hidden, width = SHAPES[shape]
    head = ["", "main", "second", "main + second / 2", "bytes", "loads"]
    rows = []
    for kernel, wide in zip(KERNELS, (hidden, width), strict=True):
        for name, variant in VARIANTS.items():
            found = ours(kernel, hidden, width, variant)
            rows.append(_row(f"`tq1_0_{kernel}`, {name}", found))
        if kernel == "swiglu":
            for dtype in (mx.bfloat16, mx.float32):
                name = str(dtype).removeprefix("mlx.core.")
                rows.append(
                    _row(f"`tq1_0_swiglu`, {name}", ours(kernel, hidden, width, Variant(), dtype))
                )
        rows.append(_row(f"MLX 2-bit, in = {wide}", mlx_two_bit(wide)))
    return table(head, rows)


def ratios() -> Iterator[tuple[str, str, Chip, bool, float, float, float]]:
    """Shape, kernel, chip, overlapping, and picoseconds of ours, MLX's and the floor."""
    for shape, (hidden, width) in SHAPES.items():
        for kernel, wide in zip(KERNELS, (hidden, width), strict=True):
            arms = (
                ours(kernel, hidden, width, Variant()),
                mlx_two_bit(wide),
                ours(kernel, hidden, width, Variant(decode="floor")),
            )
            for chip in CHIPS:
                for overlapping in (True, False):
                    mine, theirs, floor = (chip.picoseconds(a, overlapping) for a in arms)
                    yield shape, kernel, chip, overlapping, mine, theirs, floor


def time_table() -> str:
    """Modelled time of a weight, beside MLX's and the floor's."""
    head = ["", "chip", "pipes", "ours, ps", "MLX 2-bit, ps", "floor, ps", "ours / MLX"]
    rows = []
    for shape, kernel, chip, overlapping, mine, theirs, floor in ratios():
        pipes = "overlap" if overlapping else "take turns"
        times = [f"{t:.3f}" for t in (mine, theirs, floor)]
        row = [f"{shape} `tq1_0_{kernel}`", chip.name, pipes, *times, f"{mine / theirs:.2f}"]
        rows.append(row)
    return table(head, rows)


def accuracy_table() -> str:
    """The largest errors over four draws of 1024 rows, K = 5120, five outliers or one."""
    head = ["", *(f"{decode}" for decode in ("exponent", "exact", "telescoped"))]
    rows = []
    with virtual_metal(count=False):
        for outliers, size, together in (
            (0, 0.0, False),
            (1, 1e3, False),
            (5, 1e3, False),
            (1, 1e4, False),
            (5, 1e4, False),
            (5, 1e4, True),
        ):
            row = [f"{outliers} at {size:g}" if outliers else "none"]
            row[0] += ", in one word of a row" if together else ""
            for decode in head[1:]:
                zero, others = 0.0, 0.0
                for seed in range(4):
                    x, trits, _ = planted(seed, 5120, 1024, outliers, size, together)
                    found = errors(x, trits, decode)
                    zero, others = max(zero, found[::2].max()), max(others, found[1::2].max())
                row.append(f"{zero:.3f} / {others:.3f}")
            rows.append(row)
    return table(head, rows)


def sections() -> dict[str, str]:
    """The generated tables by the names that the page gives them."""
    tables = {f"cost {shape}": cost_table(shape) for shape in SHAPES}
    return tables | {"time": time_table(), "accuracy": accuracy_table()}


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its two marks."""
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"{PAGE.name} has no one place for {name!r}")
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    made = filled(page, sections())
    if check and made != page:
        raise SystemExit(f"{PAGE} is not what the kernels are now: run {Path(__file__).name}")
    if not check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
