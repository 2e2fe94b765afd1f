"""The work folder of a training: stages that are done, and the one that was interrupted.

A finished stage leaves a file with the arrays that it changed; the running one a file with all that
its next step depends on. Both are safetensors, whose metadata holds a record in JSON, and both
appear whole or not at all. Nothing in them is trusted: names, shapes and dtypes are compared with
what is expected before anything is read, and all of it with a digest, so that a damaged file never
goes into a result.
"""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError, OutlierError, listed
from outlier_mlx.storage.output import is_part, whole_file, write_json
from outlier_mlx.storage.paths import entries
from outlier_mlx.storage.safetensors import TensorRef, read_described
from outlier_mlx.storage.texts import parse_json_object, read_json
from outlier_mlx.train.log import FILE
from outlier_mlx.train.settings import option
from outlier_mlx.writing.interrupts import undivided
from outlier_mlx.writing.runs import lock

#: Changes whenever the same settings would give other numbers.
VERSION = 1
_IDENTITY = "training.json"
_RUNNING = "running.safetensors"
_RECORD, _DIGEST = "record", "digest"
# What differs in these is told without the values, which are digests.
_DIGESTS = ("base", "data", "teacher")
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "I32": mx.int32, "U8": mx.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Arrays = dict[str, mx.array]
#: Arrays, and a record of JSON values.
State = tuple[Arrays, dict[str, Any]]
#: What a field of a record has to fulfil, by its name.
Fields = Mapping[str, Callable[[Any], bool]]


def is_count(value: object) -> bool:
    """Whether a value of a record is a whole number of 0 or more."""
    return type(value) is int and value >= 0


def is_figure(value: object) -> bool:
    """Whether a value of a record is a number, and finite."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def are_figures(value: object) -> bool:
    """Whether a value of a record has figures by name."""
    return isinstance(value, dict) and all(map(is_figure, value.values()))


class Work:
    """A work folder, locked until `close`; use it as a context manager.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open or make a work folder.

        Args:
            folder: the folder. What is in it counts from the first stage that is done, or begun.
            identity: everything that decides the result, as JSON values by name.

        Raises:
            OutlierError: it holds another training, and the message names what differs; or another
                process trains in it.
            CheckpointError: its files are damaged.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            self._open({"version": VERSION, **identity})
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: dict[str, Any]) -> None:
        if not lock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise OutlierError(f"{self.folder}: another training runs in it")
        path = self.folder / _IDENTITY
        if not path.exists() and entries(self.folder):
            raise OutlierError(
                f"{self.folder}: holds other files; name an empty folder for the work"
            )
        if begun := self.begun(self.folder):
            self._compare(begun, wanted)
        else:
            (self.folder / FILE).unlink(missing_ok=True)
            write_json(path, wanted)
        for left in entries(self.folder, hidden=True):
            if is_part(left.name):  # of a file that a kill left half written
                left.unlink()

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._handle)

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, stage: str, like: Arrays, fields: Fields) -> State | None:
        """The arrays that a stage changed and its record; None if it is not done.

        Args:
            stage: its name.
            like: arrays of the names, dtypes and shapes that there have to be.
            fields: of the record.

        Raises:
            CheckpointError: the file is damaged, or has other arrays or fields.
        """
        if not self.is_finished(stage):
            return None
        file = _described(self._of_stage(stage))
        if file.record.get("stage") != stage:
            raise CheckpointError(f"{file.path}: not the stage {stage!r}")
        return file.checked({n: (_NAMES[a.dtype], a.shape) for n, a in like.items()}, fields)

    @staticmethod
    def begun(folder: Path) -> dict[str, Any]:
        """The identity of the training that a work folder holds; empty if nothing is done yet."""
        path = folder / _IDENTITY
        return read_json(path) if path.exists() and entries(folder, "*.safetensors") else {}

    def is_running(self, stage: str) -> bool:
        """Whether the state of an interrupted stage is there."""
        return self._running(stage) is not None

    def _running(self, stage: str) -> "_File | None":
        path = self.folder / _RUNNING
        file = _described(path) if path.exists() else None
        return None if file is None or file.record.get("stage") != stage else file

    def is_finished(self, stage: str) -> bool:
        """Whether the result of a stage is there."""
        return self._of_stage(stage).exists()

    def tensors(self, stage: str) -> dict[str, TensorRef]:
        """The arrays of a finished stage, to be read row by row.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = _described(self._of_stage(stage))
        file.read()
        return file.tensors

    def finish(self, stage: str, arrays: Arrays, record: Mapping[str, Any]) -> None:
        """Keep the result of a stage, and forget its running state."""
        _write(self._of_stage(stage), arrays, {**record, "stage": stage})
        (self.folder / _RUNNING).unlink(missing_ok=True)

    @contextmanager
    def saving(
        self, stage: str, state: Callable[[], State | None], every: float
    ) -> Iterator[Callable[[], None]]:
        """Keep the state of the running stage when anything ends the block early.

        Args:
            stage: its name, which goes into the record.
            state: gives its arrays and record; None if there is nothing to keep.
            every: seconds after which the state is kept in any case.

        Yields:
            A function to call after each step.
        """
        last = time.monotonic()

        def save() -> None:
            if (found := state()) is not None:
                _write(self.folder / _RUNNING, found[0], {**found[1], "stage": stage})

        def stepped() -> None:
            nonlocal last
            if time.monotonic() - last >= every:
                save()
                last = time.monotonic()

        try:
            yield stepped
        except BaseException:
            with undivided(), suppress(OSError):  # what ended it counts, such as a full disk
                save()
            raise

    def running(
        self, stage: str, expected: Mapping[str, tuple[int, ...]], fields: Fields
    ) -> State | None:
        """The state of an interrupted stage and its record; None if another one or none was.

        Args:
            stage: its name.
            expected: the shape of each array; all are float32.
            fields: of the record.

        Raises:
            CheckpointError: the file is damaged, or its arrays or fields are not the expected ones.
        """
        file = self._running(stage)
        if file is None:
            return None
        return file.checked({name: ("F32", shape) for name, shape in expected.items()}, fields)

    def _of_stage(self, stage: str) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in stage)
        return self.folder / f"stage-{name}.safetensors"

    def _compare(self, found: dict, wanted: dict) -> None:
        names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        if names:
            told = listed(_difference(n, found.get(n), wanted.get(n)) for n in names)
            raise OutlierError(
                f"{self.folder}: holds a training with {told}; name another work folder, or delete"
                " this one"
            )


def _difference(name: str, theirs: object, ours: object) -> str:
    if name in _DIGESTS and theirs is not None and ours is not None:
        return f"another {name}"
    shown = option(name)
    told = (_short(of, off=shown[2:].startswith("no-")) for of in (theirs, ours))
    return f"another {shown}: {', not '.join(told)}"


def _short(value: object, *, off: bool) -> str:
    """A value as a user knows it; `off`: the option turns it off."""
    if isinstance(value, bool):
        return "on" if value != off else "off"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(path: Path, arrays: Arrays, record: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        assert array.dtype in _NAMES, f"{name}: {array.dtype}"
    told = json.dumps(record, allow_nan=False)
    digest = _Digest(told)
    for name in sorted(arrays):
        digest.add(name, np.array(arrays[name], copy=False))
    with whole_file(path) as part:
        try:
            mx.save_safetensors(str(part), arrays, {_RECORD: told, _DIGEST: digest.text()})
        except RuntimeError:  # all that MLX says of a full disk
            raise OSError(errno.EIO, "cannot write: the disk may be full", str(path)) from None


class _Digest:
    """Of a record and of arrays, in the order of their names."""

    def __init__(self, record: str) -> None:
        self._digest = blake2b(record.encode(), digest_size=16)

    def add(self, name: str, array: np.ndarray) -> None:
        self._digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        self._digest.update(np.ascontiguousarray(array).data)

    def text(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class _File:
    """A file as its header describes it; `metadata` has the record as text, and the digest."""

    path: Path
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    record: dict[str, Any]

    def checked(self, expected: Mapping[str, tuple[str, tuple[int, ...]]], fields: Fields) -> State:
        """All arrays and the record, which have these names, dtypes, shapes and fields."""
        with _damaged(self.path):
            where = self.path.name
            found = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
            for name, (dtype, shape) in expected.items():
                if found.pop(name, None) != (dtype, tuple(shape)):
                    raise CheckpointError(f"{where}: {name}: expected {dtype} {tuple(shape)}")
            if found:
                raise CheckpointError(f"{where}: {next(iter(found))}: not a tensor of this stage")
            for name, is_valid in fields.items():
                if not is_valid(self.record.get(name)):
                    raise CheckpointError(f"{where}: its record has no valid {name!r}")
        return self.read(), self.record

    def read(self) -> Arrays:
        """All arrays, compared with the digest that was written with them."""
        with _damaged(self.path):
            digest = _Digest(self.metadata.get(_RECORD, ""))
            arrays = {}
            for name in sorted(self.tensors):
                found = self.tensors[name].read_finite()
                digest.add(name, found)
                arrays[name] = mx.array(found)
            if digest.text() != self.metadata.get(_DIGEST):
                raise CheckpointError(f"{self.path.name}: not what was written")
            return arrays


def _described(path: Path) -> _File:
    with _damaged(path):
        tensors, metadata = read_described(path)
        for tensor in tensors.values():
            if tensor.dtype not in _DTYPES:
                raise CheckpointError(f"{tensor.name}: {tensor.dtype}; not written by training")
        record = parse_json_object(metadata.get(_RECORD, "").encode(), path.name)
        return _File(path, tensors, metadata, record)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Say what to do about a file that cannot be read."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.parent}: {error}; without this file, what it holds is trained again"
        ) from None
