"""Fixtures for every test, and what keeps tests apart from their user's settings."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.builders import Built
from tests.library import Library
from tests.metal import Metal, any_metal
from tests.refusals import Site
from tests.refusals import build as build_site

pytest_plugins = ["kernels.emulator.pytest_plugin"]

# No kernel variants that were chosen on this machine.
os.environ["OUTLIER_MLX_KERNELS"] = ""

# A terminal's own width counts, not what a parent process has exported.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


# Files whose tests take half a minute or more.
LONG = ("test_pages.py", "test_serve_load.py", "test_killed.py", "test_wheel.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: at the end, no process waits for the one that has such a file."""
    length = Counter[Path]()
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        length[item.path] += 100 if item.path.name in LONG else 20 if slow else 1
    items.sort(key=lambda item: -length[item.path])


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Thousands of small files would take minutes to reach it; a test of that does wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.delattr(fcntl, "F_FULLFSYNC", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_bytecode_of_tiers() -> Iterator[None]:
    """A test may change a tier's code and run it again within the second that Python looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        yield
    shutil.rmtree(f"{sys.pycache_prefix}{tempfile.gettempdir()}", ignore_errors=True)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """Checkpoints and tiers that are made once, for reading."""
    library = Library(tmp_path_factory.mktemp("library"))
    yield library
    library.check()


@pytest.fixture(scope="session")
def overlay(library: Library) -> Built:
    """A V3.2 overlay with its base: four layers, experts in two."""
    return library.overlay()


@pytest.fixture(scope="session")
def tier(library: Library) -> Path:
    """The float32 tier of `overlay`."""
    return library.tier()


@pytest.fixture(scope="session")
def small_tier(library: Library) -> Path:
    """A float32 tier of two layers, with experts in the second."""
    return library.tier(library.overlay(layers=2, moe_layers=(1,)))


@pytest.fixture(scope="session")
def place(library: Library) -> Path:
    """A folder with `overlay`, its int4 `tier` and `text.txt`, for reading."""
    return library.place(layers=2, moe_layers=(1,))


@pytest.fixture
def metal() -> Iterator[Metal]:
    """The GPU that is here, or else the emulator; its launches are recorded."""
    with any_metal() as device:
        yield device


@pytest.fixture(scope="session")
def sound_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return build_site(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def site(sound_site: Site, tmp_path: Path) -> Site:
    """Sound inputs to damage, and a folder for outputs that holds something already."""
    return Site(shutil.copytree(sound_site.root, tmp_path / "site"))


@pytest.fixture(scope="module")
def served(small_tier: Path) -> Iterator[Any]:
    """A server of `small_tier` with small limits."""
    from tests.serving import running

    with running(small_tier, max_tokens=50, max_body=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network for data sets, and a cache of them for these tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def serve_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts servers of scripted models, which run for the tests of a module; see `ServeScript`."""
    from tests.scripted import Script
    from tests.serving import running

    with ExitStack() as servers:

        def serve(*reply: str, api_key: str | None = None, **script: Any) -> Any:
            written = Script(tmp_path_factory.mktemp("script") / "model", *reply, **script)
            server = servers.enter_context(running(written, api_key=api_key))
            if api_key:
                server.client = server.new_client(api_key=api_key)
            return server

        yield serve


@pytest.fixture(scope="module")
def text(tier: Path) -> Path:
    """The text beside a module's `tier`, which is that of a `place`."""
    return tier.parent / "text.txt"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def demo(library: Library) -> Path:
    """A tier with six experts in each of three layers; a token uses two."""
    return library.demo_tier("q4")


@pytest.fixture(scope="module")
def served_demo(demo: Path) -> Iterator[Any]:
    """A server of `demo`."""
    from tests.serving import running

    with running(demo, max_tokens=100) as server:
        yield server


@pytest.fixture
def visit(browser: Any, served_demo: Any) -> Iterator[Any]:
    """A visit to the page of `served_demo`."""
    from tests.browser import visiting

    with visiting(browser, served_demo) as made:
        yield made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `WritableHub` as this process's hub, with an empty cache and its user logged in."""
    from tests.hub import opened
    from tests.hub_uploads import WritableHandler, WritableHub

    (tmp_path / "store").mkdir()
    hub = WritableHub(store=tmp_path / "store")
    with opened(hub, tmp_path, monkeypatch, WritableHandler):
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub
