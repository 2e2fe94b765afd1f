"""MLX's command buffers: when they become larger, whose value counts, and who says so."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import outlier_mlx
from outlier_mlx.engine import buffers, limits
from outlier_mlx.engine.buffers import MAX_MB, MAX_OPS, larger_buffers, sysctl_text
from outlier_mlx.errors import OutlierError
from tests.program import run_python

BOTH = {MAX_OPS: "1000", MAX_MB: "1000"}

# Ends where MLX is imported: shows the variables as they are then, and as a child sees them.
WATCHED = f"""
import os, subprocess, sys
from outlier_mlx.engine import buffers

buffers.read_chip = lambda: {{chip!r}}
SHOW = "import os, sys; print([os.environ.get(n) for n in {buffers.VARIABLES!r}], flush=True)"

class Watch:
    def find_spec(self, name, *_):
        if name == "mlx.core":
            exec(SHOW, {{}})
            subprocess.run([sys.executable, "-c", SHOW], check=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from outlier_mlx.cli import main
main()
"""


@pytest.mark.parametrize("kind", ["", " Pro", " Max", " Ultra", " (Virtual)"])
@pytest.mark.parametrize("generation", [1, 2, 3, 4])
def test_m1_to_m4(generation: int, kind: str) -> None:
    assert larger_buffers(f"Apple M{generation}{kind}", {}) == BOTH


@pytest.mark.parametrize(
    "chip", ["Apple M5", "Apple M5 Max", "Apple M10", "Apple M14 Max", "Intel Core i9", "Apple", ""]
)
def test_other_chips_keep_mlx_own_values(chip: str) -> None:
    assert larger_buffers(chip, {}) == {}


@pytest.mark.parametrize("value", ["50", "0", ""])
def test_each_value_of_the_user_stays(value: str) -> None:
    assert larger_buffers("Apple M1 Max", {MAX_OPS: value}) == {MAX_MB: "1000"}
    assert larger_buffers("Apple M1 Max", {MAX_MB: value}) == {MAX_OPS: "1000"}
    assert larger_buffers("Apple M1 Max", {MAX_OPS: value, MAX_MB: "7"}) == {}


def test_the_names_are_those_that_mlx_reads() -> None:
    package = Path(mx.__file__).parent
    text = (package / "include" / "mlx" / "utils.h").read_text(encoding="utf-8")
    for name in buffers.VARIABLES:
        assert f'get_var("{name}", default_value)' in text


def read_with(text: bytes | None) -> str:
    """What is read from a C library whose `sysctlbyname` knows one name, or none."""

    @ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    def sysctlbyname(name: bytes, place: int | None, size: Any, new: object, length: int) -> int:
        if text is None or name != b"machdep.cpu.brand_string" or new or length:
            return -1
        whole = text + b"\0"
        if place is not None:
            assert size[0] >= len(whole)
            ctypes.memmove(place, whole, len(whole))
        size[0] = len(whole)
        return 0

    class Library:
        pass

    library: Any = Library()
    library.sysctlbyname = sysctlbyname
    return sysctl_text(b"machdep.cpu.brand_string", library)


def test_the_name_of_the_chip_comes_from_the_system() -> None:
    assert read_with(b"Apple M1 Max") == "Apple M1 Max"
    assert read_with(b"") == read_with(None) == ""


def test_elsewhere_than_on_a_mac_no_chip_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers.sys, "platform", "linux")
    assert buffers.read_chip() == ""


def test_in_python_it_is_a_call_before_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in buffers.VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(buffers, "read_chip", lambda: "Apple M2 Ultra")
    with pytest.raises(OutlierError, match=r"MLX is imported already.*before importing mlx"):
        outlier_mlx.use_larger_buffers()
    assert not {*buffers.VARIABLES} & {*os.environ}
    monkeypatch.setattr(buffers, "mlx_is_imported", lambda: False)
    assert outlier_mlx.use_larger_buffers() == BOTH
    assert {name: os.environ[name] for name in BOTH} == BOTH
    assert outlier_mlx.use_larger_buffers() == {}


def test_importing_the_package_sets_nothing() -> None:
    script = f"""
import os, sys
import outlier_mlx
from outlier_mlx.engine import buffers
buffers.read_chip = lambda: "Apple M1"
assert not buffers.mlx_is_imported()
outlier_mlx.load
assert buffers.mlx_is_imported()
print([name for name in {buffers.VARIABLES!r} if name in os.environ])
"""
    assert run_python(script, env=clean()).out == "[]\n"


def clean(**variables: str) -> dict[str, str]:
    """This environment without the settings, and with these variables."""
    kept = {name: value for name, value in os.environ.items() if name not in buffers.VARIABLES}
    return kept | variables


@pytest.mark.parametrize(
    ("chip", "own", "seen"),
    [
        ("Apple M1 Max", {}, ["1000", "1000"]),
        ("Apple M3", {MAX_OPS: "20"}, ["20", "1000"]),
        ("Apple M5", {}, [None, None]),
    ],
)
def test_commands_set_them_before_mlx_and_children_inherit_them(
    chip: str, own: dict[str, str], seen: list[str | None], small_tier: Path
) -> None:
    script = WATCHED.replace("{chip!r}", repr(chip))
    done = run_python(script, "generate", small_tier, "--prompt", "x", env=clean(**own))
    assert done.out == f"{seen}\n" * 2


@pytest.mark.parametrize(
    ("own", "before", "after"), [("1000", 150, 100), ("1000", 80, 80), (None, 150, 150)]
)
def test_with_large_buffers_mlx_waits_at_what_the_gpu_may_use(
    own: str | None, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MAX_MB, raising=False)
    if own is not None:
        monkeypatch.setenv(MAX_MB, own)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    info = {"max_recommended_working_set_size": 100 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    usual = mx.set_memory_limit(before << 30)
    try:
        limits.wait_within_budget()
        assert mx.set_memory_limit(usual) == after << 30
    finally:
        mx.set_memory_limit(usual)
