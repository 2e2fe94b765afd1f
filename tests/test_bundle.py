"""`outlier_moe.py`: a tier's own model code, which needs nothing but mlx and mlx-lm."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

import outlier_mlx.runtime
from outlier_mlx.writing.bundle import MODULES, bundle
from tests import program
from tests.builders import Built
from tests.engine import forward, load
from tests.environments import make_environment, mlx_package, pinned, run
from tests.library import Library
from tests.program import ROOT, run_command, run_python

RUNTIME = Path(outlier_mlx.runtime.__file__).parent
ALLOWED = {"mlx", "mlx_lm", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def built(library: Library) -> Built:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.9}
    return library.overlay(expert_intermediate=96, yarn=yarn)


@pytest.fixture(scope="module")
def tiers(library: Library, built: Built) -> dict[str, Path]:
    return {
        "f32": library.tier(built),
        "q4": library.tier(built, tier="q4"),
        "affine2": library.tier(built, tier="q8", experts="affine2"),
    }


# The text


@pytest.mark.parametrize("name", MODULES)
def test_the_bundle_is_clean(name: str, tmp_path: Path):
    """By the project's own rules; a tier's code is published with it."""
    file = tmp_path / name
    file.write_text(bundle(name))
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    assert ruff, "ruff is one of the development requirements"
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(file)]
    for command in (["check"], ["format", "--check"]):
        run_command(ruff, *command, *config)


@pytest.mark.parametrize("name", MODULES)
def test_the_bundle_needs_only_mlx_and_mlx_lm(name: str):
    for node in ast.walk(ast.parse(bundle(name))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and (node.module or "").split(".")[0] in ALLOWED
            # Executed without being registered, a module with these annotations has no dataclass.
            assert node.module != "__future__"


def test_top_level_names_are_unique_in_the_runtime():
    """Modules are joined into one namespace: a name in two of them would be the later one's."""
    names: Counter[str] = Counter()
    for file in RUNTIME.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign):
                names.update(t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[node.target.id] += 1
    assert [name for name, count in names.items() if count > 1] == []
    joined = {
        node.name
        for node in ast.parse(bundle()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert {"Model", "ModelArgs", "OutlierMoE", "TernarySwitchLinear"} <= joined


@pytest.mark.parametrize("name", MODULES)
def test_the_bundle_is_the_same_each_time(name: str):
    """`verify` compares a tier's with it, whatever the order of sets in that process."""
    script = f"from outlier_mlx.writing.bundle import bundle; print(bundle({name!r}), end='')"
    texts = {
        run_python(script, cwd=ROOT, env={"PYTHONHASHSEED": seed}).out for seed in ("1", "2", "3")
    }
    assert texts == {bundle(name)}


def test_every_tier_has_it(tiers: dict[str, Path]):
    for tier in tiers.values():
        assert (tier / "outlier_moe.py").read_text() == bundle()


# Running it


def execute(tier: Path, name: str) -> ModuleType:
    """As mlx-lm does: the module is in no `sys.modules` while it runs."""
    spec = importlib.util.spec_from_file_location(name, tier / "outlier_moe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert name not in sys.modules
    return module


def test_the_bundle_runs_unregistered(tiers: dict[str, Path]):
    first, second = (execute(tiers[name], "custom_model") for name in ("f32", "q4"))
    assert first.Model is not second.Model
    assert first.ModelArgs.__module__ == "custom_model"
    with pytest.raises(ValueError, match="ternary format"):
        first.ModelArgs.from_dict({**vars(load(tiers["f32"]).args), "ternary": {"format": "x"}})


def test_tiers_side_by_side_compute_as_the_package_does(built: Built, tiers: dict[str, Path]):
    models = {
        name: mlx_lm_load_model(tier, trust_remote_code=True)[0] for name, tier in tiers.items()
    }
    assert len({type(model) for model in models.values()}) == len(models)
    for name, model in models.items():
        ours = load(tiers[name])
        assert type(model) is not type(ours)
        for length in (1, 7, 40):
            prompt = built.prompt(length)
            np.testing.assert_array_equal(forward(model, prompt), forward(ours, prompt))


# Elsewhere


@pytest.fixture(scope="module")
def other_bases(library: Library) -> list[Path]:
    """A tier on a base of each family but Qwen2."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return [
        library.tier(library.overlay(family="qwen3", head_dim=24, seed=2)),
        library.tier(library.overlay(family="llama", scaling=llama3)),
        library.tier(library.overlay(family="mistral", head_dim=20)),
    ]


@pytest.mark.slow
def test_mlx_lm_alone_generates_the_same_text(
    library: Library, tiers: dict[str, Path], other_bases: list[Path], tmp_path: Path
):
    """In an environment with nothing but mlx and mlx-lm in it."""
    python = make_environment(tmp_path / "env", *pinned(mlx_package(), "mlx-lm"))
    missing = "import importlib.util as i; print(i.find_spec('outlier_mlx'))"
    assert run(python, "-c", missing, cwd=tmp_path).strip() == "None"
    here = [*tiers.values(), *other_bases]
    prompts = [(tier, "The heron stands in the water") for tier in here]
    prompts.append((library.demo_tier("q4"), "The old boat"))
    for tier, prompt in prompts:
        flags = ["--model", tier, "--prompt", prompt, "--max-tokens", 40, "--temp", 0]
        theirs = [python, "-m", "mlx_lm", "generate", "--trust-remote-code", "--verbose", "False"]
        text = run(*theirs, *flags, cwd=tmp_path)
        ours = program.run("generate", *flags, "--quiet").out
        ours = ours.replace("\r\n", "\n").replace("\r", "\n")  # as the text of a process is read
        # mlx-lm's detokenizer drops the blank that a text begins with.
        assert text == ours.removeprefix(" ") and len(text) > 20
    refused = run_command(*theirs[:4], *flags, code=None)
    assert refused.code != 0  # without the flag, nothing of the tier runs
