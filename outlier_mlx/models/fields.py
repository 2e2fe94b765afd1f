"""Reading the fields of a config. Invalid values are errors, or count as missing."""

from collections.abc import Mapping
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.storage.bounds import fits

# Far above any model's. Names are listed for every layer and expert, so those have a bound of
# their own.
MAX_SIZE = 2**31 - 1
MAX_COUNT = 10_000
# The smallest positive float32.
_SMALLEST = 2.0**-149


class Fields:
    """The fields of a config.

    Args:
        raw: the config.
        where: name of the config in messages.
        strict: whether a missing or invalid field is an error; otherwise its value is None.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, *, strict: bool) -> None:
        self.raw, self.where, self.strict = raw, where, strict

    def refuse(self, message: str) -> None:
        """Raise a CheckpointError that names the config; if not strict, do nothing."""
        if self.strict:
            raise CheckpointError(f"{self.where}: {message}")

    def size(
        self,
        *names: str,
        default: int | None = None,
        least: int = 1,
        most: int = MAX_SIZE,
        required: bool = True,
    ) -> Any:
        """A whole number from `least` to `most`, or None.

        Args:
            names: names of one field; if several are present, their values must be equal.
            default: the value if all are missing.
            least: the smallest value.
            most: the largest.
            required: whether it is an error if there is neither a value nor a default.

        Raises:
            CheckpointError: strict, and the field is missing or invalid, or its values differ.
        """
        given = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        for name, value in given.items():
            if type(value) is not int or not least <= value <= most:
                self.refuse(
                    f"{name} is {short(value)}, expected a whole number from {least} to {most}"
                )
                return None
        if len(set(given.values())) > 1:
            self.refuse(f"{listed(f'{n} = {v}' for n, v in given.items())} disagree")
            return None
        if not given and default is None and required:
            self.refuse(f"{listed(names, last='or')} is missing")
        return next(iter(given.values()), default)

    def positive(self, name: str, default: float | None = None) -> Any:
        """A positive number that float32 has room for, or None; errors are those of `size`.

        Models compute with these numbers in float32, where 1e39 is infinity and 1e-50 is 0.
        """
        value = self.raw.get(name)
        value = default if value is None else value
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
        if number >= _SMALLEST and fits(number, "float32"):
            return float(number)
        expected = "a positive number" if number <= 0 else "a number that float32 has room for"
        said = "missing" if value is None else f"{short(value)}, expected {expected}"
        self.refuse(f"{name} is {said}")
        return None

    def flag(self, name: str, default: bool | None = False) -> Any:
        """True or false, or None; errors are those of `size`."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None or isinstance(value, bool):
            return value
        self.refuse(f"{name} is {short(value)}, expected true or false")
        return None


def short(value: object) -> str:
    """`repr` of a value, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
