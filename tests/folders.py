"""What is in a folder, and copies of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from outlier_mlx.writing.manifest import write_manifest


def write_ours(folder: Path, text: str = "") -> Path:
    """A folder such as this project writes, with `text` in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"text": text}))
    write_manifest(folder, "tier.json", {})
    return folder


def text_of(folder: Path) -> Any:
    """The text that `write_ours` was given."""
    return json.loads((folder / "config.json").read_text())["text"]


def names(folder: Path) -> list[str]:
    """Names of what is in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tier_contents(tier: Path) -> dict[str, Any]:
    """The files of a tier, but for what tells where it came from."""
    found: dict[str, Any] = contents(tier)
    manifest = json.loads(found.pop("tier.json"))
    del found["README.md"], manifest["overlay"], manifest["base"]
    return found | {"manifest": manifest}


def snapshot(folder: Path, *, times: bool = False) -> dict[str, str]:
    """Every file, link and folder below, with what it holds; `times` adds when it was written.

    Python's bytecode is left out: it appears where a program runs a tier's own code.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        elif not path.is_file():
            what = "folder" if path.is_dir() else "pipe"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
            what += f" {path.stat().st_mtime_ns}" if times else ""
        found[path.relative_to(folder).as_posix()] = what
    return found


def copy_writable(source: Path, target: Path) -> Path:
    """Copy a folder without its read-only modes, so that a test can change it."""
    for path in [source, *source.rglob("*")]:
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True)
        else:
            shutil.copyfile(path, copy)
    return target
