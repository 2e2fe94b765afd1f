"""Packing of trits (-1, 0, 1) into bytes with NumPy, in every order that files use.

`flat` is what overlays hold, `rows` what tiers hold, `ggml` what GGUF files hold. Scales are kept
apart everywhere but in `ggml`. Packing validates on the way. Every function is safe to call from
several threads; each thread keeps one or two megabytes of buffers, whatever the tensor's size.
"""

from outlier_mlx.ternary.arrays import TernaryError
from outlier_mlx.ternary.flat import pack_tq1_0, unpack_tq1_0
from outlier_mlx.ternary.rows import (
    check_rows,
    flat_to_rows,
    pack_rows,
    row_bytes,
    rows_to_flat,
    unpack_rows,
)

__all__ = [
    "TernaryError",
    "check_rows",
    "flat_to_rows",
    "pack_rows",
    "pack_tq1_0",
    "row_bytes",
    "rows_to_flat",
    "unpack_rows",
    "unpack_tq1_0",
]
