"""Tiers as checkpoints of stock transformers: the numbers, and the logits that it computes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.models.config import parse_config
from outlier_mlx.models.tier_fields import tier_fields
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from tests import builders
from tests.engine import forward, load, tier_of
from tests.goldens import golden
from tests.library import Library
from tests.program import ROOT
from tests.test_bases import LLAMA3, YARN
from tests.test_model import ODD

WEIGHTS = "model-00001-of-00001.safetensors"
GOLDENS = [
    *("export_per_file", "packed_experts_dir", "packed_monolith", "v0_toy_dense"),
    *("v0_toy_gqa_bias", "v0_toy_moe", "v1_real_sharded", "v2_real_perchannel"),
    *("v32_alpha_json_partial", "v32_alpha_tensors", "v33_overlay_yarn"),
]
# Other shapes, and the class that computes each.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2_moe", {"tied": True, "moe_layers": None, "kv_heads": 4}),
    "odd": ("qwen2_moe", ODD | {"experts": 5, "top_k": 1, "scale_form": "per_row"}),
    "yarn": ("qwen2_moe", {"yarn": YARN | {"attention_factor": 0.8}}),
    "yarn, no factor": ("qwen2_moe", {"yarn": YARN}),
    "llama": ("qwen2_moe", {"family": "llama", "scaling": LLAMA3}),
    "linear": ("qwen2_moe", {"family": "llama", "scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("qwen2_moe", {"family": "mistral", "rope_theta": 1e4}),
    "qwen3": ("qwen3_moe", {"family": "qwen3", "head_dim": 24, "tied": True, "yarn": YARN}),
    "qwen3, no experts": ("qwen3", {"family": "qwen3", "head_dim": 24, "moe_layers": ()}),
    "qwen2, no experts": ("qwen2", {"moe_layers": (), "yarn": YARN}),
    "llama, no experts": ("llama", {"family": "llama", "biases": True, "moe_layers": ()}),
    "mistral, no experts": ("mistral", {"family": "mistral", "head_dim": 8, "moe_layers": ()}),
    "mistral, biases": ("llama", {"family": "mistral", "biases": True, "moe_layers": ()}),
}
# How the embedded tier is stored: MLX's 4, 6 and 8 bits, halves, and experts as 2-bit codes.
RECIPES = ["q4", "q4-mixed", "q8", "bf16"]
# Other Pythons whose transformers is to be tried, such as one with version 4.57.
OTHERS = os.environ.get("OUTLIER_TRANSFORMERS_PYTHON", "").split()


def exported(tier: Path, out: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no tokenizer", CheckpointWarning)
        return export_tier(tier, out, "transformers", **how).path


def shape_tier(name: str, path: Path, **recipe: Any) -> Path:
    options = SHAPES[name][1]
    if options.get("moe_layers") == ():
        return tier_without_experts(path, **options)
    built = builders.write_overlay(path / "overlay", tokenizer=False, **options)
    return tier_of(built.path, None, path / "tier", **recipe)


def tier_without_experts(path: Path, **dims: Any) -> Path:
    """A base with the config of a tier, whose `convert` makes such tiers on Qwen2 only."""
    built = builders.write_base(path, base_dtype="F32", tokenizer=False, **dims)
    stored: dict[str, Any] = {
        "dtype": "float32",
        "ternary": {"format": ROWS, "version": EXPERT_FORMAT_VERSION},
    }
    stored["num_experts_per_tok"] = 2
    fields = built.config | tier_fields(parse_config(built.config), 0) | stored
    (built.path / "config.json").write_text(json.dumps(fields))
    return built.path


# What stock transformers computes


def _tiers(library: Library, root: Path) -> dict[str, tuple[Path, list[int]]]:
    """Every case: its tier, and the tokens of a prompt."""
    prompt = builders.Built(root, builders.Dims(), {}, {}).prompt(40)
    found = {name: (shape_tier(name, root / name), prompt) for name in SHAPES}
    found |= {name: (library.demo_tier(name), [*range(40, 100), 1500]) for name in RECIPES}
    wide = library.overlay(expert_intermediate=96).path
    affine = tier_of(wide, None, root / "affine2", experts="affine2", tier="q4")
    found["affine2"] = (affine, prompt)
    for name in GOLDENS:
        case = golden(name)
        tier = tier_of(case.overlay, case.base, root / name)
        found[name] = (tier, case.tokens)
    return found


@pytest.fixture(scope="module", params=["the installed one", *OTHERS])
def differences(
    request: pytest.FixtureRequest, library: Library, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """For each case, by how much the logits of transformers differ from the tier's at most."""
    python = request.param
    if python == "the installed one":
        if not importlib.util.find_spec("torch") or not importlib.util.find_spec("transformers"):
            pytest.skip("needs torch, which ./scripts/test --full installs")
        python = sys.executable
    root = tmp_path_factory.mktemp("transformers")
    tiers = _tiers(library, root)
    jobs = [
        (str(exported(tier, root / "hf" / name)), tokens, str(root / f"{name}.npy"))
        for name, (tier, tokens) in tiers.items()
    ]
    done = subprocess.run(
        [python, ROOT / "tests/hf_logits.py"], input=json.dumps(jobs), text=True, env=quiet()
    )
    assert done.returncode == 0
    return {
        name: float(np.abs(forward(load(tier, "float32"), tokens) - np.load(out)).max())
        for (name, (tier, tokens)), (_, _, out) in zip(tiers.items(), jobs, strict=True)
    }


def quiet() -> dict[str, str]:
    """An environment without this project's own modules and without a network."""
    gone = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in gone}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, *RECIPES, "affine2", *GOLDENS])
def test_logits_of_stock_transformers(name: str, differences: dict[str, float]):
    assert differences[name] < 1e-4
