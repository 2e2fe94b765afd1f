"""GGUF files with any bytes changed: only our errors come out, and memory stays bounded."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.imports import import_model
from outlier_mlx.storage.gguf import read_gguf
from tests.gguf_builder import build

MEMORY = 60_000_000
FAST = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tries(path: Path) -> None:
    """Open a file and make all of its parts, in bounded memory; only our errors come out."""
    tracemalloc.start()
    try:
        import_model(path, path.parent / "out", force=True)
    except OutlierError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


@pytest.fixture(scope="module")
def whole() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kinds = {"attn": "Q4_0", "gate": "Q8_0", "up": "Q5_1", "embed": "F16"}
        model = build(experts=2, layout="split", kinds=kinds, layers=1)
        return model.write(Path(folder) / "x.gguf").read_bytes()


@FAST
@given(st.data())
def test_damaged_files(tmp_path: Path, whole: bytes, data: st.DataObject):
    """Bytes changed anywhere, above all in the metadata, and ends cut off."""
    made = bytearray(whole)
    end = whole.index(b"output.weight") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, end), st.integers(0, len(whole) - 9)))
        width = data.draw(st.sampled_from([1, 4, 8]))
        new = data.draw(st.one_of(st.binary(min_size=width, max_size=width), st.just(b"\xff" * 8)))
        made[at : at + len(new)] = new
    if data.draw(st.booleans()):
        del made[data.draw(st.integers(0, len(whole))) :]
    path = tmp_path / "x.gguf"
    path.write_bytes(made)
    tries(path)


@FAST
@given(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, counts: tuple[int, int], rest: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)
    with suppress(CheckpointError):
        read_gguf(path)


@FAST
@given(st.integers(0, 20), st.sampled_from([0, 1, 10**6, 2**32, 2**63, 2**64 - 1]))
def test_arrays_of_any_length(tmp_path: Path, kind: int, count: int):
    path = tmp_path / "x.gguf"
    field = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(16))
    tracemalloc.start()
    try:
        read_gguf(path)
    except CheckpointError as error:
        assert "x.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000
