"""Find the kernels' source text: beside the package in a checkout, inside it when installed."""

from pathlib import Path


def kernel_text(name: str) -> str:
    """The text of `kernels/NAME.metal`. (A tier's `outlier_moe.py` contains the text itself.)"""
    package = Path(__file__).resolve().parents[1]
    folder = next(p / "kernels" for p in (package, package.parent) if (p / "kernels").is_dir())
    return (folder / f"{name}.metal").read_text(encoding="utf-8")
