"""Every reader against damage that nobody thought of: it refuses in one line or reads, at once and
in little memory, whatever is on disk."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.alpha_overlay import read_alpha_overlay
from outlier_mlx.checkpoints.base import join
from outlier_mlx.checkpoints.monolith import read_monolith
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import read_header
from tests.builders import Built, write_overlay
from tests.form_builders import (
    Pickle,
    pack_monolith,
    to_expert_files,
    to_gguf,
    to_packed,
    to_toy,
    torch_save,
)

MEMORY = 60_000_000
SECONDS = 10.0

FAST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
THOROUGH = settings(FAST, max_examples=400)


@contextmanager
def bounded() -> Iterator[None]:
    """Whatever is done within may take little memory and time, and raise CheckpointError only."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak} bytes"
    assert time.process_time() - start < SECONDS


def consume(overlay: Overlay) -> None:
    """Read everything that a conversion would."""
    overlay.alphas()
    for tensor in [*overlay.base.values(), *overlay.routers.values()]:
        tensor.read_float32()
    for experts in overlay.experts.values():
        for expert in experts:
            for _, matrix in expert:
                matrix.row_scales()
                trits = matrix.trits.read()
                assert trits.shape == tuple(matrix.trits.shape) and trits.dtype == "int8"
    if overlay.base:
        join(overlay, None)


# Structured damage to sound overlays

SMALL: dict[str, Any] = {"hidden": 12, "heads": 2, "kv_heads": 1, "intermediate": 16, "vocab": 24}
SMALL |= {"expert_intermediate": 9, "layers": 2, "moe_layers": (1,), "experts": 2}
SMALL |= {"tokenizer": False}
BLOCKS = SMALL | {"hidden": 256, "expert_intermediate": 256, "with_base": False}


def with_alphas(built: Built) -> Built:
    value = {"alphas": {"layer_1": [0.5, 2.0]}, "originals": {1: [1.0, 1.0]}}
    torch_save(built.path / "alpha_overlay.pt", value)
    return built


FORMS: dict[str, tuple[Callable[[Built], Built], dict[str, Any]]] = {
    "v3.2": (with_alphas, SMALL | {"alpha": "both", "shards": 2}),
    "per-file": (to_expert_files, SMALL | {"with_base": False, "alpha": "json"}),
    "trainer": (lambda built: to_expert_files(built, trainer=True), SMALL | {"with_base": False}),
    "packed": (to_packed, SMALL | {"with_base": False, "scale_form": "per_row"}),
    "monolith": (lambda built: to_packed(built, monolith=True), SMALL | {"with_base": False}),
    "toy": (to_toy, SMALL | {"moe_layers": None, "alpha": "none"}),
    "gguf": (to_gguf, BLOCKS),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a sound overlay by form, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            form, options = FORMS[name]
            folder = tmp_path_factory.mktemp("sound") / "o"
            made[name] = form(write_overlay(folder, **options)).path
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                consume(open_overlay(made[name]))
        return made[name]

    return get


ODD_VALUES: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1.5, "", "x", "..", "/x"]
ODD_VALUES += [[], [0, 0], [1, [2]], {}, {"a": {"b": 1}}, "\ud800", "\0", "base.model.layers.1.mlp"]


def damage_json(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Put another value at some place of a JSON document, or take it out."""
    value = json.loads(data)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return data
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(st.sampled_from(ODD_VALUES))
        else:
            del place[key]
        return json.dumps(value).encode()


def damage_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Cut, flip, insert or repeat bytes, mostly near the beginning, where headers are."""
    size = len(data)
    near = st.integers(0, min(size, 64))
    at = draw(st.one_of(near, st.integers(0, size)))
    match draw(st.sampled_from(["cut", "set", "insert", "word", "repeat"])):
        case "cut":
            return data[:at]
        case "set":
            return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 8 :]
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
        case "word":
            edge = st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 4096, size])
            return data[:at] + struct.pack("<Q", draw(edge)) + data[at + 8 :]
    return data + data[at:]


def damage_header(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Damage the JSON of a safetensors file and leave its data as it is."""
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_json(draw, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@st.composite
def damaged(draw: Any, folder: Path) -> tuple[Path, bytes]:
    """A file of a folder, and other contents for it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw(st.sampled_from(files))
    data = path.read_bytes()
    kinds = [damage_bytes]
    if path.suffix == ".json":
        kinds.append(damage_json)
    if path.suffix == ".safetensors":
        kinds.append(damage_header)
    return path, draw(st.sampled_from(kinds))(draw, data)


def attack(folder: Path, data: st.DataObject) -> None:
    """Damage one file, read all, and put the file back."""
    path, contents = data.draw(damaged(folder))
    before = path.read_bytes()
    path.write_bytes(contents)
    try:
        with bounded():
            consume(open_overlay(folder))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", FORMS)
@settings(FAST, max_examples=25)
@given(data=st.data())
def test_damaged_overlays(name: str, data: st.DataObject, sound: Callable[[str], Path]):
    attack(sound(name), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@THOROUGH
@given(data=st.data())
def test_damaged_overlays_thoroughly(name: str, data: st.DataObject, sound: Callable[[str], Path]):
    attack(sound(name), data)


# Single files from nothing

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**64, -1, 1.5, None]), max_size=4)
OFFSETS = st.lists(st.sampled_from([0, 1, 4, 8, 12, 2**40, -4, True]), min_size=1, max_size=3)
ENTRY: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "I8", "BF16", "F8", 3]), "shape": SHAPES}
) | st.sampled_from([None, [], 3, {}])
ENTRIES = st.dictionaries(st.text(max_size=3), st.tuples(ENTRY, OFFSETS), max_size=4)


@FAST
@given(entries=ENTRIES, data=st.binary(max_size=40), length=st.integers(-3, 3))
def test_safetensors(tmp_path: Path, entries: dict[str, Any], data: bytes, length: int):
    header = {
        name: entry | {"data_offsets": offsets} if isinstance(entry, dict) else entry
        for name, (entry, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + length)) + text + data)
    with bounded():
        for tensor in read_header(path).values():
            tensor.read()


@FAST
@given(data=st.binary(max_size=200))
def test_safetensors_of_any_bytes(tmp_path: Path, data: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with bounded():
        read_header(path)


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path):
    name = "\n\x1b[2J" + 10_000 * "x"
    text = json.dumps({name: {}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / "x.safetensors")
    message = str(error.value)
    assert message.startswith("x.safetensors: ") and "dtype None" in message
    assert message.isprintable() and len(message) < 1000


# Instructions of pickles, sound ones and others, in any order.
INSTRUCTIONS = st.sampled_from(
    [b"N", b"\x88", b"]", b"}", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u"]
    + [b"q\0", b"h\0", b"q\1", b"h\1", b"r\xff\xff\xff\x7f", b"\x94", b"R", b"b", b"Q", b"0", b"2"]
    + [b"K\1", b"J\xff\xff\xff\xff", b"G" + struct.pack(">d", 0.5), b"X\3\0\0\0abc", b"U\1x"]
    + [b"X\7\0\0\0storage", b"X\1\0\0\x000", b"X\x10\0\0\0layers.1.alpha_e", b"\x8a\1\1"]
    + [b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"\x93"]
    + [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"\x81"]
    + [b"\x80\x02", b"\x95" + struct.pack("<Q", 5), b".", b"(ios\nx\n", b"P1\n", b"I1\n", b"\xff"]
)
GOOD = Pickle().dump({"alphas": {1: [0.5, 1.0]}, "originals": None})


def write_zip(path: Path, code: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/data/0", struct.pack("<4f", 1, 2, 3, 4))
    path.write_bytes(buffer.getvalue())


@settings(FAST, max_examples=300)
@given(code=st.lists(INSTRUCTIONS, max_size=30).map(b"".join))
@example(code=GOOD.code)
def test_pickles(tmp_path: Path, code: bytes):
    write_zip(tmp_path / "x.pt", code + b".")
    with bounded():
        read_alpha_overlay(tmp_path / "x.pt", 3, 2)


@pytest.mark.slow
@settings(FAST, max_examples=4000)
@given(code=st.lists(INSTRUCTIONS, max_size=40).map(b"".join))
def test_pickles_thoroughly(tmp_path: Path, code: bytes):
    write_zip(tmp_path / "x.pt", code + b".")
    with bounded():
        read_alpha_overlay(tmp_path / "x.pt", 3, 2)


@FAST
@given(
    fields=st.lists(st.sampled_from([0, 1, 2, 6, 2**31, 2**32 - 1]), min_size=5, max_size=5),
    table=st.lists(st.sampled_from([0, 1, 4096, 8192, 2**64 - 4096]), max_size=12),
)
def test_monoliths(tmp_path: Path, fields: list[int], table: list[int]):
    head = (b"OEXS" + struct.pack("<5I6Q", *fields, 1, 2, 1, 2, 1, 2)).ljust(4096, b"\0")
    path = tmp_path / "experts.bin"
    path.write_bytes((head + struct.pack(f"<{len(table)}Q", *table)).ljust(16384, b"\0"))
    with bounded():
        read_monolith(path)


@FAST
@given(counts=st.tuples(*[st.sampled_from([0, 1, 2, 3, 10**6, 2**63])] * 2), rest=st.binary())
def test_gguf_of_any_bytes(tmp_path: Path, counts: tuple[int, int], rest: bytes):
    folder = tmp_path / "o"
    folder.mkdir(exist_ok=True)
    (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)
    with bounded():
        open_overlay(folder)


@FAST
@given(kind=st.integers(0, 14), count=st.sampled_from([0, 1, 5, 2**20, 2**40, 2**63]))
def test_gguf_arrays(tmp_path: Path, kind: int, count: int):
    """Metadata that claims to be long: the package's own reader would believe it."""
    folder = tmp_path / "o"
    folder.mkdir(exist_ok=True)
    field = struct.pack("<Q1sIIQ", 1, b"k", 9, kind, count) + bytes(64)
    (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with bounded():
        open_overlay(folder)


# Files that are cheap to make and look large


def test_holes_cost_nothing(tmp_path: Path):
    """A terabyte of nothing, in every kind of file that has no header to bound it."""
    built = to_packed(write_overlay(tmp_path / "o", **SMALL), monolith=True)
    parts = {f"part {n}": b"x" for n in range(6)}
    for name, head in {
        "experts.bin": pack_monolith({(1, 0): parts, (1, 1): parts})[:-8192],
        "alpha_overlay.pt": b"PK",
        "alpha.json": b"{",
    }.items():
        path = built.path / ("packed_experts" if name == "experts.bin" else "") / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(head)
        os.truncate(path, 1 << 40)
        with bounded(), pytest.raises(CheckpointError):
            consume(open_overlay(built.path))
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    consume(open_overlay(built.path))
