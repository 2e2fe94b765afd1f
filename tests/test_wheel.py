"""The wheel: what is in it, and that it works where it is all there is."""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import outlier_mlx
from tests.builders import write_overlay
from tests.environments import make_environment, mlx_package, pinned, run
from tests.program import ROOT, run_command


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    run_command(*build, cwd=ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_contents(wheel: Path):
    assert wheel.name == f"outlier_mlx-{outlier_mlx.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"outlier_mlx-{outlier_mlx.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        points = archive.read(f"{info}/entry_points.txt").decode()
    code = {name for name in names if not name.startswith(f"{info}/")}
    assert {name.split("/")[0] for name in code} == {"outlier_mlx"}
    package = ROOT / "outlier_mlx"
    for file in package.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert f"outlier_mlx/{file.relative_to(package).as_posix()}" in names
    kernels = {f"outlier_mlx/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.metal")}
    assert {name for name in names if name.startswith("outlier_mlx/kernels/")} == kernels
    assert "outlier_mlx/py.typed" in names and f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "emulator" in name or "test" in name.lower()]
    assert "outlier-mlx = outlier_mlx.cli:main" in points
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel.stat().st_size < 16e6


@pytest.mark.slow
def test_installed_alone(wheel: Path, tmp_path: Path):
    requirements = pinned(mlx_package(), "mlx-lm", "numpy", "huggingface_hub")
    python = make_environment(tmp_path / "env", str(wheel), *requirements)
    program = python.with_name("outlier-mlx")
    where = run(python, "-c", "import outlier_mlx; print(outlier_mlx.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    said = run(program, "--version", cwd=tmp_path)
    assert said.strip() == f"outlier-mlx {outlier_mlx.__version__}"
    write_overlay(tmp_path / "overlay", form="real", shards=2)
    run(program, "convert", "overlay", "--out", "tier", "--quiet", cwd=tmp_path)
    flags = ["--prompt", "The heron", "--max-tokens", 20, "--quiet"]
    text = run(program, "generate", "--model", "tier", *flags, cwd=tmp_path)
    here = [sys.executable, "-m", "outlier_mlx", "generate", "--model", tmp_path / "tier"]
    assert text == run(*here, *flags, cwd=ROOT) and text.strip()
    trusted = ["--trust-remote-code", "--verbose", "False", "--model", "tier", *flags[:-1]]
    assert run(python, "-m", "mlx_lm", "generate", *trusted, cwd=tmp_path) == text.removeprefix(" ")
