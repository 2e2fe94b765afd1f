"""Check whether this machine has a GPU that computes correctly.

If so, print its name and end with exit code 0; else print the reason and end with 1. The Metal
device of a virtual machine may compute nothing, or may end the process. So another process makes
the launches, and their results are checked.
"""

import subprocess
import sys
from typing import Any

import mlx.core as mx

SECONDS = 180

SOURCE = """
    const uint i = thread_position_in_grid.x;
    const half2 trits = as_type<half2>(~words[i] & 0xC000C000u);
    y[i] = fma(2.0f, x[i], simd_sum(x[i])) + float(trits.x) + 2.5f * float(trits.y);
"""


def wrong_result() -> str | None:
    """Run a custom kernel and one of MLX's own; returns an error message, or None if both work.

    The custom kernel adds over a simdgroup, and makes halves from two bits as ours do.
    """
    kernel: Any = mx.fast.metal_kernel(
        name="probe", input_names=["x", "words"], output_names=["y"], source=SOURCE
    )
    x = mx.arange(64, dtype=mx.float32)
    words = mx.full((64,), 0x92341234, mx.uint32)  # digits 0 and 2: -2, and 2
    call = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    y = kernel(inputs=[x, words], output_shapes=[(64,)], output_dtypes=[mx.float32], **call)[0]
    sums = [sum(range(32)), sum(range(32, 64))]
    if y.tolist() != [2 * i + sums[i // 32] + 3 for i in range(64)]:
        return f"a custom kernel computed {y[:3].tolist()} and so on"
    product = mx.ones((64, 64), mx.float16) @ mx.full((64, 1), 0.5, mx.float16)
    if product.tolist() != [[32.0]] * 64:
        return f"MLX's own product was {product[:3].tolist()} and so on"
    return None


def probe() -> tuple[bool, str]:
    """Whether there is a usable GPU; and its name, or the reason why not."""
    if not mx.metal.is_available():
        return False, "MLX finds no Metal device"
    name = str(mx.device_info(mx.gpu).get("device_name", "an unnamed GPU"))
    command = [sys.executable, __file__, "--launch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"{name}: a launch did not end within {SECONDS} s"
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return False, f"{name}: {last[0] if last else f'ended with {done.returncode}'}"
    return True, name


def main() -> None:
    """Print the result; the exit code is 0 if there is a usable GPU."""
    if "--launch" in sys.argv:
        sys.exit(wrong_result())
    usable, about = probe()
    print(about)
    sys.exit(not usable)


if __name__ == "__main__":
    main()
