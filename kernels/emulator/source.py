"""Gets the full text of a kernel from MLX itself."""

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .errors import EmulatorError

_one_at_a_time = threading.Lock()


@contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Collects everything that the process writes to standard output."""
    flush = ctypes.CDLL(None).fflush
    text: list[str] = []
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield text
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode())


def generate(kernel: Any, inputs: Sequence[mx.array], **call: Any) -> str:
    """The text that MLX would compile with Metal for a call of `kernel`.

    MLX builds a kernel's signature from the dtypes, shapes and template arguments of a call, and
    prints the text if `verbose` is set. Without a GPU, a call cannot run, but it can be traced by
    exporting a function; this also prints the text, after MLX's own checks of the arguments.

    Args:
        kernel: a kernel from the real `mx.fast.metal_kernel`.
        inputs: the arrays of the call.
        call: other arguments: template, grid, threadgroup, output_shapes, output_dtypes.

    Returns:
        The header, the kernel with its signature, and its explicit instantiation if it is a
        template.

    Raises:
        ValueError: MLX rejects the arguments.
    """

    def trace(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), verbose=True, stream=mx.gpu, **call)

    with _one_at_a_time, _captured_output() as output:
        mx.export_function(lambda _: None, trace, *inputs)
    text = "".join(output)
    try:
        return text[text.index("```\n") + 4 : text.rindex("```")]
    except ValueError:
        raise EmulatorError(f"MLX did not print kernel source, but: {text!r}") from None
