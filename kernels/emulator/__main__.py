"""Lints a kernel, runs it on random data and prints its cost.

    python -m kernels.emulator kernels/tq1_0_qmv.metal --header kernels/tq1_0.metal \\
        --input x=float16:1x5120 --input rows=uint8:2x512x1024 --input scales=float32:2x512@1 \\
        --input indices=uint32:2@0 --output y=float32:2x512 \\
        --template T=float16 --template K=5120 --grid 2048,2,1 --threadgroup 64,1,1 \\
        --weights 5242880 --weight rows --weight scales

The file is the body of a custom kernel for `mx.fast.metal_kernel`, or Metal source with [[kernel]]
functions, of which --kernel chooses one.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import launch
from .arrays import filled, memory
from .cost import TABLE, Cost, price
from .errors import EmulatorError
from .kernel import compile_kernel
from .signature import parse
from .virtual import virtual_metal

_NAMES = "uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 bfloat16 complex64"
_DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in re.findall(r"\w+", _NAMES)}
_DTYPES["bool"] = mx.bool_


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _declared(text: str) -> tuple[str, mx.Dtype, tuple[int, ...], float | None]:
    """Reads NAME=DTYPE[:SHAPE][@VALUE]."""
    found = re.fullmatch(r"(\w+)=(\w+)(?::([\dx]+))?(?:@(\S+))?", text)
    if found is None or found[2] not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DTYPE[:SHAPE][@VALUE]")
    shape = tuple(int(n) for n in found[3].split("x")) if found[3] else ()
    return found[1], _DTYPES[found[2]], shape, float(found[4]) if found[4] else None


def _template(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, _DTYPES[value] if value in _DTYPES else int(value)


def _data(dtype: mx.Dtype, shape: tuple[int, ...], value: float | None) -> mx.array:
    if value is not None:
        return mx.full(shape, value).astype(dtype)
    if mx.issubdtype(dtype, mx.floating):
        return mx.random.normal(shape).astype(dtype)
    raw = np.random.default_rng(0).integers(0, 256, (*shape, dtype.size), np.uint8)
    if dtype in (mx.bool_, mx.complex64):
        return (mx.array(raw[..., 0]) % 2 == 0).astype(dtype)
    return mx.array(raw).view(dtype).reshape(shape)


def _custom(arguments: argparse.Namespace, text: str, header: str) -> Cost:
    with virtual_metal() as metal:
        kernel = metal.metal_kernel(
            name=re.sub(r"\W", "_", arguments.file.stem),
            input_names=[one[0] for one in arguments.input],
            output_names=[one[0] for one in arguments.output],
            source=text,
            header=header,
        )
        kernel(
            inputs=[_data(*one[1:]) for one in arguments.input],
            template=arguments.template or None,
            grid=arguments.grid,
            threadgroup=arguments.threadgroup,
            output_shapes=[one[2] for one in arguments.output],
            output_dtypes=[one[1] for one in arguments.output],
        )
        return metal.launches[0].cost


def _written(arguments: argparse.Namespace, text: str) -> Cost | None:
    name, _, rest = arguments.kernel.partition("<")
    signature = parse(text, name, "<" + rest if rest else "")
    kernel = compile_kernel(text, signature)
    if arguments.grid is None:
        return None
    inputs = {one[0]: one for one in arguments.input}
    outputs = {one[0]: one for one in arguments.output}
    buffers = []
    for parameter in signature.buffers:
        if parameter.name in inputs:
            _, dtype, shape, value = inputs[parameter.name]
            data = memory(mx.contiguous(_data(dtype, shape, value)))[0]
            buffers.append(launch.Buffer(data, item=dtype.size))
        elif parameter.name in outputs:
            _, dtype, shape, value = outputs[parameter.name]
            data = filled(shape, dtype, value)
            buffers.append(launch.Buffer(data, written=True, item=dtype.size))
        else:
            raise EmulatorError(f"no --input or --output for {parameter.name}")
    counted = launch.run(kernel, buffers, arguments.grid, arguments.threadgroup, count=True)
    assert counted.counts is not None
    return price(kernel, counted.counts)


def _report(cost: Cost, arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "instructions": cost.instructions,
        "cycles": cost.cycles._asdict(),
        "read": cost.read,
        "written": cost.written,
        "requested": cost.requested,
        "loads": cost.loads,
        "registers": cost.registers,
        "threads": cost.threads,
        "loop_bytes": cost.loop_bytes,
    }
    if arguments.weights:
        names = tuple(arguments.weight) or None
        found["per_weight"] = cost.per_weight(arguments.weights, names)._asdict()
    return found


def _print(found: dict[str, Any]) -> None:
    print(f"{'class':38} {'issued':>12} {'main':>12} {'second':>12}")
    for kind, n in sorted(found["instructions"].items(), key=lambda item: -item[1]):
        cycles = TABLE[kind]
        print(f"{kind:38} {n:>12,} {n * cycles.main:>12,.0f} {n * cycles.second:>12,.0f}")
    cycles = found["cycles"]
    print(f"{'all':38} {'':12} {cycles['main']:>12,.0f} {cycles['second']:>12,.0f}")
    for name, n in found["read"].items():
        print(f"{name}: {n:,} bytes read, {found['written'][name]:,} written")
    print(
        f"estimated: {found['registers']} registers of 16 bits, so {found['threads']} threads a "
        f"core; the largest inner loop has {found['loop_bytes']:,} bytes"
    )
    if "per_weight" in found:
        one = found["per_weight"]
        print(
            f"per weight: {one['main']:.3f} main and {one['second']:.3f} second cycles, "
            f"{one['bytes']:.4f} bytes, {one['loads']:.3f} loads"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.emulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--header", type=Path, action="append", default=[])
    parser.add_argument("--kernel", help="NAME or NAME<ARGUMENTS> of a [[kernel]] in the file")
    for name in ("input", "output"):
        parser.add_argument(f"--{name}", type=_declared, action="append", default=[],
                            metavar="NAME=DTYPE[:SHAPE][@VALUE]")  # fmt: skip
    parser.add_argument("--template", type=_template, action="append", default=[])
    parser.add_argument("--grid", type=_sizes, help="threads; default: only lint the file")
    parser.add_argument("--threadgroup", type=_sizes, default=(32, 1, 1))
    parser.add_argument("--weights", type=int, help="divide the cost by this many weights")
    parser.add_argument("--weight", action="append", default=[], help="name of a weight buffer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
        header = "".join(path.read_text(encoding="utf-8") for path in arguments.header)
        cost = (
            _written(arguments, header + text)
            if arguments.kernel
            else _custom(arguments, text, header)
        )
    except (EmulatorError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if cost is None:
        print(f"{arguments.file}: no errors", file=sys.stderr)
        return 0
    found = _report(cost, arguments)
    print(json.dumps(found, indent=2)) if arguments.json else _print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
