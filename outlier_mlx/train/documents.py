"""The texts to train on: files and folders of plain text and of JSONL, as lists of tokens."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.engine.bounded import TemplateError
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import CheckpointWarning, OutlierError, listed
from outlier_mlx.storage.paths import files_below
from outlier_mlx.storage.texts import decode_json, read_utf8
from outlier_mlx.terminal import quiet_transformers, size

JSONL = ".jsonl"
#: How the names of files end that are read in a folder.
SUFFIXES = (".txt", ".md", JSONL)
#: Bytes of a file; all of it is in memory while it is read.
MAX_BYTES = 1_000_000_000
# Characters that are tokenized at a time.
_PIECE = 1_000_000
_FORMATS = '"text", "messages", or "prompt" and "completion"'


@dataclass(frozen=True)
class TextFile:
    """A file to read, and what cards and messages call it: no path of this machine."""

    path: Path
    name: str

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for two names of one file."""
        found = self.path.stat()
        return found.st_dev, found.st_ino


def find_files(given: Path, tell: Callable[[str], None]) -> list[TextFile]:
    """The files that a path stands for: itself, or those of a folder that end as `SUFFIXES`.

    Args:
        given: a file of any name, or a folder; hidden files in it are never read.
        tell: called with a line about files that are left out.

    Raises:
        OutlierError: there are none, or one is no file, is too large, or cannot be looked at.
    """
    try:
        files = _in_folder(given, tell) if given.is_dir() else [TextFile(given, given.name)]
        for file in files:
            if not file.path.exists():
                raise OutlierError(f"{file.path}: no such file or folder")
            if not file.path.is_file():
                raise OutlierError(f"{file.path}: not a file")
            if (nbytes := file.path.stat().st_size) > MAX_BYTES:
                raise OutlierError(f"{file.path}: {size(nbytes)}, at most {size(MAX_BYTES)} a file")
    except OSError as error:
        raise OutlierError(f"{error.filename or given}: {error.strerror}") from None
    return files


def _in_folder(folder: Path, tell: Callable[[str], None]) -> list[TextFile]:
    found = files_below(folder)
    texts = [path for path in found if path.suffix.lower() in SUFFIXES]
    ends = listed(SUFFIXES, last="or")
    if not texts:
        raise OutlierError(f"{folder}: no file in it ends in {ends}")
    if others := [path.name for path in found if path not in set(texts)]:
        tell(f"{folder}: left out, as they do not end in {ends}: {listed(others, 3)}")
    name = folder.resolve().name
    return [TextFile(path, f"{name}/{path.relative_to(folder).as_posix()}") for path in texts]


def read_documents(
    file: TextFile, tokenizer: Tokenizer, vocab: int | None = None
) -> Iterator[np.ndarray]:
    """The documents of a file as tokens, each (length,) int32: all of a text, or a line of JSONL.

    A text begins with what the tokenizer puts before every text; where it puts nothing there, the
    text is followed by the tokenizer's end token. A conversation is as the chat template writes it.

    Args:
        file: ends in .jsonl, or is plain text.
        tokenizer: the base's.
        vocab: rows of the base's embedding.

    Raises:
        OutlierError: it cannot be read, is not UTF-8, is binary, has a line that is no object of
            one of mlx-lm's formats, or has a token that the embedding has no row for.
    """
    text = read_utf8(file.path).removeprefix("\ufeff")
    if "\0" in text:
        raise OutlierError(f"{file.path}: not a text: it holds NUL characters")
    if file.path.suffix.lower() == JSONL:
        tokenized = _lines(text, str(file.path), tokenizer)
    else:
        tokenized = iter([_encode(tokenizer, text)])
    for tokens in tokenized:
        if vocab is not None and max(tokens, default=0) >= vocab:
            raise OutlierError(
                f"{file.path}: the tokenizer gives token {max(tokens)}, but the base's embedding"
                f" has {vocab} rows"
            )
        if tokens:
            yield np.array(tokens, np.int32)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text with what separates it from others; none if there is only that."""
    if not text.strip():
        return []
    tokens: list[int] = []
    start = 0
    with quiet_transformers():
        while start < len(text):
            stop = len(text)
            if stop - start > _PIECE:
                stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
            tokens += tokenizer.encode(text[start:stop], add_special_tokens=start == 0)
            start = stop
        begun = tokenizer.encode("a")[:1] != tokenizer.encode("a", add_special_tokens=False)[:1]
    end = tokenizer.eos_token_id
    return tokens if begun or end is None else [*tokens, end]


def _lines(text: str, place: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The documents of JSONL; empty lines are ignored."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = decode_json(line)
        except ValueError as error:
            raise OutlierError(f"{place}: line {number}: not valid JSON ({error})") from None
        try:
            if not isinstance(value, dict):
                raise ValueError("a JSON object was expected")
            yield _line(value, tokenizer)
        except (TemplateError, ValueError) as error:
            raise OutlierError(f"{place}: line {number}: {error}") from None


def _line(value: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The tokens of one object in a format of mlx-lm; ValueError if it is in none."""
    if "prompt" in value and "completion" in value:
        prompt, completion = _text(value, "prompt"), _text(value, "completion")
        if not tokenizer.has_chat_template:
            return _encode(tokenizer, prompt + completion)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        return _chat(messages, value, tokenizer)
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError('"messages": a list of messages was expected')
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise ValueError('"messages": a message is an object with "role" and "content"')
        if not tokenizer.has_chat_template:
            raise ValueError('"messages" need a chat template, and the base has none')
        return _chat(messages, value, tokenizer)
    if "text" in value:
        return _encode(tokenizer, _text(value, "text"))
    keys = listed((f'"{key}"' for key in value), 3)
    raise ValueError(f"expected {_FORMATS}, as mlx-lm has them; found {keys}")


def _text(value: dict[str, Any], name: str) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f'"{name}": a text was expected')
    return text


def _chat(messages: list[dict], value: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    with quiet_transformers():
        return tokenizer.apply_chat_template(messages, tools=value.get("tools"))


def tell_by_warning(text: str) -> None:
    """Tell of text that is left out, as a warning."""
    warnings.warn(text, CheckpointWarning, stacklevel=2)
