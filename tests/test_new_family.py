"""A new family of bases is one module in `models/`: written here, into a folder of the test's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.models import seed_oss
from mlx_lm.utils import load_model as mlx_lm_load_model

from outlier_mlx import models
from outlier_mlx.checkpoints import keys
from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.models.families import families
from outlier_mlx.tiers.verify import verify_tier
from tests import builders, damage
from tests.engine import forward, greedy_cached, load, tier_of
from tests.goldens import assert_logits_close
from tests.reference import forward as reference_forward
from tests.reference import greedy
from tests.reference_reader import read_overlay

MODULE = '''"""Seed-OSS."""

from outlier_mlx.models.families import Family

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    roles=frozenset(["base"]),
    defaults={
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    qkv_bias="attention_bias",
    o_bias="attention_out_bias",
    mlp_bias="mlp_bias",
    own_head_dim=True,
)
'''


def forget() -> None:
    families.cache_clear()
    keys.base_names.cache_clear()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "family_seed_oss.py").write_text(MODULE)
    with monkeypatch.context() as patch:
        patch.setattr(models, "__path__", [*models.__path__, str(folder)])
        forget()
        yield "seed_oss"
    forget()


@pytest.mark.parametrize("biases", [True, False])
def test_one_module_is_all_that_it_takes(biases: bool, family: str, tmp_path: Path):
    built = builders.write_overlay(
        tmp_path / "overlay", tokenizer=False, family=family, head_dim=20, biases=biases
    )
    damage.edit_config(built.path, attention_out_bias=biases)
    tier = tier_of(built.path, None, tmp_path / "tier")
    verify_tier(tier)
    model = load(tier)
    assert seed_oss.Model in type(model).__mro__
    reference, prompt = read_overlay(built.path), built.prompt(30)
    assert_logits_close(forward(model, prompt), reference_forward(reference, prompt))
    assert greedy_cached(model, prompt, 6)[0] == greedy(reference, prompt, 6)[0]
    own, _ = mlx_lm_load_model(tier, trust_remote_code=True)
    np.testing.assert_array_equal(forward(own, prompt), forward(model, prompt))

    export_tier(tier, tmp_path / "export", "overlay")
    again = tier_of(tmp_path / "export", None, tmp_path / "again")
    written = [json.loads((folder / "config.json").read_text()) for folder in (tier, again)]
    assert written[0] == written[1]
    assert inspect(again).kv_bytes_per_token == 2 * 4 * 2 * 20 * 2
    assert inspect(again).params == inspect(tier).params == inspect(built.path).params
