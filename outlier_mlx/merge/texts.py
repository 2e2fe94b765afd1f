"""Tokenize prompts and texts, and put them into batches that are padded on the right."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_utf8
from outlier_mlx.terminal import quiet_transformers

#: Tokens in one window of a text.
WINDOW = 256
#: Largest number of tokens that are used of one expert's texts.
MAX_TOKENS = 4096
MAX_TEXT_BYTES = 10_000_000
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Sequences:
    """Token sequences, each with the expert that it belongs to.

    Attributes:
        ids: the tokens of each sequence.
        owners: the expert's number for each sequence.
    """

    ids: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]

    def __add__(self, other: "Sequences") -> "Sequences":
        return Sequences(self.ids + other.ids, self.owners + other.owners)


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length, padded on the right; causal attention never sees the padding.

    Attributes:
        members: (batch,) numbers of the sequences.
        tokens: (batch, length) int32.
        lengths: (batch,) number of tokens of each sequence, without padding.
    """

    members: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def places(self) -> mx.array:
        """Indices of the tokens that are not padding, among all of `tokens`, uint32."""
        mask = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return mx.array(np.flatnonzero(mask).astype(np.uint32))


def batches(sequences: Iterable[Sequence[int]]) -> list[Batch]:
    """Group sequences of similar length into batches of about 4096 tokens."""
    listed = list(sequences)
    order = sorted(range(len(listed)), key=lambda n: len(listed[n]))
    groups: list[list[int]] = []
    for number in order:
        # The sequences are sorted, so this one is the longest of its group so far.
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
    """The parts of a transformers tokenizer that are used here."""

    bos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""


def open_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """Load a model's tokenizer exactly as its tokenizer.json describes it.

    For some families, transformers 5 takes only the vocabulary from that file, and builds the rest
    like the tokenizer of the family's first models.

    Raises:
        CheckpointError: the tokenizer is missing or cannot be loaded.
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
    """Tokenizes prompts like mergekit-moe: BOS, then raw text, without chat template.

    Args:
        tokenizer: the base's tokenizer.
        vocab: number of rows of the embedding; all tokens must be smaller.
        max_length: largest number of tokens in a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, max_length: int) -> None:
        self._tokenizer, self._vocab, self._max_length = tokenizer, vocab, max_length
        self.bos: str = tokenizer.bos_token or ""

    def prompt(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt, after BOS if the tokenizer has one.

        Raises:
            OutlierError: there are no tokens, too many, or one that is not in the embedding.
        """
        ids = self._encode(self.bos + text)
        shown = f"the prompt {text[:60]!r}"
        if not ids:
            raise OutlierError(f"{shown} has no tokens: the base's tokenizer has no BOS")
        if len(ids) > self._max_length:
            raise OutlierError(
                f"{shown} has {len(ids)} tokens; the base's limit is {self._max_length}"
            )
        return ids

    def file(self, path: Path) -> list[tuple[int, ...]]:
        """Cut the first `MAX_TOKENS` tokens of a file into windows; each begins with BOS.

        Raises:
            OutlierError: the file is too large, is not UTF-8, or is empty.
        """
        try:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise OutlierError(f"{path.name}: larger than {MAX_TEXT_BYTES} bytes")
        except OSError as error:
            raise OutlierError(f"{path}: {error.strerror}") from None
        start, ids = self._encode(self.bos), self._encode(read_utf8(path))[:MAX_TOKENS]
        if not ids:
            raise OutlierError(f"{path.name}: no text")
        step = min(WINDOW, self._max_length - len(start))
        return [start + ids[at : at + step] for at in range(0, len(ids), step)]

    def _encode(self, text: str) -> tuple[int, ...]:
        with quiet_transformers():
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        above = next((i for i in ids if i >= self._vocab), None)
        if above is not None:
            raise OutlierError(
                f"the tokenizer produced token {above}, but the base's embedding has"
                f" {self._vocab} rows"
            )
        return tuple(ids)


def unpad(batch: Batch, values: mx.array) -> mx.array:
    """Drop padding: (batch, length, hidden) to (tokens, hidden)."""
    return values.reshape(-1, values.shape[-1])[batch.places]


def pad(batch: Batch, rows: mx.array) -> mx.array:
    """The inverse of `unpad`: (tokens, hidden) to (batch, length, hidden), zero for padding."""
    result = mx.zeros((batch.tokens.size, rows.shape[-1]), rows.dtype)
    result[batch.places] = rows
    return result.reshape(*batch.tokens.shape, rows.shape[-1])
