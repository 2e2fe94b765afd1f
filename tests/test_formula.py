"""The Homebrew formula: all packages with their checksums, and no address that is not given."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.program import load_script, run_command

formula = load_script("formula")

NAME = "outlier_mlx-0.2.0-py3-none-any.whl"
URL = f"https://example.org/releases/{NAME}"


def item(name: str, url: str, digest: str = "a" * 64) -> dict[str, Any]:
    """An entry of pip's report."""
    about = {"url": url, "archive_info": {"hashes": {"sha256": digest}}}
    return {"metadata": {"name": name, "version": "1"}, "download_info": about}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / NAME
    file.write_bytes(b"a wheel")
    return file


@pytest.fixture
def report(wheel: Path) -> dict[str, Any]:
    return {
        "environment": {"python_version": "3.12"},
        "install": [
            item("outlier-mlx", wheel.as_uri()),
            item("numpy", "https://example.org/numpy-2-cp312-macosx_14_0_arm64.whl", "b" * 64),
            item("mlx", "https://example.org/mlx-1-cp312-macosx_14_0_arm64.whl"),
            item("a_b.c", "https://example.org/a_b_c-1-py3-none-any.whl"),
        ],
    }


def test_the_formula(wheel: Path, report: dict[str, Any]) -> None:
    text = formula.formula(wheel, URL, "https://example.org", report)
    assert f'  url "{URL}", using: :nounzip\n' in text
    assert f'  sha256 "{hashlib.sha256(b"a wheel").hexdigest()}"\n' in text
    assert re.findall(r'resource "(.*)" do', text) == ["a-b-c", "mlx", "numpy"]
    assert f'    sha256 "{"b" * 64}"\n' in text
    assert 'depends_on "python@3.12"' in text and 'opt_bin/"python3.12"' in text
    assert not re.search("@[A-Z]", text)
    for opening in ("class ", "def ", " do\n"):
        assert opening in text
    blocks = len(re.findall(r"^\s*(?:class|def) | do$", text, re.MULTILINE))
    assert len(re.findall(r"^\s*end$", text, re.MULTILINE)) == blocks


def test_what_brew_audit_wants_of_the_description(wheel: Path, report: dict[str, Any]) -> None:
    """At most 80 characters, a capital letter, no article, not the formula's name, no full stop."""
    text = formula.formula(wheel, URL, "https://example.org", report)
    (about,) = re.findall('  desc "(.*)"', text)
    assert len(about) <= 80 and about == about.strip()
    assert re.match("(?!(The|An?) |Outlier[ -]?mlx)[A-Z]", about) and not about.endswith(".")


def test_ruby_reads_the_formula(wheel: Path, report: dict[str, Any], tmp_path: Path) -> None:
    ruby = shutil.which("ruby")
    if ruby is None:
        pytest.skip("there is no Ruby")
    file = tmp_path / "outlier-mlx.rb"
    file.write_text(formula.formula(wheel, URL, "https://example.org", report))
    assert run_command(ruby, "-c", file).out == "Syntax OK\n"


@pytest.mark.parametrize(
    "wrong",
    [
        item("mlx", "https://example.org/mlx-1.tar.gz"),
        item("mlx", "http://example.org/mlx-1.whl"),
        item("mlx", "https://example.org/mlx-1.whl", ""),
        item("mlx", 'https://example.org/"; system "x"; ".whl'),
    ],
)
def test_what_is_no_wheel_is_refused(
    wrong: dict[str, Any], wheel: Path, report: dict[str, Any]
) -> None:
    report["install"][2] = wrong
    with pytest.raises(ValueError, match=r"^mlx: .* is no wheel with a sha256 checksum$"):
        formula.formula(wheel, URL, "https://example.org", report)


def test_another_address_is_refused(wheel: Path, report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ends with {NAME}"):
        formula.formula(wheel, "https://example.org/other.whl", "https://example.org", report)


def test_the_template_has_no_addresses() -> None:
    """They change with each release, and depend on the index that is asked."""
    assert "://" not in formula.TEMPLATE.read_text()


@pytest.mark.slow
def test_what_pip_reports(tmp_path: Path) -> None:
    """A package that needs nothing: this project's own wheel without its dependencies."""
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "outlier-mlx"\nversion = "0.2.0"\ndependencies = ["markdown-it-py"]\n'
        "[tool.hatch.build.targets.wheel]\nbypass-selection = true\n"
    )
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    run_command(*build, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    report = formula.resolve(built)
    names = {entry["metadata"]["name"] for entry in report["install"]}
    assert names == {"outlier-mlx", "markdown-it-py", "mdurl"}
    for entry in report["install"]:  # an index can also be on the disk
        about = entry["download_info"]
        about["url"] = f"https://example.org/{about['url'].rpartition('/')[2]}"
    url = f"https://example.org/{built.name}"
    text = formula.formula(built, url, "https://example.org", report)
    assert len(re.findall('sha256 "[0-9a-f]{64}"', text)) == 3
    assert f'"python@{sys.version_info[0]}.{sys.version_info[1]}"' in text
