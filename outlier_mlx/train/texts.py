"""What is trained on: windows of tokens for each domain, and some that are held out.

Windows matter by their number as long as they differ, so copies are left out. Nothing that is held
out is trained on, not even in another domain.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np

from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.train.documents import TextFile, find_files, read_documents, tell_by_warning

#: The name of the text that the base shall not forget, among those of the domains.
KEEP = "keep"
#: Windows that are held out of a corpus, at most, if nothing else is asked: more make judging slow.
MOST_HELD_OUT = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
# Documents are held out whole if that makes the share at most so many times what was asked.
_TOO_MUCH = 1.5


@dataclass(frozen=True)
class Corpus:
    """The text of a domain, as windows whose tokens but the first are predicted.

    Attributes:
        name: the domain's.
        train: (windows, window + 1) int32; no two are equal, nor equal to one held out.
        held_out: (windows, window + 1) int32; at least two, of texts that were read.
        files: names of the files, without paths of this machine.
        documents: how many documents were read; copies are not counted.
        copies: documents and windows that were left out, as they were copies of others.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    files: tuple[str, ...] = ()
    documents: int = 0
    copies: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in an epoch of training."""
        return self.train.shape[0] * (self.train.shape[1] - 1)

    @property
    def deciding(self) -> np.ndarray:
        """The first half of the held-out windows: whether a stage is kept, and with what alphas."""
        return self.held_out[: -(-len(self.held_out) // 2)]

    @property
    def reported(self) -> np.ndarray:
        """The other half: nothing is chosen by them, so figures on them flatter nobody."""
        return self.held_out[-max(1, len(self.held_out) // 2) :]


@dataclass(frozen=True)
class Corpora:
    """All text of a training.

    Attributes:
        domains: what the experts shall learn.
        keep: what the base shall not forget.
    """

    domains: tuple[Corpus, ...]
    keep: Corpus

    def __iter__(self) -> Iterator[Corpus]:
        return iter((*self.domains, self.keep))


def read_corpora(
    domains: Sequence[tuple[str, Path]],
    keep: Path,
    tokenizer: Tokenizer,
    *,
    window: int,
    held_out: float = 0.1,
    most_held_out: int = MOST_HELD_OUT,
    seed: int = 0,
    vocab: int | None = None,
    progress: Progress = no_progress,
) -> Corpora:
    """Read the texts of all domains, cut them into windows, and hold some out.

    Whole documents are held out, chosen by the seed; where these would be too much or too little,
    as of a single long text, a part from the middle of the longest one.

    Args:
        domains: name, and file or folder, of each; see `documents.read_documents`.
        keep: file or folder of text like what the base was trained on.
        tokenizer: the base's.
        window: tokens that are predicted in a window.
        held_out: share of each corpus that is held out.
        most_held_out: windows that are held out of a corpus, at most (a little more, where whole
            documents are).
        seed: of the choice.
        vocab: rows of the base's embedding.
        progress: called with bytes of files read so far, and in all.

    Raises:
        OutlierError: a name is not plain or appears twice, so does a file; a text cannot be read,
            or has not a window to train on and two to hold out.
    """
    check_names([name for name, _ in domains])
    places = dict(domains) | {KEEP: keep}
    files = {name: find_files(place, tell_by_warning) for name, place in places.items()}
    _check_different(files)
    total = sum(file.path.stat().st_size for of in files.values() for file in of)
    done = 0
    seen: set[bytes] = set()
    found: list[Corpus] = []
    for name, of in files.items():
        documents: list[np.ndarray] = []
        for file in of:
            documents += read_documents(file, tokenizer, vocab)
            done += file.path.stat().st_size
            progress(done, total)
        where = f"{name} ({places[name]})"
        share = held_out, most_held_out
        found.append(_corpus(where, name, documents, seen, window, share, seed, of))
    *of_domains, kept = without_held_out(found, window)
    return Corpora(tuple(of_domains), kept)


def check_names(names: Sequence[str]) -> None:
    """Check the names of domains, which stand in files, tables and cards.

    Raises:
        OutlierError: there is none, one appears twice, is `KEEP`, or has other characters than
            letters, digits, - and _.
    """
    if not names:
        raise OutlierError("no domain is given: name one with --domain NAME=PATH")
    for at, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise OutlierError(
                f"the domain {name[:60]!r}: a name has 1 to 40 of the characters A-Z, a-z, 0-9, -"
                " and _, and begins with a letter or digit"
            )
        if name.lower() == KEEP:
            raise OutlierError(f"the domain {name!r}: this name is that of the text of --keep")
        if name in names[:at]:
            raise OutlierError(f"the domain {name!r} is given twice; a folder may hold many files")


def _check_different(files: dict[str, list[TextFile]]) -> None:
    owners: dict[tuple[int, int], str] = {}
    for name, of in files.items():
        for file in of:
            if (first := owners.get(file.identity)) is not None:
                where = f"twice for {name}" if first == name else f"for {first} and for {name}"
                raise OutlierError(f"{file.path}: is given {where}")
            owners[file.identity] = name


def _corpus(
    where: str,
    name: str,
    documents: list[np.ndarray],
    seen: set[bytes],
    window: int,
    held_out: tuple[float, int],
    seed: int,
    files: list[TextFile],
) -> Corpus:
    """The windows of one corpus; `seen` has digests of all documents before, and gets these."""
    if not documents:
        raise OutlierError(f"{where}: no text in it")
    fresh = [d for d in documents if _is_new(d, seen)]
    copies = len(documents) - len(fresh)
    if copies:
        tell_by_warning(
            f"{where}: {copies} of {len(documents)} texts are copies of others: left out"
        )
    total = sum(map(len, fresh))
    if total < 3 * window + 2:
        raise OutlierError(
            f"{where}: {total} tokens are too few for a window of {window} to train on and two to"
            " hold out: give more text, or a smaller --window"
        )
    share, windows = held_out
    most = total - window - 1
    wanted = min(max(ceil(share * total), 2 * window + 1), windows * window + 1, most)
    train, held = hold_out(fresh, wanted, min(int(_TOO_MUCH * wanted), most), seed)
    names = tuple(file.name for file in files)
    return Corpus(name, cut(train, window), cut(held, window), names, len(fresh), copies)


def _is_new(tokens: np.ndarray, seen: set[bytes]) -> bool:
    """Whether no array before had the same values; `seen` gets its digest."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
    new = digest not in seen
    seen.add(digest)
    return new


def hold_out(
    documents: list[np.ndarray], wanted: int, most: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divide documents into those to train on, and those that are held out.

    Args:
        documents: each (length,).
        wanted: tokens to hold out, at least; fewer than there are.
        most: tokens to hold out, at most.
        seed: of the order in which they are considered.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    held: list[np.ndarray] = []
    train = list(documents)
    missing = wanted
    for number in order:
        if missing > 0 and len(documents[number]) <= missing + most - wanted:
            held.append(documents[number])
            missing -= len(documents[number])
            train[number] = documents[number][:0]
    while missing > 0:
        longest = max(range(len(train)), key=lambda n: len(train[n]))
        document = train[longest]
        start = max(0, (len(document) - missing) // 2)
        held.append(document[start : start + missing])
        train[longest] = document[:start]
        train.append(document[start + missing :])
        missing -= len(held[-1])
    return [document for document in train if len(document)], held


def cut(documents: list[np.ndarray], window: int) -> np.ndarray:
    """Windows (n, window + 1) int32 of documents in a row; the rest at the end is left out.

    The last token of a window is the first of the next one: each is predicted once.
    """
    tokens = np.concatenate([np.zeros(0, np.int32), *documents])
    if len(tokens) <= window:
        return np.zeros((0, window + 1), np.int32)
    views = np.lib.stride_tricks.sliding_window_view(tokens, window + 1)
    return np.ascontiguousarray(views[::window])


def without_held_out(found: list[Corpus], window: int) -> list[Corpus]:
    """The corpora without windows that appear twice, or are held out and trained on anywhere.

    Raises:
        OutlierError: a corpus has no window left to train on, or no two that are held out.
    """
    seen: set[bytes] = set()
    held = [corpus.held_out[[_is_new(row, seen) for row in corpus.held_out]] for corpus in found]
    result = []
    for corpus, kept in zip(found, held, strict=True):
        own = set(seen)
        train = corpus.train[[_is_new(row, own) for row in corpus.train]]
        copies = len(corpus.train) + len(corpus.held_out) - len(train) - len(kept)
        if copies:
            tell_by_warning(f"{corpus.name}: {copies} windows are copies of others: left out")
        if not len(train) or len(kept) < 2:
            raise OutlierError(
                f"{corpus.name}: there is not a window of {window} tokens to train on and two"
                " others to hold out: give more text that differs, or a smaller --window"
            )
        copies += corpus.copies
        result.append(replace(corpus, train=train, held_out=kept, copies=copies))
    return result
