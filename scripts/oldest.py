"""Print the oldest versions that pyproject.toml allows, as requirements for pip: one on each line.

They are the lower bounds of the dependencies on this platform, without the extras.
"""

import re
import sys
import tomllib
from pathlib import Path

_LINE = re.compile(
    r"(?P<name>[\w-]+(\[\w+\])?)>=(?P<oldest>[\w.]+)(,<[\w.]+)?"
    r"(; sys_platform == '(?P<platform>\w+)')?"
)


def oldest(dependencies: list[str], platform: str) -> list[str]:
    """The lower bounds of requirements.

    Args:
        dependencies: as in pyproject.toml: "name>=1.2,<2; sys_platform == 'linux'".
        platform: whose requirements are wanted, as in `sys.platform`.

    Raises:
        ValueError: a requirement has another form, so that its oldest version is not known.
    """
    found = []
    for line in dependencies:
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ValueError(f"{line!r} has no lower bound that is understood")
        if parts["platform"] in (None, platform):
            found.append(f"{parts['name']}=={parts['oldest']}")
    return found


def main() -> None:
    """Print them for this machine."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print("\n".join(oldest(project["dependencies"], sys.platform)))


if __name__ == "__main__":
    main()
