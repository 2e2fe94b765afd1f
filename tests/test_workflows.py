"""The workflows of GitHub, and the figures that one of them keeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metal import on_real_metal
from tests.program import ROOT, run_command

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    """The steps of all jobs."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_workflow(workflow: Path) -> None:
    """It is one by GitHub's schema, may only read, and what it runs exists."""
    check = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
    ]
    run_command(*check, workflow)
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        run = step.get("run", "")
        subprocess.run(["bash", "-n"], input=run, text=True, check=True)
        for file in re.findall(r"(?:\./|\b)((?:scripts|tests)/[\w.-]+)", run):
            assert (ROOT / file).exists(), file


def test_what_the_mac_workflow_does() -> None:
    """Tests, kernels on a GPU that computes correctly, and figures that are kept."""
    (workflow,) = [file for file in WORKFLOWS if file.name == "mac.yml"]
    done = steps(workflow)
    kernels = next(step for step in done if "test_kernels.py" in step.get("run", ""))
    assert kernels["if"] == "steps.gpu.outputs.usable == 'true'"
    assert kernels["env"] == {"OUTLIER_MLX_METAL": "real"}
    assert any('pytest -n auto --dist loadfile -m "not slow"' in s.get("run", "") for s in done)
    figures = next(step for step in done if "scripts/figures.py" in step.get("run", ""))
    keep = next(step for step in done if step.get("uses", "").startswith("actions/upload-artifact"))
    folder = keep["with"]["path"].rstrip("/")
    assert f"--out {folder}" in figures["run"] and keep["with"]["if-no-files-found"] == "error"
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert all(job["runs-on"] == "${{ matrix.os }}" for job in jobs.values())
    assert all(name.startswith("macos-") for name in jobs["mac"]["strategy"]["matrix"]["os"])


def test_the_site_and_the_packages_are_built_and_checked() -> None:
    """Their own tests are slow, so the job of fast tests leaves them out."""
    (workflow,) = [file for file in WORKFLOWS if file.name == "tests.yml"]
    done = steps(workflow)
    commands = "\n".join(step.get("run", "") for step in done)
    for command in ("mkdocs build --strict", "tests/test_wheel.py", "twine check --strict dist/*"):
        assert command in commands
    (keep,) = [s for s in done if s.get("uses", "").startswith("actions/upload-artifact")]
    assert keep["with"]["path"].split() == ["site/", "dist/"]


@pytest.mark.slow
def test_figures(small_tier: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "figures.py"
    options = ["--num-trials", "1", "--prompt-tokens", "32", "--generation-tokens", "8"]
    run_command(sys.executable, script, small_tier, "--out", tmp_path / "f", *options)
    found = json.loads((tmp_path / "f" / "machine.json").read_text())
    assert {"chip", "macos", "commit", "gpu", "system", "versions"} <= set(found)
    assert {"mlx", "mlx-lm", "outlier-mlx"} <= set(found["versions"])
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert found["gpu"]["usable"] or not on_real_metal()
    bench = json.loads((tmp_path / "f" / "bench.json").read_text())
    assert bench["versions"] == found["versions"]
    assert (tmp_path / "f" / "kernels.json").exists() == found["gpu"]["usable"]
    assert json.loads((tmp_path / "f" / "doctor.json").read_text())["machine"]
