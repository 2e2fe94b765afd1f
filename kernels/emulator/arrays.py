"""Convert MLX arrays to bytes, and bytes to MLX arrays."""

import ctypes
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

_NUMPY = {
    mx.bool_: np.uint8,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,
    mx.complex64: np.complex64,
}


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


_STRIDED = 0x18 | 0x4  # PyBUF_STRIDES | PyBUF_FORMAT


def memory(array: mx.array) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """Copy the memory that an array spans, without making it contiguous.

    A NumPy view is not enough: NumPy has no bfloat16.

    Returns:
        The bytes from the array's lowest to its highest address, uint8; the offset of its first
        element in these bytes; and its strides in elements.
    """
    mx.eval(array)
    view = _PyBuffer()
    get = ctypes.pythonapi.PyObject_GetBuffer
    get.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
    get(array, ctypes.byref(view), _STRIDED)
    try:
        shape = [view.shape[i] for i in range(view.ndim)]
        strides = [view.strides[i] for i in range(view.ndim)]
        spans = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
        low, high = sum(min(0, s) for s in spans), sum(max(0, s) for s in spans)
        size = high - low + view.itemsize if array.size else 0
        data = np.empty(size, np.uint8)
        if size:
            ctypes.memmove(data.ctypes.data, view.buf + low, size)
        return data, -low, tuple(s // view.itemsize for s in strides)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def as_array(data: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Make an MLX array of `shape` and `dtype` from bytes (uint8)."""
    typed = data.view(_NUMPY[dtype]).reshape(tuple(shape))
    if dtype == mx.bool_:
        return mx.array(typed != 0)
    made = mx.array(typed)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


def filled(shape: Sequence[int], dtype: mx.Dtype, value: Any) -> np.ndarray:
    """The bytes of an output before a launch: `value` everywhere, or NaN when it is None.

    All bits set is NaN in every floating type, and easy to recognise in the others.
    """
    size = int(np.prod(tuple(shape), dtype=np.int64)) * dtype.size
    if value is None:
        return np.full(size, 0xFF, np.uint8)
    return memory(mx.contiguous(mx.full(tuple(shape), value).astype(dtype)))[0]
