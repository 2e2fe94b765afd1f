"""Write the tables of docs/kernels.md: costs and accuracy of the kernels.

The emulator (kernels/emulator) counts and computes everything: no GPU is needed, and no time is
measured. With `--check`, the script only fails if the page is out of date.
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
    """A Markdown table; columns of numbers are right-aligned."""
    lines = [head, [":---" if i == 0 else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(name: str, figures: Figures) -> list[str]:
    numbers = [figures.main, figures.second, figures.cycles]
    return [name, *(f"{n:.2f}" for n in numbers), f"{figures.bytes:.4f}", f"{figures.loads:.3f}"]


def cost_table(shape: str) -> str:
    """Cycles, bytes and loads of every variant, for float16 and some other dtypes."""
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
    """Shape, kernel, chip, overlapping, and picoseconds of our kernel, MLX's and the floor."""
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
    """Modelled time per weight of our kernel, MLX's and the floor."""
    head = ["", "chip", "pipes", "ours, ps", "MLX 2-bit, ps", "floor, ps", "ours / MLX"]
    rows = []
    for shape, kernel, chip, overlapping, mine, theirs, floor in ratios():
        pipes = "overlap" if overlapping else "take turns"
        times = [f"{t:.3f}" for t in (mine, theirs, floor)]
        row = [f"{shape} `tq1_0_{kernel}`", chip.name, pipes, *times, f"{mine / theirs:.2f}"]
        rows.append(row)
    return table(head, rows)


def accuracy_table() -> str:
    """The largest errors over four random draws of 1024 rows, K = 5120, 0, 1 or 5 outliers."""
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
    """The generated tables by the names of their marks in the page."""
    tables = {f"cost {shape}": cost_table(shape) for shape in SHAPES}
    return tables | {"time": time_table(), "accuracy": accuracy_table()}


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its two marks."""
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"{PAGE.name}: expected one pair of marks for {name!r}")
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only fail if it is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    made = filled(page, sections())
    if check and made != page:
        raise SystemExit(f"{PAGE} is out of date: run {Path(__file__).name}")
    if not check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
