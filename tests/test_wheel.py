"""Wheel and sdist: what is in them, and that they work where they are all there is."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import outlier_mlx
from tests.builders import write_overlay
from tests.environments import clean_variables, make_environment, mlx_package, pinned, run
from tests.program import ROOT, run_command


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel; the wheel is built from the sdist, as `build` does it."""
    folder = tmp_path_factory.mktemp("packages")
    run_command(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    (found,) = packages.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(packages: Path) -> Path:
    (found,) = packages.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it needs."""
    requirements = pinned(mlx_package(), "mlx-lm", "numpy", "huggingface_hub")
    return make_environment(tmp_path_factory.mktemp("alone") / "env", str(wheel), *requirements)


@pytest.mark.slow
def test_what_an_index_would_refuse(packages: Path):
    """Metadata, and a description that does not render."""
    files = sorted(packages.iterdir())
    assert len(files) == 2
    run_command(sys.executable, "-m", "twine", "check", "--strict", *files)


@pytest.mark.slow
def test_contents_of_the_sdist(sdist: Path):
    """All that is needed to build, test and document; nothing that was made on the way."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
    root = f"outlier_mlx-{outlier_mlx.__version__}/"
    names = {member.name.removeprefix(root) for member in members}
    assert all(member.name.startswith(root) for member in members)
    listed = run_command("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    ours = {name for name in listed.out.splitlines() if (ROOT / name).is_file()}
    left_out = {name for name in ours if name.startswith((".ci/", ".github/"))}
    assert left_out and names - {"PKG-INFO"} == ours - left_out
    assert {"LICENSE", "README.md", "CHANGELOG.md", "docs/run.md", "tests/test_wheel.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("dist/")]
    assert max(member.size for member in members) < 8e6
    assert sdist.stat().st_size < 20e6


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
def test_installed_alone(alone: Path, tmp_path: Path):
    python, program = alone, alone.with_name("outlier-mlx")
    where = run(python, "-c", "import outlier_mlx; print(outlier_mlx.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(alone.parents[1])
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


@pytest.mark.slow
def test_the_sdist_is_installed(alone: Path, sdist: Path, tmp_path: Path):
    """Where its requirements are; pip builds it in an environment of its own."""
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(alone, *pip, "--no-deps", "--force-reinstall", sdist, cwd=tmp_path)
    run(alone, "-m", "pip", "check", cwd=tmp_path)
    program = alone.with_name("outlier-mlx")
    assert outlier_mlx.__version__ in run(program, "--version", cwd=tmp_path)
    run(program, "demo", "--files", tmp_path, cwd=tmp_path)
    assert "overlay" in run(program, "info", "my-overlay", cwd=tmp_path)


@pytest.mark.slow
def test_uv_installs_the_clone_as_a_tool(tmp_path: Path):
    """As the README has it; and it is removed again without a trace."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    assert uv, "uv is one of the development requirements"
    places = {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin")}
    settings = clean_variables() | places
    tool = [uv, "tool"]
    made = [*tool, "install", "--quiet", "--python", sys.executable, ROOT]
    run_command(*made, cwd=tmp_path, env=settings)
    program = tmp_path / "bin" / "outlier-mlx"
    said = run_command(program, "--version", cwd=tmp_path, env=settings).out
    assert said == f"outlier-mlx {outlier_mlx.__version__}\n"
    run_command(program, "demo", "--files", tmp_path / "files", cwd=tmp_path, env=settings)
    shown = run_command(program, "info", "files/my-overlay", cwd=tmp_path, env=settings).out
    assert "overlay" in shown
    run_command(*tool, "uninstall", "--quiet", "outlier-mlx", cwd=tmp_path, env=settings)
    assert not program.exists()


def test_the_version_stands_in_one_place():
    """In the package; the changes that users read begin with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"] == {"path": "outlier_mlx/__init__.py"}
    assert outlier_mlx.__version__ == "0.2.0"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert headings[0] == outlier_mlx.__version__
    assert headings == sorted(headings, key=lambda text: list(map(int, text.split("."))))[::-1]
    assert not re.search(r"#\d|issue", changes)


def test_what_changed_names_real_commands_and_options():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## 0.1")[0]
    told = command_line()
    options = set(re.findall(r"`(?:[\w-]+ )*(--[\w-]+)", changes))
    assert len(options) > 5 and options <= told, options - told
    for name in re.findall(r"`outlier-mlx ([a-z]+)", changes):
        assert name in told, name


def command_line() -> set[str]:
    """All commands and options."""
    from outlier_mlx.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = set(group.commands)
    for command in group.commands.values():
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found
