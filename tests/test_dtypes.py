"""Which dtype runs where, and what happens when it overflows."""

from pathlib import Path

import mlx.core as mx
import pytest

from outlier_mlx.engine import loading
from outlier_mlx.engine.loading import load, suited_dtype
from outlier_mlx.runtime.moe import OutlierMoE
from tests.damage import edit_json
from tests.library import Library
from tests.program import run


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.tier(tier="q4", dtype="bfloat16")


@pytest.mark.parametrize(
    ("chip", "form", "stored", "expected"),
    [
        ("Apple M1", "v3.2", "bfloat16", "float16"),
        ("Apple M2 Ultra", "v3.2", "bfloat16", "float16"),
        ("Apple M1 Max", "real", "bfloat16", None),
        ("Apple M1 Max", "v3.2", "float32", None),
        ("Apple M3 Max", "v3.2", "bfloat16", None),
        ("Apple M10", "v3.2", "bfloat16", None),
    ],
)
def test_bfloat16_gives_way_on_chips_without_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chip: str,
    form: str,
    stored: str,
    expected: str | None,
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": chip})
    (tmp_path / "tier.json").write_text("{}")
    edit_json(tmp_path / "tier.json", overlay={"form": form})
    assert suited_dtype(tmp_path, {"dtype": stored}) == expected


def test_on_the_cpu_nothing_is_chosen_for_the_model(tier: Path) -> None:
    assert suited_dtype(tier, {"dtype": "bfloat16"}) is None
    assert load(tier)[0](mx.array([[1, 2]])).dtype == mx.float32


def test_what_was_chosen_is_what_runs(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "suited_dtype", lambda folder, config: "float16")
    model, _ = load(tier)
    seen = []
    call = OutlierMoE.__call__

    def noted(self: OutlierMoE, x: mx.array) -> mx.array:
        y = call(self, x)
        seen.append((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(OutlierMoE, "__call__", noted)
    assert model(mx.array([[1, 2]])).dtype == mx.float16
    assert seen == [(mx.float16, mx.float16)] * 2
    assert load(tier, dtype="float32")[0](mx.array([[1, 2]])).dtype == mx.float32


def test_an_overflow_is_named_with_its_cure(tier: Path, tmp_path: Path) -> None:
    # The alphas blow the residual stream up beyond what float16 holds.
    alphas = {layer: [3e38] * 4 for layer in ("1", "3")}
    (tmp_path / "alpha.json").write_text("{}")
    edit_json(tmp_path / "alpha.json", **alphas)
    command = ["generate", "--model", str(tier), "-p", "hi", "-m", "4"]
    options = ["--dtype", "float16", "--alpha", str(tmp_path / "alpha.json")]
    overflown = run(*command, *options, code=1)
    assert "activations overflowed" in overflown.err
    assert "--dtype bfloat16" in overflown.err and "outlier-mlx verify" in overflown.err
    run(*command, "--dtype", "float16")
