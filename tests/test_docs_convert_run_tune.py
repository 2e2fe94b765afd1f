"""Every command on the pages about converting, running and tuning runs as it stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.storage.safetensors import read_header
from tests.builders import write_base, write_overlay
from tests.pages import blocks, prepare, run_block

# It would change the user's own programs.
LEFT_OUT = "uv tool install"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def run_page(page: str, folder: Path) -> str:
    """Run all blocks; all that they print. `gapless` is for what the demo pair does not suit."""
    printed = ""
    for language, text in blocks(page):
        if LEFT_OUT not in text:
            place = folder / "gapless" if "portable" in text else folder
            printed += run_block(language, text, place).out
    return printed


@pytest.mark.slow
def test_convert(folder: Path) -> None:
    dims: dict[str, Any] = {"layers": 2, "moe_layers": (1,), "expert_intermediate": 64}
    write_overlay(folder / "gapless" / "my-overlay", with_base=False, tokenizer=False, **dims)
    write_base(folder / "gapless" / "base", **dims)
    printed = run_page("docs/convert.md", folder)
    assert "my-tier: whole: " in printed
    assert inspect(folder / "best-tier").form == "tq1_0_rows"
    assert inspect(folder / "gapless" / "my-portable").form == "ernie4_5_moe"
    exported = outlier_mlx.open_overlay(folder / "my-packed").experts
    for layer, experts in outlier_mlx.open_overlay(folder / "my-export").experts.items():
        assert len(exported[layer]) == len(experts)


@pytest.mark.slow
def test_run(folder: Path) -> None:
    outlier_mlx.convert(folder / "my-overlay", folder / "base", folder / "my-tier")
    printed = run_page("docs/run.md", folder)
    assert len(printed) > 200 and (folder / "reply.txt").stat().st_size > 20


@pytest.mark.slow
def test_tune(folder: Path) -> None:
    # Alphas that leave something to learn; the demo's own are the result of training.
    overlay, untuned = outlier_mlx.open_overlay(folder / "my-overlay"), folder / "untuned.json"
    untuned.write_text(json.dumps({str(n): [0.1] * len(e) for n, e in overlay.experts.items()}))
    outlier_mlx.convert(overlay.path, folder / "base", folder / "my-tier", alpha=str(untuned))
    run_page("docs/tune.md", folder)
    assert json.loads((folder / "alpha.json").read_text()).keys()
    (tuned,) = (folder / "tuned").glob("*.safetensors")
    (own,) = (folder / "my-tier").glob("*.safetensors")
    names = [name for name in read_header(own) if name.endswith("mlp.alpha")]
    assert names
    for name in names:
        new, old = read_header(tuned)[name].read(), read_header(own)[name].read()
        assert (new != old).any()
