"""Write the tables of docs/kernels.md: costs and accuracy of the kernels.

The emulator (kernels/emulator) counts and computes everything: no GPU is needed, and no time is
measured. With `--check`, the script only fails if the page is out of date.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from difflib import unified_diff
from pathlib import Path

import mlx.core as mx

from kernels import costs_decode, costs_routing, launch_counts, launch_counts_ternary
from kernels.accuracy import errors, planted
from kernels.costs import CHIPS, SHAPES, Chip, Figures, mlx_two_bit, ours
from kernels.costs_blocks import SIZES, block_cost
from kernels.costs_dense import linear, rotation
from kernels.emulator import virtual_metal
from kernels.launch_counts import Shape
from kernels.several import ROUTINGS, TOKENS, Layer
from outlier_mlx.runtime.groups import SLICES
from outlier_mlx.runtime.kernels import VARIANTS
from outlier_mlx.runtime.rotation import ROTATED_BLOCKS
from outlier_mlx.runtime.variants import Variant

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


def variants(kernel: str) -> dict[str, Variant]:
    """The variants in the tables, by name."""
    default = VARIANTS[f"tq1_0_{kernel}"]
    return {
        "default": default,
        "half the rows": replace(default, rows=default.rows // 2),
        "twice the rows": replace(default, rows=default.rows * 2),
        f"{'one piece' if default.pieces == 2 else 'two pieces'} a turn": replace(
            default, pieces=3 - default.pieces
        ),
        "floor (loads alone)": replace(default, decode="floor"),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    lines = [head, [":---" if i == 0 else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(name: str, figures: Figures) -> list[str]:
    numbers = [figures.main, figures.second, figures.cycles]
    estimates = [figures.registers, figures.threads, figures.loop_bytes]
    per_weight = [*(f"{n:.2f}" for n in numbers), f"{figures.bytes:.4f}", f"{figures.loads:.3f}"]
    return [name, *per_weight, *map(str, estimates)]


def cost_table(shape: str) -> str:
    """Cycles, bytes, loads and estimates of every variant, for float16 and some other dtypes."""
    head = ["", "main", "second", "main + second / 2", "bytes", "loads"]
    head += ["registers", "threads", "loop bytes"]
    rows = []
    for kernel, wide in SHAPES[shape].items():
        named = variants(kernel)
        for name, variant in named.items():
            rows.append(_row(f"`tq1_0_{kernel}`, {name}", ours(kernel, wide, variant)))
        if kernel == "swiglu":
            for dtype in (mx.bfloat16, mx.float32):
                name = str(dtype).removeprefix("mlx.core.")
                found = ours(kernel, wide, named["default"], dtype)
                rows.append(_row(f"`tq1_0_swiglu`, {name}", found))
    for wide in sorted(set(SHAPES[shape].values())):
        rows.append(_row(f"MLX 2-bit, in = {wide}", mlx_two_bit(wide)))
    return table(head, rows)


def block_table(shape: str) -> str:
    """Cycles and estimates with blocks of several pairs of one expert, full and not."""
    head = ["", "pairs", "main", "second", "main for a pair", "loads"]
    head += ["registers", "threads", "loop bytes"]
    cases = [(kernel, size, size, mx.float16) for kernel in ("swiglu", "qmv") for size in SIZES]
    cases += [("qmv", size, size, mx.bfloat16) for size in SIZES]
    cases += [("down", size, size, mx.float32) for size in SIZES]
    cases += [("qmv", size, n, mx.float16) for size in SIZES for n in range(1, size)]
    rows = []
    for kernel, size, pairs, dtype in cases:
        found = block_cost(kernel, SHAPES[shape][kernel], size, pairs, dtype)
        name = "`tq1_0_qmv` for down" if kernel == "down" else f"`tq1_0_{kernel}`"
        name += ", bfloat16" if dtype == mx.bfloat16 else ""
        cycles = f"{found.main:.2f}", f"{found.second:.2f}", f"{found.main / pairs:.2f}"
        rest = [f"{found.loads:.3f}"]
        rest += map(str, (found.registers, found.threads, found.loop_bytes))
        rows.append([f"{name}, blocks of {size}", str(pairs), *cycles, *rest])
    return table(head, rows)


def linear_table() -> str:
    """Cycles and estimates of ordinary linear layers: widths, groups, vectors and dtypes."""
    head = ["", "vectors", "main", "second", "main for a vector", "bytes", "loads"]
    head += ["registers", "threads", "loop bytes"]
    cases: list[tuple[int, int, int, mx.Dtype]] = []
    cases += [(wide, 128, 1, mx.float16) for wide in (5120, 17408, 6144, 2048, 1536)]
    cases += [(5120, 64, 1, mx.float16), (5120, 0, 1, mx.float16), (1536, 0, 1, mx.float16)]
    cases += [(5120, 128, 1, dtype) for dtype in (mx.bfloat16, mx.float32)]
    cases += [(5120, group, n, mx.float16) for group in (128, 0) for n in SLICES[1:]]
    rows = []
    for wide, group, vectors, dtype in cases:
        kind = f"groups of {group}" if group else "one scale a row"
        name = "" if dtype == mx.float16 else f", {str(dtype).removeprefix('mlx.core.')}"
        found = linear(wide, group, vectors, dtype)
        cycles = f"{found.main:.2f}", f"{found.second:.2f}", f"{found.main / vectors:.2f}"
        rest = [f"{found.bytes:.4f}", f"{found.loads:.3f}"]
        rest += map(str, (found.registers, found.threads, found.loop_bytes))
        rows.append([f"in = {wide}, {kind}{name}", str(vectors), *cycles, *rest])
    return table(head, rows)


def rotation_table() -> str:
    """Cycles and estimates of the rotation for an element of x."""
    rows = []
    for block in ROTATED_BLOCKS:
        for dtype in (mx.float16, mx.float32, mx.bfloat16) if block == 1024 else (mx.float16,):
            found = rotation(block, dtype)
            name = f"{block}, {str(dtype).removeprefix('mlx.core.')}"
            cycles = [f"{found.main:.2f}", f"{found.second:.2f}"]
            rows.append([name, *cycles, str(found.registers), str(found.threads)])
    return table(["block", "main", "second", "registers", "threads"], rows)


def ratios() -> Iterator[tuple[str, str, Chip, bool, float, float, float]]:
    """Shape, kernel, chip, overlapping, and picoseconds of our kernel, MLX's and the floor."""
    for shape, kernels in SHAPES.items():
        for kernel, wide in kernels.items():
            if kernel == "qmv":
                continue  # as swiglu
            named = variants(kernel)
            floor = ours(kernel, wide, named["floor (loads alone)"])
            arms = ours(kernel, wide, named["default"]), mlx_two_bit(wide), floor
            for chip in CHIPS:
                for overlapping in (True, False):
                    mine, theirs, least = (chip.picoseconds(a, overlapping) for a in arms)
                    yield shape, kernel, chip, overlapping, mine, theirs, least


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


def several_table() -> str:
    """Modelled times of a layer's routed experts for 1 to 256 tokens, before blocks and now."""
    head = ["experts, used", "tokens", "M", *(chip.name for chip in CHIPS)]
    rows = []
    for experts, k in ROUTINGS:
        for tokens in TOKENS:
            layer = Layer("14B", tokens, experts, k)
            row = [f"{experts}, {k}", str(tokens), str(layer.size)]
            for chip in CHIPS:
                first = layer.first(chip)
                ratios = layer.now(chip) / first, layer.converted(chip) / first
                row.append(f"{1000 * first:.2f} ms: {ratios[0]:.2f}, {ratios[1]:.2f}")
            rows.append(row)
    return table(head, rows)


def sharing_table() -> str:
    """Times now, relative to before, for two numbers of tokens, random and balanced routing."""
    rows = []
    for tokens in (4, 32):
        for balanced in (False, True):
            layer = Layer("14B", tokens, 8, 2, balanced)
            ratios = [layer.now(chip) / layer.first(chip) for chip in CHIPS]
            kind = "as many pairs each" if balanced else "random"
            rows.append([f"{tokens} tokens, {kind}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["", *(chip.name for chip in CHIPS)], rows)


def models_table() -> str:
    """Modelled time of a decoding step of ternary models, with and without rotations."""
    head = ["", "chip", "ours, ms", "MLX 2-bit, ms", "ours / MLX", "pipes take turns"]
    head += ["rotated", "rotated, pipes take turns"]
    rows = []
    for model in costs_decode.MODELS:
        for chip in CHIPS:
            (mine, theirs), turns = (costs_decode.steps(model, chip, o) for o in (True, False))
            row = [model.name, chip.name, f"{mine.products:.2f}", f"{theirs.products:.2f}"]
            row += [f"{a.products / b.products:.2f}" for a, b in ((mine, theirs), turns)]
            row += [f"{a.total / b.total:.2f}" for a, b in ((mine, theirs), turns)]
            rows.append(row)
    return table(head, rows)


def accuracy_table() -> str:
    """The largest errors over four random draws of 1024 rows, K = 5120, 0, 1 or 5 outliers."""
    head = ["", "trit 0 at the outliers", "other rows"]
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
            name = f"{outliers} at {size:g}" if outliers else "none"
            name += ", in one word of a row" if together else ""
            draws = [planted(seed, 5120, 1024, outliers, size, together) for seed in range(4)]
            found = [errors(x, trits) for x, trits, _ in draws]
            worst = [max(one[part::2].max() for one in found) for part in (0, 1)]
            rows.append([name, *(f"{error:.3f}" for error in worst)])
    return table(head, rows)


def routing_table() -> str:
    """Counted and modelled costs of the routing kernels, for hidden size 5120."""
    head = ["", "threadgroups", "main", "second", "bytes", "registers", "1", "32", "512"]
    return table(head, list(costs_routing.rows(CHIPS[0], 5120)))


def sections() -> dict[str, str]:
    """The generated tables by the names of their marks in the page."""
    tables = {f"cost {shape}": cost_table(shape) for shape in SHAPES}
    tables |= {"cost blocks": block_table("14B")}
    tables |= {"cost linear": linear_table(), "cost rotation": rotation_table()}
    tables |= {"time": time_table(), "accuracy": accuracy_table(), "routing": routing_table()}
    tables |= {"several": several_table(), "sharing": sharing_table()}
    tables |= {"models": models_table()}
    tables |= {"launches ternary": launch_counts_ternary.table(costs_decode.MODELS[-1])}
    return tables | {"launches": launch_counts.table([Shape(), Shape(experts=64, top_k=8)])}


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
    mx.random.seed(0)
    made = filled(page, sections())
    if check and made != page:
        changes = unified_diff(page.splitlines(), made.splitlines(), n=0, lineterm="")
        print("\n".join(changes), file=sys.stderr)
        raise SystemExit(f"{PAGE} is out of date: run {Path(__file__).name}")
    if not check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
