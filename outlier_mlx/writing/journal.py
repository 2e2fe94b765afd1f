"""A journal of what a long run has finished, so that a later run can resume from there."""

import json
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.storage.output import flush, write_whole
from outlier_mlx.storage.texts import decode_json
from outlier_mlx.writing.runs import JOURNAL


class Journal:
    """The files that a run has finished: a JSON object per line; the first identifies the run.

    Args:
        folder: the folder that is kept, see `outlier_mlx.writing.folders.kept_folder`.
        identity: everything that the results depend on, as JSON (without tuples).

    Raises:
        OutputExistsError: the folder has the journal of a run with another identity.
        OutlierError: its journal is damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._path = folder / JOURNAL
        self.done: dict[str, dict[str, str]] = {}
        lines = _read(self._path)
        if not lines:
            write_whole(self._path, _line(identity))
            return
        if lines[0] != identity:
            other = next((name for name in identity if lines[0].get(name) != identity[name]), "?")
            raise OutputExistsError(
                f"{folder}: holds an unfinished run with other settings ({other}): repeat its"
                " command to resume it; --force, or deleting that folder, discards it"
            )
        self.done = {line["done"]: line["found"] for line in lines[1:]}
        # A line that was cut off is removed.
        text = b"".join(_line(line) for line in lines)
        if self._path.read_bytes() != text:
            write_whole(self._path, text)

    def add(self, name: str, found: dict[str, str]) -> None:
        """Record that file `name` is done, and the fingerprints `found` in it by tensor."""
        with self._path.open("ab") as file:
            file.write(_line({"done": name, "found": found}))
            file.flush()
            flush(file.fileno())
        self.done[name] = found


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run whose journal is in a folder; None if there is no journal."""
    lines = _read(folder / JOURNAL)
    return lines[0] if lines else None


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; the last one may be incomplete."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        lines = [decode_json(x) for x in text.splitlines(keepends=True) if x.endswith(b"\n")]
    except ValueError:
        lines = [None]
    if all(isinstance(line, dict) for line in lines) and all(map(_is_record, lines[1:])):
        return lines
    raise OutlierError(f"{path}: not a journal; delete its folder to start again")


def _is_record(line: dict[str, Any]) -> bool:
    return isinstance(line.get("done"), str) and isinstance(line.get("found"), dict)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
