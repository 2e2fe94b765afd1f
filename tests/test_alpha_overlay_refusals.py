"""Files of the kind alpha_overlay.pt that are refused; none runs code or fills the memory."""

from __future__ import annotations

import builtins
import io
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.checkpoints.alpha_overlay import read_alpha_overlay
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from tests.alpha_overlays import EXPERTS, LAYERS, NEW, OLD, f32, flat, read
from tests.form_builders import Pickle, torch_zip


def pickled(code: bytes, *storages: bytes) -> Pickle:
    """A pickle of just these instructions."""
    made = Pickle()
    made.code += code
    made.storages = list(storages)
    return made


def tensor(count: int = 3, size: int = 3, offset: int = 0, stride: int = 1, kind: str = "Float"):
    """A layer's tensor whose numbers may contradict each other."""

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    code = b"}" + number(1) + b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n"
    code += kind.encode() + b"Storage\nX\1\0\0\x000X\3\0\0\0cpu" + number(count) + b"tQ"
    code += number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89}tRs"
    return pickled(code, f32([1, 2, 3]).tobytes())


def zipped(compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("_", "/", 1).replace("__", "."), data)
    return buffer.getvalue()


def nested(depth: int) -> dict[str, Any]:
    """Dictionaries within dictionaries."""
    return {"a": nested(depth - 1)} if depth else {}


GOOD = Pickle().dump(NEW).code + b"."
# A dictionary that holds the one before it ten times, and so on: 10^9 values to walk.
SHARED = b"}q\0" + b"".join(
    b"}(" + b"".join(b"X\1\0\0\0%ch%c" % (97 + k, i) for k in range(10)) + b"uq%c" % (i + 1)
    for i in range(9)
)
REFUSED: dict[str, tuple[Any, str]] = {
    "no zip": (b"not a zip", "zip"),
    "a raw pickle": (pickle.dumps(NEW), "zip"),
    "empty": (b"", "zip"),
    "no data.pkl": (zipped(a_x=b""), "no data.pkl"),
    "two data.pkl": (zipped(a_data__pkl=GOOD, b_data__pkl=GOOD), "data.pkl"),
    "compressed": (zipped(zipfile.ZIP_DEFLATED, a_data__pkl=GOOD), "compressed"),
    "absurdly large": (bytes(4_000_001), "4000001 bytes"),
    "a layer out of range": ({5: [1.0, 2.0, 3.0]}, "layer 5"),
    "a negative layer": ({-1: [1.0, 2.0, 3.0]}, "layer -1"),
    "an expert out of range": ({1: {3: 1.0}}, "expert 3"),
    "a pair out of range": ({(1, -1): 1.0}, "expert -1"),
    "too many experts": ({1: [1.0, 2.0, 3.0, 4.0]}, "a list of 4"),
    "too few experts": ({1: f32([1, 2])}, "a list of 2"),
    "too few layers": ([[1.0, 2.0, 3.0]] * 4, "a list of 4"),
    "a matrix": ({1: f32([[1, 2, 3]])}, "shape (1, 3)"),
    "NaN": ({1: [1.0, float("nan"), 2.0]}, "alpha is nan"),
    "infinity": ({1: f32([1, np.inf, 2])}, "alpha is inf"),
    "infinity by rounding": ({1: np.asarray([1, 1e300, 2])}, "alpha is 1e+300, too large"),
    "a boolean": ({1: [1.0, True, 2.0]}, "True"),
    "two values": ({1: [1.0, 2.0, 3.0], "layer_1": [1.0, 2.0, 4.0]}, "two values"),
    "two wrappers": ({"alphas": NEW, "trained": NEW}, "'alphas' and 'trained'"),
    "nothing in it": ({}, "no alphas recognised"),
    "nothing known in it": ({"state": "x", "names": ["a"]}, "'state' and 'names'"),
    "only originals": ({"originals": OLD}, "'originals'"),
    "a string": ("x", "no alphas recognised"),
    "NaN among the originals": (
        {1: NEW[1], "originals": {1: [1.0, 2.0, float("nan")]}},
        "originals",
    ),
    "nested too deep": (nested(14), "too deep"),
    "a storage that is short": (tensor(count=4), "shorter"),
    "a tensor beyond its storage": (tensor(size=4), "shorter than its tensor"),
    "an offset beyond": (tensor(offset=1), "shorter than its tensor"),
    "strides beyond": (tensor(stride=2), "shorter than its tensor"),
    "a negative offset": (tensor(offset=-1), "without a storage"),
    "a negative size": (tensor(size=-1), "list of sizes"),
    "a negative stride": (tensor(stride=-1), "list of sizes"),
    "a large stride": (tensor(stride=2**31 - 1), "shorter than its tensor"),
    "a negative count": (tensor(count=-1), "shorter"),
    "integers": (tensor(kind="Int"), "torch IntStorage"),
    "a storage that is missing": (
        pickled(b"}J\1\0\0\0" + tensor().code[8:].replace(b"\x000X", b"\x009X")),
        "'9' is missing",
    ),
    "os.system": (pickled(b"cos\nsystem\nX\2\0\0\0id\x85R"), "os system"),
    "eval": (pickled(b"cbuiltins\neval\nX\1\0\0\x001\x85R"), "builtins eval"),
    "a name on the stack": (
        pickled(b"X\2\0\0\0osX\6\0\0\0system\x93)R"),
        "os system",
    ),
    "a longer name": (pickled(b"ctorch._utils\n_rebuild_tensor_v2.x\n)R"), "_v2.x"),
    "a name of another module": (pickled(b"cx.collections\nOrderedDict\n)R"), "x.collections"),
    "INST": (pickled(b"(ios\nsystem\n"), "INST"),
    "OBJ": (pickled(b"(cos\nsystem\no"), "os system"),
    "NEWOBJ": (pickled(b"ccollections\nOrderedDict\n)\x81"), "NEWOBJ"),
    "EXT1": (pickled(b"\x82\1"), "EXT1"),
    "calling a string": (pickled(b"X\1\0\0\0x)R"), "not a name"),
    "calling with a list": (pickled(b"ccollections\nOrderedDict\n]R"), "not a name"),
    "OrderedDict of something": (
        pickled(b"ccollections\nOrderedDict\n]\x85R"),
        "malformed",
    ),
    "a tensor of nothing": (pickled(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR"), "storage"),
    "a parameter of nothing": (pickled(b"ctorch._utils\n_rebuild_parameter\nNNN\x87R"), "tensor"),
    "attributes of a name": (pickled(b"ctorch._utils\n_rebuild_tensor_v2\n}b"), "attributes"),
    "a key of tuples": (pickled(b"}(NNt(NNt\x86Ns"), "a key"),
    "a list for a key": (pickled(b"}]Ns"), "a key"),
    "items without values": (pickled(b"}(Nu"), "malformed"),
    "appending to a number": (pickled(b"NNa"), "malformed"),
    "a mark for a value": (pickled(b"}N(s"), "malformed"),
    "an empty stack": (pickled(b"\x85"), "malformed"),
    "no such memory": (pickled(b"h\5"), "damaged"),
    "a far memory": (pickled(b"Nr\xff\xff\xff\x7f"), "no alphas recognised"),
    "an integer of 70 bits": (pickled(b"\x8a\x09" + 9 * b"\x7f"), "64"),
    "an integer of 600 digits": (pickled(b"\x8a\xff" + 255 * b"\x7f"), "64"),
    "an integer of 1000 digits": (
        pickled(b"\x8b" + struct.pack("<i", 400) + 400 * b"\x7f"),
        "LONG4",
    ),
    "bytes as long as memory": (pickled(b"\x96" + 8 * b"\x7f"), "BYTEARRAY8"),
    "a frame as long as memory": (pickled(b"\x95" + 8 * b"\x7f"), "damaged"),
    "a text longer than memory": (pickled(b"\x8d" + 8 * b"\x7f"), "damaged"),
    "a memo as long as memory": (pickled(b"Nr\xff\xff\xff\xff"), "no alphas recognised"),
    "items of a tensor": (
        pickled(tensor().code[6:-1] + b"J\0\0\0\0J\0\0\0\0s", bytes(12)),
        "malformed",
    ),
    "a key of tuples, 200,000 deep": (pickled(b"})" + 200_000 * b"\x85" + b"Ns"), "a key"),
    "a key of tuples, each twice in the next": (
        pickled(b"})" + 60 * b"q\0h\0\x86" + b"Ns"),
        "a key",
    ),
    "attributes of a function": (
        pickled(b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\0\0\0__code__Ns\x86b"),
        "attributes",
    ),
    "a storage called": (pickled(b"ctorch\nFloatStorage\n)R"), "not a name"),
    "a reference to a number": (pickled(b"NQ"), "malformed"),
    "a reference to a dtype by its code": (
        pickled(b"(X\7\0\0\0storageX\1\0\0\0OX\1\0\0\x000X\3\0\0\0cpuJ\1\0\0\0tQ", bytes(8)),
        "not to a storage",
    ),
    "a text as long as memory": (pickled(b"X\xff\xff\xff\xff"), "damaged"),
    "an unknown instruction": (pickled(b"\xff"), "damaged"),
    "no end": (zipped(a_data__pkl=GOOD[:-1]), "damaged"),
    "a list within itself": (pickled(b"]q\0h\0a"), "list"),
    "a dictionary within itself": (pickled(b"}q\0J\1\0\0\0h\0s"), "nested too deep"),
    "dictionaries that share dictionaries": (pickled(SHARED), "more values than alphas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one line, at once, in little memory, and with nothing looked up or run."""
    value, said = REFUSED[case]
    path = tmp_path / "alpha_overlay.pt"
    path.write_bytes(value if isinstance(value, bytes) else torch_zip(_made(value)))
    monkeypatch.setattr(builtins, "eval", lambda *_: pytest.fail("eval was called"))
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("os.system was called"))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        read_alpha_overlay(path, LAYERS, EXPERTS)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    message = str(error.value)
    assert message.startswith("alpha_overlay.pt: ") and said in message, message
    assert "\n" not in message and len(message) < 400


def _made(value: Any) -> Pickle:
    return value if isinstance(value, Pickle) else Pickle().dump(value)


def test_pickles_of_python_run_nothing(tmp_path: Path):
    """The classic attack, as Python's own pickler writes it in every protocol."""
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    for protocol in range(6):
        code = pickle.dumps({"alphas": NEW, "x": Attack()}, protocol)
        for attack in (pickled(code[2:-1]), pickled(code[:-1])):
            with pytest.raises(CheckpointError):
                read(tmp_path / "x.pt", attack)
    assert not ran.exists()


def test_what_is_read_again_and_again_is_bounded(tmp_path: Path):
    """A small file may ask for a storage ten thousand times; the sum of it is what counts."""
    made = Pickle().dump({1: f32(np.zeros(100_000))})
    call = made.code[made.code.index(b"ctorch._utils") : -1]
    made.code = b"\x80\x02](" + 1000 * call + b"e"
    with pytest.raises(CheckpointError, match="more than 1000000 elements"):
        read(tmp_path / "x.pt", made)


def test_a_number_of_nothing_only_warns(tmp_path: Path):
    with pytest.warns(CheckpointWarning, match="the number 0.5 belongs to no layer"):
        found = read(tmp_path / "x.pt", {**NEW, "learning_rate": 0.5})
    assert found.alphas == flat(NEW)


def test_no_such_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_alpha_overlay(tmp_path / "x.pt", LAYERS, EXPERTS)
