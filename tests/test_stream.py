"""Conversions that fetch one source file at a time, from a local stand-in for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import outlier_mlx
from outlier_mlx.storage import remote
from tests.builders import write_base
from tests.forms import FORMS, build
from tests.hub import Hub, point_to, serving


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small: take less for one."""
    monkeypatch.setattr(remote, "SMALL_BYTES", 2000)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in as this process's hub, with an empty cache and nobody logged in."""
    hub = Hub(redirects=True)
    with serving(hub):
        point_to(hub, tmp_path, monkeypatch)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def contents(tier: Path) -> dict[str, Any]:
    """A tier's files, but for what tells where it came from."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in tier.iterdir()}
    manifest = json.loads(found.pop("tier.json"))
    del found["README.md"], manifest["overlay"], manifest["base"]
    return found | {"manifest": manifest}


@pytest.mark.parametrize("tier", ["q4", "f32"])
@pytest.mark.parametrize("form", [name for name in FORMS if not name.startswith("gguf")])
def test_every_form(hub: Hub, tmp_path: Path, form: str, tier: str) -> None:
    built = build(tmp_path / "overlay", form)
    hub.add("owner/overlay", built.path)
    base = None
    if not FORMS[form][1].get("with_base", True):
        sizes = {k: v for k, v in FORMS[form][1].items() if k in ("hidden", "heads")}
        base = write_base(tmp_path / "base", shards=2, **sizes).path
        hub.add("owner/base", base)
    whole = outlier_mlx.convert(built.path, base, tmp_path / "whole", tier=tier)
    out = tmp_path / "out" / "streamed"
    streamed = outlier_mlx.convert(
        "owner/overlay", "owner/base" if base else None, out, tier=tier, stream=True
    )
    assert contents(streamed) == contents(whole)
    assert [p.name for p in out.parent.iterdir()] == ["streamed"]
