"""Prompts and texts as tokens, in batches that are padded on the right."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import load_tokenizer, quiet_transformers
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_utf8

#: Tokens of a text that are seen together, and that are used of an expert's texts at most.
WINDOW = 256
MAX_TOKENS = 4096
MAX_TEXT_BYTES = 10_000_000
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Sequences:
    """Token sequences with the expert that each belongs to.

    Attributes:
        ids: tokens of each.
        owners: number of an expert for each.
    """

    ids: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]

    def __add__(self, other: "Sequences") -> "Sequences":
        return Sequences(self.ids + other.ids, self.owners + other.owners)


@dataclass(frozen=True)
class Batch:
    """Sequences of about the same length, padded on the right, where causal attention never looks.

    Attributes:
        members: numbers of the sequences.
        tokens: (batch, length) int32.
        lengths: (batch,), true tokens of each.
    """

    members: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def true(self) -> np.ndarray:
        """(batch, length) bool: what is no padding."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


def batches(sequences: Iterable[Sequence[int]]) -> list[Batch]:
    """Put sequences into batches of some thousand tokens, short ones with short ones."""
    listed = list(sequences)
    order = sorted(range(len(listed)), key=lambda n: len(listed[n]))
    groups: list[list[int]] = []
    for number in order:
        # Sorted, so this one is the longest of its group yet.
        if not groups or (len(groups[-1]) + 1) * len(listed[number]) > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(number)
    return [_batch(group, listed) for group in groups]


def _batch(members: list[int], sequences: list[Sequence[int]]) -> Batch:
    lengths = np.array([len(sequences[n]) for n in members])
    tokens = np.zeros((len(members), int(lengths.max())), np.int32)
    for row, number in enumerate(members):
        tokens[row, : lengths[row]] = sequences[number]
    return Batch(np.array(members), tokens, lengths)


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    bos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A text's tokens."""


def open_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """The tokenizer of a model, as its tokenizer.json has it.

    For some families transformers 5 takes no more than the vocabulary from that file, and builds
    the rest as the family's first models had it.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    if not (folder / "tokenizer.json").exists():
        return load_tokenizer(folder, config)
    inside(folder, "tokenizer.json")
    from transformers import PreTrainedTokenizerFast

    try:
        with quiet_transformers():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: no usable tokenizer: {reason}") from error


class Tokens:
    """Cuts prompts into tokens as mergekit-moe does: raw text after BOS, no chat template.

    Args:
        tokenizer: the base's.
        vocab: rows of the embedding, which tokens must be below.
        longest: tokens that a prompt may have.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, longest: int) -> None:
        self._tokenizer, self._vocab, self._longest = tokenizer, vocab, longest
        self.bos: str = tokenizer.bos_token or ""

    def prompt(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens, BOS first if the tokenizer has one.

        Raises:
            OutlierError: there are none, too many, or some that the model does not have.
        """
        ids = self._encode(self.bos + text)
        shown = f"the prompt {text[:60]!r}"
        if not ids:
            raise OutlierError(f"{shown} tokenizes to nothing: the base's tokenizer has no BOS")
        if len(ids) > self._longest:
            raise OutlierError(
                f"{shown} has {len(ids)} tokens; the base takes {self._longest} at most"
            )
        return ids

    def windows(self, text: str) -> list[tuple[int, ...]]:
        """A text in windows of tokens, each after BOS."""
        start = self._encode(self.bos)
        ids = self._encode(text)[:MAX_TOKENS]
        step = min(WINDOW, self._longest - len(start))
        return [start + ids[at : at + step] for at in range(0, len(ids), step)]

    def file(self, path: Path) -> list[tuple[int, ...]]:
        """A file's text in windows, see `windows`.

        Raises:
            OutlierError: it is too large, no UTF-8, or empty.
        """
        try:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise OutlierError(f"{path.name}: larger than {MAX_TEXT_BYTES} bytes")
        except OSError as error:
            raise OutlierError(f"{path}: {error.strerror}") from None
        found = self.windows(read_utf8(path))
        if not found:
            raise OutlierError(f"{path.name}: no text in it")
        return found

    def _encode(self, text: str) -> tuple[int, ...]:
        with quiet_transformers():
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        above = next((i for i in ids if i >= self._vocab), None)
        if above is not None:
            raise OutlierError(
                f"the tokenizer gives token {above}, but the base's embedding has {self._vocab}"
                " rows"
            )
        return tuple(ids)


def flat(batch: Batch, values: mx.array) -> mx.array:
    """What belongs to true tokens: (batch, length, hidden) to (tokens, hidden)."""
    places = np.flatnonzero(batch.true.reshape(-1)).astype(np.uint32)
    return values.reshape(-1, values.shape[-1])[mx.array(places)]


def unflat(batch: Batch, rows: mx.array) -> mx.array:
    """The reverse of `flat`; zeros where there is padding."""
    places = np.flatnonzero(batch.true.reshape(-1)).astype(np.uint32)
    result = mx.zeros((batch.tokens.size, rows.shape[-1]), rows.dtype)
    result[mx.array(places)] = rows
    return result.reshape(*batch.tokens.shape, rows.shape[-1])
