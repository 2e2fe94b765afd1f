"""Versions of mlx and mlx-lm, against those that this package allows."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

PACKAGE, NAMES = "outlier-mlx", ("mlx", "mlx-lm")


@dataclass(frozen=True)
class Version:
    """A package that is installed.

    Attributes:
        name: its name.
        installed: its version; None: it is not installed.
        tested: the oldest version that this package was tested with; None: not known.
        below: the first version that it does not allow; None: not known.
    """

    name: str
    installed: str | None
    tested: str | None = None
    below: str | None = None

    @property
    def wanted(self) -> str:
        """The versions that are allowed, as pip takes them."""
        low, high = (self.tested and f">={self.tested}", self.below and f"<{self.below}")
        return self.name + ",".join(filter(None, (low, high)))

    @property
    def is_new(self) -> bool:
        """Whether it is newer than what this package allows."""
        known = self.installed is not None and self.below is not None
        return known and _numbers(str(self.installed)) >= _numbers(str(self.below))

    @property
    def is_old(self) -> bool:
        """Whether it is older than what was tested."""
        known = self.installed is not None and self.tested is not None
        return known and _numbers(str(self.installed)) < _numbers(str(self.tested))


def installed_versions() -> list[Version]:
    """The versions of mlx and mlx-lm, with the bounds in this package's metadata."""
    try:
        needed = requires(PACKAGE) or []
    except PackageNotFoundError:  # run from a folder, without an installation
        needed = []
    bounds: dict[str, list[str | None]] = {}
    for line in needed:
        if found := re.match(r"([\w.-]+?)(?:\[[\w,-]+\])?\s*([<>=][^;]*)", line):
            ends = (re.search(rf"{sign}\s*([\w.]+)", found[2]) for sign in (">=", "<"))
            bounds[found[1].lower()] = [end and end[1] for end in ends]
    return [Version(name, _installed(name), *bounds.get(name, ())) for name in NAMES]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: "0.32.4.dev1" as (0, 32, 4)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
