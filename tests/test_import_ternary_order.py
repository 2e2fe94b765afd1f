"""What an import of a ternary folder checks before it reads the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outlier_mlx.imports import import_model
from outlier_mlx.storage.safetensors import TensorRef
from tests.program import assert_refused, run
from tests.ternary_sources import bitnet_pack, mlx_pack


@pytest.mark.parametrize("pack", [mlx_pack, bitnet_pack])
def test_a_damaged_tokenizer(pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = pack().write(tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{")

    def unread(self: TensorRef, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(TensorRef, "read", unread)
    refused = run("import", source, "--out", tmp_path / "rows", code=1)
    assert_refused(refused, "tokenizer_config.json")
    assert not (tmp_path / "rows").exists()


def test_the_same_model_is_imported_otherwise(tmp_path: Path):
    source = mlx_pack().write(tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{}")
    assert import_model(source, tmp_path / "rows").path.is_dir()
