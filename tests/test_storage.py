"""Safetensors in and out, against the safetensors library and MLX as other readers."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.safetensors import (
    FLOAT_DTYPES,
    MAX_HEADER_BYTES,
    NUMPY_DTYPES,
    TensorRef,
    read_header,
)
from outlier_mlx.storage.texts import parse_json
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec, assign_shards

# Every example uses the same file name in the test's folder.
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# What MLX reads, too.
MLX_DTYPES = sorted(set(NUMPY_DTYPES) - {"F64"})

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensor_sets(
    draw: st.DrawFn, dtypes: list[str]
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Names with (dtype, shape, bytes)."""
    found = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
        size = prod(shape) * NUMPY_DTYPES[dtype].itemsize
        data = draw(st.binary(min_size=size, max_size=size))
        # A boolean is stored as 0 or 1.
        found[name] = (dtype, shape, bytes(b & 1 for b in data) if dtype == "BOOL" else data)
    return found


def encode(header: Any, data: bytes, padding: int = 0) -> bytes:
    text = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def theirs(blob: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the safetensors library reads."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(blob)
    }


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for name, tensor in read_header(path).items()
    }


# Reading


@SAME_FOLDER
@given(data=st.data())
def test_reads_what_the_library_reads(tmp_path: Path, data: st.DataObject) -> None:
    """All dtypes; keys in another order than their data; metadata; padding."""
    tensors = data.draw(tensor_sets(sorted(NUMPY_DTYPES)))
    entries: dict[str, Any] = {}
    blob = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(blob), len(blob) + len(content)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        blob += content
    header = {name: entries[name] for name in data.draw(st.permutations(list(entries)))}
    if data.draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(header, blob, data.draw(st.integers(0, 9))))
    assert ours(path) == theirs(path.read_bytes()) == tensors


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    kinds = [dtype for dtype in NUMPY_DTYPES if dtype != "BF16"]
    arrays = {kind: np.arange(24).reshape(2, 3, 4).astype(NUMPY_DTYPES[kind]) for kind in kinds}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"some": "metadata"})
    tensors = read_header(tmp_path / "x.safetensors")
    assert set(tensors) == set(kinds)
    for kind, array in arrays.items():
        assert tensors[kind].dtype == kind
        np.testing.assert_array_equal(tensors[kind].read(), array)


@SAME_FOLDER
@given(data=st.data())
def test_ranges_of_rows(tmp_path: Path, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 7))
    width = data.draw(st.integers(0, 3))
    array = np.arange(rows * width, dtype=np.int16).reshape(rows, width)
    safetensors.numpy.save_file({"before": np.zeros(3, np.int8), "x": array}, tmp_path / "x")
    tensor = read_header(tmp_path / "x")["x"]
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.none() | st.integers(start, rows + 3))
    np.testing.assert_array_equal(tensor.read(start, stop), array[start:stop])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_floats_widen_exactly(tmp_path: Path, dtype: str) -> None:
    values = [0.0, -0.0, 1.5, -3.0, 2.0**-14, 65280.0]
    array = mx.array(values, {"F16": mx.float16, "BF16": mx.bfloat16}.get(dtype, mx.float32))
    path = tmp_path / "x.safetensors"
    if dtype == "F64":
        safetensors.numpy.save_file({"x": np.array(values)}, path)
    else:
        mx.save_safetensors(str(path), {"x": array})
    tensor = read_header(path)["x"]
    assert tensor.dtype == dtype
    read = tensor.read_float32()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.array(values, np.float32))
    assert np.signbit(read[1])


def test_integers_are_no_floats(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros(2, np.int8)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="x: x: dtype I8, expected a float"):
        read_header(tmp_path / "x")["x"].read_float32()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"first": np.zeros(4, np.int8), "x": np.zeros(9, np.int8)}, path)
    tensors = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert tensors["first"].read().size == 4
    with pytest.raises(CheckpointError, match=r"x\.safetensors: x: the file ends within"):
        tensors["x"].read()


# Headers that mean harm

ODD_NUMBERS = [-1, 0, 1, 2, 3, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 0.5, 1e400, True]
odd_values = st.recursive(
    st.sampled_from([*ODD_NUMBERS, None, "", "F32", "data_offsets"]) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
odd_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I8", "BF16", "F8_E4M3", "f32", ""]) | odd_values,
        "shape": st.lists(st.sampled_from([0, 1, 2, 2**32, 2**62, -1]), max_size=3) | odd_values,
        "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | odd_values,
        "more": odd_values,
    },
)
odd_headers = st.dictionaries(names | st.just("__metadata__"), odd_entries | odd_values, max_size=3)


def check_like_the_library(path: Path, blob: bytes) -> None:
    """Refuse with one of our errors, or read what the library reads."""
    path.write_bytes(blob)
    try:
        read = ours(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return
    assert read == theirs(blob)


@SAME_FOLDER
@given(blob=st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, blob: bytes) -> None:
    check_like_the_library(tmp_path / "x.safetensors", blob)


@SAME_FOLDER
@given(text=st.binary(max_size=60), data=st.binary(max_size=9))
def test_any_header_bytes(tmp_path: Path, text: bytes, data: bytes) -> None:
    blob = struct.pack("<Q", len(text)) + text + data
    check_like_the_library(tmp_path / "x.safetensors", blob)


@SAME_FOLDER
@given(header=odd_headers | odd_values, data=st.binary(max_size=9))
def test_any_json_header(tmp_path: Path, header: Any, data: bytes) -> None:
    check_like_the_library(tmp_path / "x.safetensors", encode(header, data))


@SAME_FOLDER
@given(data=st.data())
def test_one_thing_wrong(tmp_path: Path, data: st.DataObject) -> None:
    """A sound header in which one field is anything else."""
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "I8", "shape": [3], "data_offsets": [8, 11]},
        "__metadata__": {"format": "pt"},
    }
    name = data.draw(st.sampled_from(["a", "b", "__metadata__"]))
    header[name][data.draw(st.sampled_from(list(header[name])))] = data.draw(
        odd_values | st.lists(st.sampled_from(ODD_NUMBERS), max_size=3)
    )
    check_like_the_library(tmp_path / "x.safetensors", encode(header, bytes(11)))


@pytest.mark.parametrize("header", [b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"{}{}", b""])
def test_what_is_almost_json_is_refused_there_and_here(tmp_path: Path, header: bytes) -> None:
    blob = struct.pack("<Q", len(header)) + header
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(blob)
    (tmp_path / "x.safetensors").write_bytes(blob)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "offsets",
    [
        ([0, 8], [4, 12]),  # overlapping, though the sizes add up to the file's
        ([0, 8], [0, 8]),
        ([0, 8], [9, 17]),  # a gap
        ([1, 9], [9, 17]),
        ([8, 0], [8, 16]),  # backwards
        ([0, 8], [8, 15]),  # too short for the shape
        ([0, 8], [16, 24]),  # beyond the end
    ],
    ids=str,
)
def test_data_that_does_not_lie_side_by_side(tmp_path: Path, offsets: tuple) -> None:
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place}
        for name, place in zip("ab", offsets, strict=True)
    }
    for size in (16, 17):
        blob = encode(header, bytes(size))
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(blob)
        (tmp_path / "x.safetensors").write_bytes(blob)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(tmp_path / "x.safetensors")


def entry(shape: list[int], nbytes: int) -> dict[str, Any]:
    return {"dtype": "I8", "shape": shape, "data_offsets": [0, nbytes]}


COSTLY: dict[str, bytes] = {
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header above the bound": struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1),
    "tensor of 2^60 bytes": encode({"x": entry([2**60], 2**60)}, b""),
    "size that overflows 64 bits": encode({"x": entry([2**32, 2**32], 0)}, b""),
    "nothing, times 2^62": encode({"x": entry([0, 2**62, 2**62], 0)}, b""),
    "thousands of dimensions": encode({"x": entry([2**62] * 30_000, 0)}, b""),
    "a number of a million digits": struct.pack("<Q", 10**6 + 6) + b'{"x":' + b"9" * 10**6 + b"}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_refusing_costs_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(COSTLY[name])
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(path)["x"].read()
        assert time.perf_counter() - begin < 5
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("unit", [b"[", b'{"":'])
def test_deep_nesting_is_refused(tmp_path: Path, unit: bytes) -> None:
    text = unit * 100_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not valid JSON"):
        read_header(path)


def test_a_key_twice_among_many_is_found_in_time(tmp_path: Path) -> None:
    keys = [f'"{number}": 0' for number in range(100_000)]
    text = "{" + ", ".join([*keys, keys[-1]]) + "}"
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="'99999' appears twice"):
        parse_json(text.encode(), "x.json")
    assert time.perf_counter() - begin < 5


# Writing

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


def write(folder: Path, tensors: Contents, limit: int, cuts: list[int] | None = None) -> list:
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    with ShardedWriter(folder, specs, limit) as writer:
        for name, (_, _, content) in tensors.items():
            places = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts or [])})
            for start, stop in zip(places, places[1:] or [0], strict=False):
                writer.write(name, content[start:stop])
        return writer.finish()


@SAME_FOLDER
@given(
    tensors=tensor_sets(MLX_DTYPES),
    limit=st.integers(1, 2000),
    cuts=st.lists(st.integers(0, 500), max_size=3),
)
def test_shards_hold_everything_once(
    tmp_path_factory: pytest.TempPathFactory, tensors: Contents, limit: int, cuts: list[int]
) -> None:
    assume(tensors)
    folder = tmp_path_factory.mktemp("shards")
    written = write(folder, tensors, limit, cuts)
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    expected = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    assert [path.name for path in shards] == expected

    # Both other readers find what was written, in files that respect the limit.
    found: Contents = {}
    for path in shards:
        content = theirs(path.read_bytes())
        assert len(content) == 1 or sum(len(data) for _, _, data in content.values()) <= limit
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        loaded = mx.load(str(path), format="safetensors")
        assert isinstance(loaded, dict)
        for name, array in loaded.items():
            dtype, shape, data = content[name]
            bits = array.view(mx.uint16) if dtype == "BF16" else array
            assert (array.shape, np.array(bits).tobytes()) == (shape, data)
        assert not set(found) & set(content)
        found |= content
    assert found == tensors

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(len(data) for _, _, data in tensors.values())}
    for name, file in index["weight_map"].items():
        assert name in theirs((folder / file).read_bytes())
    assert list(index["weight_map"]) == list(tensors)

    assert [file.name for file in written] == [*expected, "model.safetensors.index.json"]
    for file in written:
        data = (folder / file.name).read_bytes()
        assert (file.sha256, file.nbytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_file_is_only_begun_when_the_last_is_full() -> None:
    specs = [TensorSpec(str(n), "U8", (size,)) for n, size in enumerate([4, 6, 1, 30, 2, 8, 3])]
    shards = [[spec.nbytes for spec in shard] for shard in assign_shards(specs, 10)]
    assert shards == [[4, 6], [1], [30], [2, 8], [3]]


SPECS = [TensorSpec("a", "U8", (4,)), TensorSpec("b", "F32", (2,)), TensorSpec("c", "U8", (1,))]


@pytest.mark.parametrize(
    ("chunks", "named"),
    [
        ([("b", 8)], "b"),  # out of order
        ([("a", 5)], "a"),  # too long
        ([("a", 3), ("a", 2)], "a"),
        ([("a", 3), ("b", 8)], "b"),  # begun before the last one was done
        ([("a", 4), ("a", 1)], "a"),
        ([("a", 4), ("b", 8), ("c", 1), ("d", 1)], "d"),  # one too many
        ([("a", 4), ("b", 8), ("c", 0), None], "c"),  # finished too early
        ([("a", 4), None], "b"),
        ([None], "a"),
    ],
)
def test_tensors_that_are_not_as_announced(tmp_path: Path, chunks: list, named: str) -> None:
    with (
        pytest.raises(OutlierError, match=f"^{named}: "),
        ShardedWriter(tmp_path, SPECS, 12) as writer,
    ):
        for chunk in chunks:
            if chunk is None:
                writer.finish()
            else:
                writer.write(chunk[0], bytes(chunk[1]))


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"theirs")
    with pytest.raises(FileExistsError), ShardedWriter(tmp_path, SPECS) as writer:
        writer.write("a", bytes(4))
    assert (tmp_path / "model-00001-of-00001.safetensors").read_bytes() == b"theirs"


def test_leaving_early_closes_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardedWriter(tmp_path, SPECS) as writer:
        writer.write("a", bytes(4))
        raise KeyboardInterrupt
    assert writer._file is None


def test_a_tensor_ref_is_small() -> None:
    """Overlays have thousands: a reference holds no data, whatever its shape says."""
    tensor = TensorRef("x", Path("x"), "F32", (2**40, 2**10), 0)
    assert tensor.nbytes == 2**52
