"""Manifests: the list of a folder's files with their checksums, written and checked."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import outlier_mlx
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.output import is_part, write_json
from outlier_mlx.storage.paths import files_below, inside
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import is_legal
from outlier_mlx.writing.licences import CARD
from outlier_mlx.writing.writer import WrittenFile

# Large enough that hashing lets other threads run, small enough for a smooth bar.
_BLOCK = 4 << 20
#: Manifests of the folders that this project writes, tiers and all others, and their version.
FORMAT_VERSIONS = {"tier.json": 2, "checksums.json": 1}
#: Measurements of a tier, which are added to it later.
MEASUREMENTS = "measured.json"
# Files that systems add: macOS, KDE, and networks for files that are still open.
_OF_SYSTEMS = re.compile(r"\._.+|\.DS_Store|\.localized|\.directory|\.nfs\w+|\.fuse_hidden\w+")
# Names of files that mlx-lm or transformers read from a model's folder, in small letters.
_LOADED = (
    *("*.safetensors", "*.index.json", "*config*.json", "*.jinja", "chat_template*"),
    *("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges*"),
    *("*.model", "*.tiktoken", "*.spm", "bpe.codes", "tekken.json"),
    *("*vocab*.json", "*vocab*.txt", "normalizer.json", "word_*.json"),
)
_CODE = (".py", ".pyw", ".pyc", ".pyo", ".pyd", ".so", ".dylib", ".dll")


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        name: its file.
        content: all of it.
        files: SHA-256 and size of each listed file.
    """

    name: str
    content: dict
    files: Mapping[str, tuple[str, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of the listed files."""
        return sum(size for _, size in self.files.values())

    def check_version(self, *, replacing: bool = False) -> None:
        """Check that it is of the version that this version of the project writes.

        Args:
            replacing: the folder is only to be replaced, so earlier versions will do.

        Raises:
            CheckpointError: it is not.
        """
        version, expected = self.content.get("format_version"), FORMAT_VERSIONS[self.name]
        oldest = 1 if replacing else expected
        if type(version) is int and oldest <= version <= expected:
            return
        if self.name == "tier.json" and version == 1:
            raise CheckpointError(
                f"{self.name}: format_version 1 was made by outlier-mlx 0.1: convert the overlay"
                " again"
            )
        raise CheckpointError(f"{self.name}: format_version {version!r}, expected {expected}")


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder that this project wrote; None if it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    name = next((name for name in FORMAT_VERSIONS if (folder / name).exists()), None)
    return None if name is None else read_manifest(folder, name)


def read_manifest(folder: Path, name: str) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: it has no list of files, or neither config.json nor a GGUF file is on it.
    """
    content = read_json(inside(folder, name))
    files = content.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{name}: no list of files")
    listed = {}
    for file, entry in files.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or type(size) is not int:
            raise CheckpointError(f"{name}: {file}: sha256 and bytes were expected")
        listed[file] = (digest, size)
    if "config.json" not in listed and not any(file.endswith(".gguf") for file in listed):
        raise CheckpointError(f"{name}: does not list config.json")
    return Manifest(name, content, listed)


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files in a folder that neither this project nor the system wrote, sorted.

    Besides what the manifest lists, this project writes the manifest, licences and the card,
    measurements, and parts of files if it is killed meanwhile; Python writes bytecode of a listed
    module, and systems add hidden files.
    """
    known = {manifest.name, CARD, MEASUREMENTS, *manifest.files}
    names = [path.relative_to(folder).as_posix() for path in files_below(folder, hidden=True)]
    return [
        name
        for name in names
        if name not in known
        and not is_legal(name)
        and not is_part(PurePath(name).name)
        and not _OF_SYSTEMS.fullmatch(PurePath(name).name)
        and not _is_bytecode(name, manifest)
    ]


def _is_bytecode(name: str, manifest: Manifest) -> bool:
    place, _, file = name.rpartition("/")
    return place == "__pycache__" and f"{file.partition('.')[0]}.py" in manifest.files


def is_loaded(name: str) -> bool:
    """Whether mlx-lm, transformers or Python may load a file of a model's folder.

    Code counts wherever it is below the folder; so do templates.
    """
    name = name.lower()
    if is_code(name) or name.endswith(".jinja"):
        return True
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _LOADED)


def is_code(name: str) -> bool:
    """Whether Python could run or import a file."""
    return PurePath(name.lower()).suffix in _CODE


def check_files(folder: Path, manifest: Manifest, progress: Progress = no_progress) -> None:
    """Check that every listed file is unchanged, and that no other file would be loaded.

    Args:
        folder: where the files are.
        manifest: the manifest of that folder.
        progress: called with bytes hashed so far, and in all.

    Raises:
        CheckpointError: names the first file that is not as it should be.
    """
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and is_loaded(name):
            if path.suffix.lower() in (".pyc", ".pyo"):
                raise CheckpointError(
                    f"{name}: compiled code, which Python would run in place of its text; delete it"
                    " (it is left behind by programs that run a model's own code)"
                )
            raise CheckpointError(f"{name}: not listed in {manifest.name}")
    _check_sums(folder, manifest, progress)


def _check_sums(folder: Path, manifest: Manifest, progress: Progress) -> None:
    done, lock = 0, threading.Lock()
    stop = threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, manifest.nbytes)

    def check(name: str) -> None:
        digest, size = manifest.files[name]
        path = inside(folder, name)
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{name}: {found} bytes, expected {size}")
        if _sha256(path, advance, stop) != digest and not stop.is_set():
            raise CheckpointError(f"{name}: damaged: its SHA-256 is not the one in {manifest.name}")

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            for future in [pool.submit(check, name) for name in manifest.files]:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _sha256(path: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (block := file.read(_BLOCK)):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def write_manifest(
    folder: Path, name: str, content: dict, known: Sequence[WrittenFile] = ()
) -> None:
    """Write the manifest of a folder, after all other files.

    Files that do not change results (licences, the card) are not listed.

    Args:
        folder: the folder.
        name: the manifest's file.
        content: its fields besides the list of files.
        known: files whose checksums were taken while they were written.
    """
    files = {file.name: {"sha256": file.sha256, "bytes": file.nbytes} for file in known}
    for path in files_below(folder):
        file = path.relative_to(folder).as_posix()
        if file not in {*files, name, CARD} and not is_legal(file):
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            files[file] = {"sha256": digest, "bytes": path.stat().st_size}
    written = {
        "producer": f"outlier-mlx {outlier_mlx.__version__}",
        "format_version": FORMAT_VERSIONS[name],
    }
    write_json(folder / name, written | content | {"files": dict(sorted(files.items()))})
