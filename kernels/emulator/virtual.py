"""`virtual_metal`: runs MLX's custom kernels on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from . import launch, source
from .arrays import as_array, filled, memory
from .cost import Cost, price
from .errors import EmulatorError
from .kernel import CompiledKernel, compile_kernel


@dataclass
class Launch:
    """A recorded launch of a kernel.

    Attributes:
        name: the kernel's name in `mx.fast.metal_kernel`.
        grid: threads in x, y and z.
        threadgroup: threads of a threadgroup in x, y and z.
        template: the template arguments of the call.
        inputs: shape and dtype of each input.
        outputs: shape and dtype of each output.
        kernel: the compiled kernel: its text, signature and IR.
    """

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: dict[str, Any]
    inputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    kernel: CompiledKernel = field(repr=False)
    counts: launch.Counts | None = field(repr=False)

    @cached_property
    def cost(self) -> Cost:
        """Bytes by buffer, instructions by class, cycles by pipe; computed at first use.

        Raises:
            EmulatorError: the launch was made with `virtual_metal(count=False)`.
        """
        if self.counts is None:
            raise EmulatorError(f"{self.name} was not counted: use virtual_metal(count=True)")
        return price(self.kernel, self.counts)


class VirtualKernel:
    """Takes the place of MLX's kernel object, with the same arguments."""

    def __init__(self, owner: "VirtualMetal", arguments: dict[str, Any]) -> None:
        self.owner = owner
        self.arguments = arguments
        self.real = owner.real_metal_kernel(**arguments)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Runs the kernel immediately; the arguments are those of MLX's kernels.

        Raises:
            EmulatorError: the kernel or the launch is wrong; the subclass says in what way.
            ValueError: MLX rejects the arguments.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        if self.arguments.get("ensure_row_contiguous", True):
            arrays = [mx.contiguous(x) for x in arrays]
        sizes = launch.check_sizes(self.arguments["name"], grid, threadgroup)
        call = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
            **({"template": template} if template else {}),
        }
        text = source.generate(self.real, arrays, **call)
        if verbose:
            print(f"Generated source code for `{self.arguments['name']}`:\n```\n{text}```")
        kernel = compile_kernel(text)
        names = [*self.arguments["input_names"], *self.arguments["output_names"]]
        outputs = list(zip(output_shapes, output_dtypes, strict=True))
        buffers = self._buffers(kernel, arrays, outputs, init_value)
        outcome = launch.run(kernel, buffers, grid, threadgroup, self.owner.count)
        self.owner.launches.append(
            Launch(
                name=self.arguments["name"],
                grid=sizes[0],
                threadgroup=sizes[1],
                template=dict(template or ()),
                inputs={n: (x.shape, x.dtype) for n, x in zip(names, arrays, strict=False)},
                outputs={
                    n: (tuple(s), d)
                    for n, (s, d) in zip(self.arguments["output_names"], outputs, strict=True)
                },
                kernel=kernel,
                counts=outcome.counts,
            )
        )
        bound = {p.name: i for i, p in enumerate(kernel.signature.buffers)}
        return [
            as_array(outcome.outputs[bound[name]], shape, dtype)
            for name, (shape, dtype) in zip(self.arguments["output_names"], outputs, strict=True)
        ]

    def _buffers(
        self,
        kernel: CompiledKernel,
        arrays: Sequence[mx.array],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        init_value: float | None,
    ) -> list[launch.Buffer]:
        """The buffers in the order of the kernel's signature."""
        known: dict[str, launch.Buffer] = {}
        for name, array in zip(self.arguments["input_names"], arrays, strict=True):
            data, offset, strides = memory(array)
            before = self.owner.base_offsets.get(name, 0) - offset
            known[name] = launch.Buffer(data, item=array.dtype.size, before=before)
            for suffix, given in (
                ("shape", np.array(array.shape, np.int32)),
                ("strides", np.array(strides, np.int64)),
                ("ndim", np.array([array.ndim], np.int32)),
            ):
                known[f"{name}_{suffix}"] = launch.Buffer(given.view(np.uint8), item=given.itemsize)
        for name, (shape, dtype) in zip(self.arguments["output_names"], outputs, strict=True):
            known[name] = launch.Buffer(
                filled(shape, dtype, init_value), written=True, item=dtype.size
            )
        return [known[p.name] for p in kernel.signature.buffers]


class VirtualMetal:
    """An emulated Metal device.

    Attributes:
        launches: every launch since the last `clear`, in order.
        count: whether launches are counted; counting makes them slower.
        base_offsets: by input name: the kernel gets an address that is this many bytes before the
            array's data. So indices beyond 2**32 bytes can be tested with a small array.
    """

    def __init__(self, count: bool = True) -> None:
        self.launches: list[Launch] = []
        self.count = count
        self.base_offsets: Mapping[str, int] = {}
        self.real_metal_kernel = mx.fast.metal_kernel
        self.real_is_available = mx.metal.is_available

    @property
    def names(self) -> list[str]:
        """The names of the kernels launched, in order."""
        return [one.name for one in self.launches]

    def clear(self) -> None:
        """Forgets the launches so far."""
        self.launches.clear()

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: Any = None,
    ) -> VirtualKernel:
        """Takes the place of `mx.fast.metal_kernel`, with the same arguments."""
        arguments: dict[str, Any] = {
            "name": name,
            "input_names": list(input_names),
            "output_names": list(output_names),
            "source": source,
            "header": header,
            "ensure_row_contiguous": ensure_row_contiguous,
            "atomic_outputs": atomic_outputs,
        }
        if compile_options is not None:
            arguments["compile_options"] = compile_options
        return VirtualKernel(self, arguments)


@contextmanager
def virtual_metal(count: bool = True) -> Iterator[VirtualMetal]:
    """Runs MLX's custom kernels on the CPU: Metal seems available, and each launch is emulated.

    A launch is evaluated immediately, so it cannot be inside `mx.compile`, `mx.vmap` or a gradient.

    Args:
        count: whether to count the cost of each launch.

    Example:
        with virtual_metal() as metal:
            y = mx.fast.metal_kernel(...)(inputs=[x], ...)
        print(metal.launches[0].cost)
    """
    metal = VirtualMetal(count)
    mx.fast.metal_kernel = metal.metal_kernel
    mx.metal.is_available = lambda: True
    try:
        yield metal
    finally:
        mx.fast.metal_kernel = metal.real_metal_kernel
        mx.metal.is_available = metal.real_is_available
