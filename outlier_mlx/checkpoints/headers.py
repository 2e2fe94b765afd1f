"""The headers of a model, in a folder or on the hub: enough to open any overlay, base or tier."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from outlier_mlx.checkpoints import monolith, packed
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage import gguf
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.hub import Source, cached, local_source
from outlier_mlx.storage.remote import RemoteFile, find_commit, mirror, mirrors
from outlier_mlx.storage.safetensors import TensorRef, header_bytes
from outlier_mlx.storage.wide_reads import WideReads
from outlier_mlx.terminal import Progress, no_progress

# What opening a model reads.
_FILES = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "*alpha.json"),
    *("alpha_overlay.pt", "packed_experts/*", "*expert*.gguf", "rotation_metadata.json"),
)

AnyTensor = TypeVar("AnyTensor", TensorRef, GgufTensor)


@dataclass(frozen=True)
class Headers:
    """A model's headers.

    Attributes:
        source: the model, in a folder that can be opened.
        files: the file on the hub for each file here that is only a header.
    """

    source: Source
    files: dict[Path, RemoteFile] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        """Whether data has to come from the hub."""
        return any(file.cached() is None for file in self.files.values())

    def readable(self, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
        """Tensors of the model whose data can be read, too: from the hub, or its local cache."""
        reads = WideReads()
        cached = {path: file.cached() for path, file in self.files.items()}

        def readable(tensor: AnyTensor) -> AnyTensor:
            remote = self.files.get(tensor.file)
            if remote is None:
                return tensor
            if (here := cached[tensor.file]) is not None:
                return replace(tensor, file=here)
            stop = tensor.offset + tensor.nbytes
            return replace(tensor, fetch=reads.within(remote.read, tensor.offset, stop))

        return {name: readable(tensor) for name, tensor in tensors.items()}


def head_bytes(name: str, begin: bytes) -> int:
    """Bytes from the beginning of a file of tensors that are read when a checkpoint is opened.

    Args:
        name: its name, which may have folders in it.
        begin: its first bytes. If these are too few to tell, the result asks for more of them.
    """
    if name.endswith(".safetensors"):
        return header_bytes(begin)
    if name.endswith(".gguf"):
        return gguf.head_bytes(begin)
    if name == f"{packed.FOLDER}/{packed.MONOLITH}":
        return monolith.head_bytes(begin)
    return 0


@contextmanager
def headers(
    path_or_repo: str | Path,
    revision: str | None = None,
    progress: Progress = no_progress,
    besides: Sequence[str] = (),
) -> Iterator[Headers]:
    """A model in a folder, as it is; one on the hub as a folder of headers, while the block runs.

    If the hub cannot be reached, the local cache is used where it has the whole repository.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        revision: branch, tag or commit on the hub.
        progress: called with how many files on the hub have been asked for, and how many will be.
        besides: further files, by name or pattern, that are fetched whole.

    Raises:
        CheckpointError: neither a folder nor the name of a repository. Errors of the block
            name the repository in place of the folder.
        OutlierError: the hub cannot be reached or refuses.
    """
    local = local_source(path_or_repo, revision)
    if local is not None:
        yield Headers(local)
        return
    repo = str(path_or_repo)
    with mirrors() as work:
        yield _from_hub(repo, revision, work, progress, besides)


def _from_hub(
    repo: str,
    revision: str | None,
    work: Path,
    progress: Progress,
    besides: Sequence[str],
) -> Headers:
    folder = work / "model" / repo
    try:
        commit = find_commit(repo, revision)
        patterns = (*_FILES, *besides)
        files = mirror(
            repo, commit, folder, head_bytes, patterns=patterns, small=0, progress=progress
        )
        return Headers(Source(folder, repo, commit), files)
    except CheckpointError:
        raise
    except OutlierError:
        snapshot = cached(repo, revision)
        if snapshot is None:
            raise
        folder = work / "cached" / repo  # by its name rather than its commit's
        folder.parent.mkdir(parents=True)
        folder.symlink_to(snapshot)
        return Headers(Source(folder, repo, snapshot.name))
