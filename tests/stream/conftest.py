"""Two models on the stand-in for the hub, small enough that their files count as large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import file_download

import outlier_mlx
from outlier_mlx.storage import remote
from tests.builders import write_base, write_overlay
from tests.hub import Hub, opened
from tests.stream.streaming import DIMS, OVERLAY_DIMS, Models


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small: take less for a small file, and do not wait before a retry."""
    monkeypatch.setattr(remote, "SMALL_BYTES", 2000)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    models = Models(tmp_path_factory.mktemp("models"))
    for n in (1, 2):
        write_overlay(models.overlay(n), with_base=False, tokenizer=False, seed=n, **OVERLAY_DIMS)
        write_base(models.base(n), shards=3, seed=n, **DIMS)
        outlier_mlx.convert(models.overlay(n), models.base(n), models.tier(n))
    return models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(redirects=True)
    with opened(hub, tmp_path, monkeypatch):
        yield hub


@pytest.fixture
def served(hub: Hub, models: Models) -> Hub:
    """The stand-in with the first commits of both models."""
    hub.add("owner/overlay", models.overlay(1))
    hub.add("owner/base", models.base(1))
    return hub


@pytest.fixture
def stop_at(served: Hub) -> Callable[[str], None]:
    """Have the hub go away when a file is fetched as a whole; the next call brings it back."""

    def stop(name: str) -> None:
        def on_file(method: str, file: str, part: str | None) -> None:
            served.down |= method == "GET" and file == name and part is None

        served.down, served.on_file = False, on_file

    return stop
