"""Write a Homebrew formula for a released wheel, with all that it needs as resources.

    python scripts/formula.py dist/outlier_mlx-0.2.0-py3-none-any.whl --url URL --homepage URL

To be run with the Python, and on a Mac, for which the formula is: pip decides which wheels these
need, and its report gives their addresses and checksums. `packaging/outlier-mlx.rb.in` is the
template.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "packaging" / "outlier-mlx.rb.in"


def resolve(wheel: Path) -> dict[str, Any]:
    """Pip's report on installing a wheel where nothing is installed; nothing is."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command = [*pip, "--only-binary", ":all:", "--report", "-", str(wheel)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def resource(item: dict[str, Any]) -> str:
    """A resource of the formula.

    Args:
        item: an entry of `install` in pip's report.

    Raises:
        ValueError: the package has no wheel with a checksum.
    """
    info = item["download_info"]
    url, digest = info["url"], info.get("archive_info", {}).get("hashes", {}).get("sha256", "")
    if not re.fullmatch(r"https://[^\s\"#]+\.whl", url) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{item['metadata']['name']}: {url} is no wheel with a sha256 checksum")
    # `brew audit` wants the name in the address, with hyphens.
    name = re.sub("[_.]", "-", url.rpartition("/")[2].partition("-")[0])
    return f'  resource "{name}" do\n    url "{url}", using: :nounzip\n    sha256 "{digest}"\n  end'


def formula(wheel: Path, url: str, homepage: str, report: dict[str, Any]) -> str:
    """The text of the formula.

    Args:
        wheel: the released wheel.
        url: where it can be downloaded.
        homepage: the project's page.
        report: pip's report on installing it.

    Raises:
        ValueError: a package has no wheel with a checksum, or the address is not the wheel's.
    """
    if not url.startswith("https://") or url.rpartition("/")[2] != wheel.name:
        raise ValueError(f"{url} is not an https address that ends with {wheel.name}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    items = sorted(report["install"], key=lambda item: str(item["metadata"]["name"]).lower())
    own = [item for item in items if item["metadata"]["name"] == project["name"]]
    if len(own) != 1:
        raise ValueError(f"pip's report is not about {project['name']}")
    values = {
        "DESCRIPTION": project["description"],
        "HOMEPAGE": homepage,
        "URL": url,
        "SHA256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "PYTHON": report["environment"]["python_version"],
        "RESOURCES": "\n\n".join(resource(item) for item in items if item not in own).lstrip(),
    }
    return re.sub("@([A-Z0-9]+)@", lambda m: values[m[1]], TEMPLATE.read_text(encoding="utf-8"))


def main() -> None:
    """Print the formula."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--url", required=True, help="Where the wheel can be downloaded.")
    parser.add_argument("--homepage", required=True)
    args = parser.parse_args()
    try:
        print(formula(args.wheel, args.url, args.homepage, resolve(args.wheel)), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
