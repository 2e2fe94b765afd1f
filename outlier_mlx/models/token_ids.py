"""Token ids: those that a tokenizer's files give, and those that an embedding has rows for.

MLX does not check the index of a row: an id beyond the embedding reads other memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.fields import short
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_bytes, read_json

_JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"


def check_tokenizer(folder: Path, rows: int) -> None:
    """Check that an embedding has a row for every token of the tokenizer in a folder.

    Fewer tokens than rows are usual: rows are padded.

    Args:
        folder: where the tokenizer's files are; there need not be any.
        rows: rows of the embedding.

    Raises:
        CheckpointError: names the file and the token of the largest id, or a file that is damaged.
    """
    largest = max(_ids(folder), key=lambda found: found[2], default=None)
    if largest is not None and largest[2] >= rows:
        file, token, number = largest
        raise CheckpointError(
            f"{file}: the token {token[:40]!r} has id {number}, but the embedding has {rows} rows,"
            " numbered from 0"
        )


def end_ids(value: object, where: str) -> list[int]:
    """The tokens that end a text, as `eos_token_id` of a config states them.

    Args:
        value: the field's value; None if it is missing.
        where: name of the config in messages.

    Raises:
        CheckpointError: neither a token's id nor a list of ids.
    """
    found: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and number >= 0 for number in found):
        raise CheckpointError(
            f"{where}: eos_token_id is {short(value)}, expected the id of a token or a list of ids"
        )
    return found


def check_ids(ids: Iterable[int], rows: int | None, what: str = "the prompt") -> None:
    """Check that an embedding has a row for each of these tokens.

    Args:
        ids: the tokens.
        rows: rows of the embedding; None if not known, then nothing is checked.
        what: what consists of these tokens, in messages.

    Raises:
        OutlierError: names the first token without a row.
    """
    if rows is None:
        return
    outside = next((number for number in ids if not 0 <= number < rows), None)
    if outside is not None:
        raise OutlierError(
            f"{what} has the token {outside}, but the model's embedding has {rows} rows, numbered"
            " from 0"
        )


def _ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """File, token and id of what the files of a tokenizer number."""
    if (folder / _JSON).exists():
        found = _of_fast_tokenizer(read_json(inside(folder, _JSON)))
        yield from ((_JSON, token, number) for token, number in _numbers(found))
    else:
        yield from _of_vocabulary(folder)
    if (folder / "added_tokens.json").exists():
        added = read_json(inside(folder, "added_tokens.json"))
        yield from (("added_tokens.json", *found) for found in _numbers(added.items()))
    if (folder / _CONFIG).exists():
        decoder = read_json(inside(folder, _CONFIG)).get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            if number.isascii() and number.isdigit() and len(number) < 20:
                content = token.get("content") if isinstance(token, dict) else token
                yield _CONFIG, str(content), int(number)


def _of_vocabulary(folder: Path) -> Iterator[tuple[str, str, int]]:
    """The tokens of the files that slow tokenizers have."""
    if (folder / "vocab.json").exists():
        found = _numbers(read_json(inside(folder, "vocab.json")).items())
        yield from (("vocab.json", *each) for each in found)
    if (folder / "vocab.txt").exists():
        lines = read_bytes(inside(folder, "vocab.txt")).splitlines()
        if lines:
            yield "vocab.txt", lines[-1].decode(errors="replace"), len(lines) - 1


def _of_fast_tokenizer(content: dict) -> Iterator[tuple[object, object]]:
    """Tokens and ids of a tokenizer.json, also of those that are added to every text."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # BPE and WordPiece map tokens to ids; in Unigram's list, an id is a position.
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list) and vocabulary:
        yield vocabulary[-1], len(vocabulary) - 1
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")
    padding = content.get("padding")
    if isinstance(padding, dict):
        yield padding.get("pad_token"), padding.get("pad_id")
    yield from _of_processor(content.get("post_processor"))


def _of_processor(processor: object) -> Iterator[tuple[object, object]]:
    """Tokens that a post-processor puts around a text."""
    if not isinstance(processor, dict):
        return
    inner = processor.get("processors")
    for each in inner if isinstance(inner, list) else ():
        yield from _of_processor(each)
    special = processor.get("special_tokens")
    for name, token in special.items() if isinstance(special, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        yield from ((name, number) for number in (ids if isinstance(ids, list) else ()))
    for name in ("sep", "cls"):
        pair = processor.get(name)
        if isinstance(pair, list) and len(pair) == 2:
            yield pair[0], pair[1]


def _numbers(found: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, int]]:
    """Those that are numbered; what is no number, the tokenizer itself refuses."""
    return ((str(token), number) for token, number in found if type(number) is int)
