"""The largest numbers of dtypes. Imports nothing, so that the help of commands stays fast."""

# From these numbers on, rounding to nearest gives infinity: half a step above the largest number.
_BOUNDS = {
    "float32": 2.0**128 * (1 - 2.0**-25),
    "float16": 65520.0,
    "bfloat16": 2.0**128 * (1 - 2.0**-9),
}


def fits(value: float, dtype: str) -> bool:
    """Whether a number is finite and stays so in a dtype."""
    return abs(value) < _BOUNDS[dtype]
