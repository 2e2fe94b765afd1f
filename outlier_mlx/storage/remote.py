"""A repository on the hub as a folder of headers, whose data is fetched a file at a time.

Small files are there whole. A file of tensors is there as a sparse file: as long as the real one,
with its header, so that it can be opened like any other; its data is a hole. `forget` removes the
holes before anybody could read them, and `fetch` brings one real file.

Addresses, login, retries and transfer are huggingface_hub's.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.hub import CHECKPOINT_FILES
from outlier_mlx.storage.hub_errors import hub_errors
from outlier_mlx.storage.paths import HIDDEN, files_below, require_plain
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.terminal import Progress, no_progress

#: Files up to this size are fetched whole with the headers: it takes one request either way.
SMALL_BYTES = 100_000
_DATA = (".safetensors", ".bin", ".gguf")
_THREADS = 8

#: How many bytes of a file, by its name, must be read to open it, given its first ones.
HeadBytes = Callable[[str, bytes], int]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of tensors on the hub.

    Attributes:
        repo: its repository.
        commit: the commit that it is of.
        name: its name in the repository.
        nbytes: its size in bytes.
        sha256: its checksum, where the hub has it: for files in LFS or Xet.
    """

    repo: str
    commit: str
    name: str
    nbytes: int
    sha256: str | None

    @property
    def _where(self) -> tuple[str, dict[str, str]]:
        """Its address, and the headers for a request."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, self.name, revision=self.commit)
        return url, build_hf_headers() | {"Accept-Encoding": "identity"}

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, or to the file's end, by a range request.

        Raises:
            OutlierError: the hub cannot be reached, refuses, or sends something else.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        url, headers = self._where
        stop = min(stop, self.nbytes)
        headers["Range"] = f"bytes={start}-{stop - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            hub_errors(self.repo),
            http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            # Without ranges, the whole file would follow: none of it is read then.
            content = response.read() if response.status_code == 206 else None
        if content is None or len(content) != stop - start:
            hint = "; download the model, and name its folder" if content is None else ""
            raise OutlierError(
                f"{self.repo}: {self.name}: the hub did not send the requested range{hint}"
            )
        return content

    def cached(self) -> Path | None:
        """Where it is in the hub's cache on this machine, if it is."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, place: Path, advance: Advance) -> Path:
        """The whole file, from the hub's cache or fetched; a download that was begun is resumed.

        Args:
            place: a folder for this file alone.
            advance: called with the bytes of each block that is here.

        Returns:
            Where it is: in `place`, if it is not in the cache.

        Raises:
            OutlierError: the hub cannot be reached, or refuses, or what was fetched does not have
                the checksum that the hub tells; it is deleted then.
        """
        from huggingface_hub import constants

        if (cached := self.cached()) is not None:
            return cached
        place.mkdir(parents=True, exist_ok=True)
        with hub_errors(self.repo):
            large = self.nbytes > constants.MAX_HTTP_DOWNLOAD_SIZE
            path = (self._fetch_by_xet if large else self._fetch_by_http)(place, advance)
        if self.sha256 is not None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256:
                path.unlink()
                raise OutlierError(
                    f"{self.repo}: {self.name}: damaged on the way: its SHA-256 is not the one"
                    " that the hub has; it will be fetched again next time"
                )
        return path

    def _fetch_by_http(self, place: Path, advance: Advance) -> Path:
        # hf_hub_download would not resume.
        from outlier_mlx.upstream import http_get

        url, headers = self._where
        path = place / "data"
        begun = path.stat().st_size if path.exists() else 0
        if begun > self.nbytes or self.sha256 is None:  # not to be trusted
            path.unlink(missing_ok=True)
            begun = 0
        advance(begun)
        with path.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=begun,
                headers=headers,
                expected_size=self.nbytes,
                tqdm_class=_counter(advance),
            )
        return path

    def _fetch_by_xet(self, place: Path, advance: Advance) -> Path:
        from huggingface_hub import hf_hub_download

        # Otherwise it may keep a cache of up to 10 GB.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        # Those of a run that was killed are never used again.
        for rest in files_below(place, "*.incomplete", hidden=True):
            rest.unlink()
        found = hf_hub_download(
            self.repo,
            self.name,
            revision=self.commit,
            local_dir=place,
            tqdm_class=_counter(advance),
        )
        return Path(found)


def find_commit(repo: str, revision: str | None) -> str:
    """The commit that a branch or tag means now.

    Raises:
        OutlierError: no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo):
        commit = HfApi().repo_info(repo, revision=revision).sha
    if commit is None:
        raise OutlierError(f"{repo}: the hub names no commit")
    return commit


@contextmanager
def mirrors() -> Iterator[Path]:
    """A temporary folder for mirrors: each goes to a folder NAME/OWNER/REPO in it.

    Raises:
        OutlierError: an error of the block, with the repository named in place of the folder,
            which is gone by then.
    """
    with TemporaryDirectory(prefix="outlier-mlx-") as work:
        try:
            yield Path(work)
        except OutlierError as error:
            text = re.sub(rf"{re.escape(work)}/\w+/", "", str(error))
            if text == str(error):
                raise
            raise type(error)(text) from error


def mirror(
    repo: str,
    commit: str,
    folder: Path,
    head_bytes: HeadBytes,
    *,
    patterns: Iterable[str] = CHECKPOINT_FILES,
    small: int | None = None,
    progress: Progress = no_progress,
) -> dict[Path, RemoteFile]:
    """Make a folder that can be opened like the repository, from little more than headers.

    Args:
        repo: the repository.
        commit: which of its commits.
        folder: a folder to be made.
        head_bytes: how much of a file's beginning must be there.
        patterns: names of the files to mirror.
        small: bytes up to which a file of tensors is fetched whole; by default `SMALL_BYTES`.
        progress: called with how many files are there, and how many will be.

    Returns:
        What stands behind each sparse file.

    Raises:
        OutlierError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, RepoFile, hf_hub_download
    from huggingface_hub.utils import filter_repo_objects

    with hub_errors(repo):
        tree = list(HfApi().list_repo_tree(repo, recursive=True, revision=commit))
    listed = {file.path: file for file in tree if isinstance(file, RepoFile)}
    limit = SMALL_BYTES if small is None else small
    whole, sparse = [], {}
    chosen = filter_repo_objects(
        listed, allow_patterns=list(patterns), ignore_patterns=list(HIDDEN)
    )
    for name in chosen:
        require_plain(name, repo)
        file = listed[name]
        if name.endswith(_DATA) and file.size > limit:
            sha256 = file.lfs.sha256 if file.lfs else None
            sparse[folder / name] = RemoteFile(repo, commit, name, file.size, sha256)
        else:
            whole.append(name)
    folder.mkdir(parents=True)

    def fetch(name: str) -> None:
        with hub_errors(repo):
            hf_hub_download(
                repo, name, revision=commit, local_dir=folder, tqdm_class=_counter(lambda _: None)
            )

    calls: list[Callable[[], None]] = [partial(fetch, name) for name in whole]
    calls += [partial(_sparse, path, file, head_bytes) for path, file in sparse.items()]
    _all(calls, progress)
    return sparse


def fill(tensors: Iterable[TensorRef], files: dict[Path, RemoteFile]) -> None:
    """Fetch the data of small tensors into their sparse files; larger tensors are skipped.

    No more than `SMALL_BYTES` are fetched for one: enough for 10,000 alphas in float64.
    """

    def fill_one(tensor: TensorRef) -> None:
        data = files[tensor.file].read(tensor.offset, tensor.offset + tensor.nbytes)
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(data)

    lacking = [t for t in tensors if t.file in files and 0 < t.nbytes <= SMALL_BYTES]
    _all([partial(fill_one, tensor) for tensor in lacking])


def forget(files: Iterable[Path]) -> None:
    """Remove the sparse files: reading one is an error from now on."""
    for path in files:
        path.unlink()


def _sparse(path: Path, file: RemoteFile, head_bytes: HeadBytes) -> None:
    head = b""
    while (length := min(head_bytes(file.name, head), file.nbytes)) > len(head):
        head += file.read(len(head), max(length, SMALL_BYTES))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as target:
        target.write(head[:length])
        target.truncate(file.nbytes)


def _all(calls: list[Callable[[], None]], progress: Progress = no_progress) -> None:
    """Make all calls, several at a time; after an error no further call begins."""
    pool = ThreadPoolExecutor(max_workers=_THREADS)
    try:
        for done, future in enumerate(as_completed([pool.submit(call) for call in calls]), 1):
            future.result()
            progress(done, len(calls))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _counter(advance: Advance) -> type:
    """A progress bar for huggingface_hub that shows nothing and passes on the numbers of bytes.

    Transfers from Xet report twice: what the network brought, which is compressed, and what was
    written to the file. The second is counted.
    """

    class Counter:
        def __init__(self, *_: object, **__: object) -> None:
            self.n, self.total = 0, None

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def ignore(self, *_: object, **__: object) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = ignore
        set_description_str = set_description = refresh = close = ignore

    return Counter
