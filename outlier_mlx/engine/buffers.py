"""MLX's settings for command buffers: how much work the GPU gets at a time. Imports no MLX.

MLX reads two environment variables when it first uses the GPU (`mlx/utils.h`): after so many
operations, or so many 2^20 elements of different input arrays, it sends what it has collected. Its
own values are 40 or 50, by the size of the chip.
"""

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from outlier_mlx.errors import OutlierError

MAX_OPS = "MLX_MAX_OPS_PER_BUFFER"
MAX_MB = "MLX_MAX_MB_PER_BUFFER"
VARIABLES = (MAX_OPS, MAX_MB)
#: The value that both get.
LARGER = 1000
# Others measured gains on M1 and M3, and none on M5: docs/run.md has the sources.
_GAINING = re.compile(r"Apple M[1-4]\b")


def use_larger_buffers() -> dict[str, str]:
    """Let MLX send more work to the GPU at a time. Call it before anything imports MLX.

    It sets the environment variables MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER to 1000 if
    the chip is an M1, M2, M3 or M4 (also Pro, Max and Ultra). A variable that is set already keeps
    its value. On other chips, and on other systems than macOS, it changes nothing. The commands of
    `outlier-mlx` call it.

    Returns:
        The variables that it set.

    Raises:
        OutlierError: MLX is imported already, and may have read the variables.
    """
    if mlx_is_imported():
        raise OutlierError(
            "use_larger_buffers: MLX is imported already, and reads its settings only once: call"
            " this before importing mlx, mlx_lm, or anything else that imports them"
        )
    chosen = larger_buffers(read_chip(), os.environ)
    os.environ.update(chosen)
    return chosen


def mlx_is_imported() -> bool:
    """Whether this process has imported MLX, so that settings may come too late."""
    return "mlx.core" in sys.modules


def larger_buffers(chip: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are to be set on a chip, beside those that are set.

    Args:
        chip: its name in macOS, such as "Apple M1 Max"; empty if it is not known.
        environment: environment variables.
    """
    if not _GAINING.match(chip):
        return {}
    return {name: str(LARGER) for name in VARIABLES if name not in environment}


def own_value(chip: str) -> int:
    """MLX's own value of both variables on a chip, by its name in macOS or MLX."""
    return 50 if chip.endswith((" Max", " Ultra")) else 40


def read_chip() -> str:
    """The chip's name in macOS, such as "Apple M1 Max"; empty on other systems."""
    if sys.platform != "darwin":
        return ""
    from ctypes import CDLL

    return sysctl_text(b"machdep.cpu.brand_string", CDLL(None))


def sysctl_text(name: bytes, library: Any) -> str:
    """A text that the system knows by this name; empty if there is none.

    Args:
        name: the name, as `sysctl` takes it.
        library: the C library, with `sysctlbyname`.
    """
    import ctypes

    size = ctypes.c_size_t(0)
    call = library.sysctlbyname
    if call(name, None, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return ""
    text = ctypes.create_string_buffer(size.value + 1)
    if call(name, text, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return ""
    return text.value.decode("utf-8", "replace")


def sysctl_int(name: bytes, library: Any) -> int | None:
    """A number of 32 bits that the system knows by this name; None if there is none.

    Args:
        name: the name, as `sysctl` takes it.
        library: the C library, with `sysctlbyname`.
    """
    import ctypes

    value, nbytes = ctypes.c_int32(0), ctypes.c_size_t(4)
    if library.sysctlbyname(
        name, ctypes.byref(value), ctypes.byref(nbytes), None, ctypes.c_size_t(0)
    ):
        return None
    return value.value
