"""Find the kernels' source text: beside the package in a checkout, inside it when installed."""

from pathlib import Path


def kernel_names() -> list[str]:
    """The names of all kernel files, `kernels/NAME.metal`."""
    return sorted(file.stem for file in _folder().glob("*.metal") if file.stem[0] != ".")


def kernel_text(name: str) -> str:
    """The text of `kernels/NAME.metal`. (A tier's `outlier_moe.py` contains the text itself.)"""
    return (_folder() / f"{name}.metal").read_text(encoding="utf-8")


def _folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    return next(p / "kernels" for p in (package, package.parent) if (p / "kernels").is_dir())
