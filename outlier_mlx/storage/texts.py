"""Text, JSON and YAML of files and requests, read in one strict way: nothing else parses them.

What readers understand differently is refused: other encodings than UTF-8, a key that appears
twice, NaN and infinity, numbers that only become infinity when they are read (1e999), half a
surrogate pair, and values that are nested deeper than a walk through them can follow.
"""

import json
import math
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from outlier_mlx.errors import CheckpointError, OutlierError

MAX_JSON_BYTES = 100_000_000
MAX_YAML_BYTES = 1_000_000
#: How many lists and objects may be within each other. Tool definitions and tokenizers have a
#: dozen; a few hundred are too many for Python's recursive functions, as json.dumps.
MAX_DEPTH = 100
# No number beyond those of float64, which has 309 digits before the point.
_MAX_BITS = 1023
_MAX_DIGITS = 310
# Keys of one mapping of YAML: with `<<`, a few lines can stand for millions.
_MAX_KEYS = 1000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: Path) -> bytes:
    """A small file's bytes.

    Raises:
        CheckpointError: it cannot be read, or has more than `MAX_JSON_BYTES`.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {found.st_size} bytes, expected a small file")
        if stat.S_ISREG(found.st_mode):
            return path.read_bytes()
        with path.open("rb") as file:  # a pipe or device may have no end
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_JSON_BYTES} bytes, expected a small file")
    return data


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        OutlierError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OutlierError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OutlierError(f"{path}: not UTF-8 text: byte {error.start} is no part of it") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds no JSON object.
    """
    return parse_json_object(read_bytes(path), path.name)


def parse_json_object(text: str | bytes, place: str) -> dict:
    """Parse a JSON object; see `parse_json`."""
    value = parse_json(text, place)
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: a JSON object was expected")
    return value


def parse_json(text: str | bytes, place: str) -> Any:
    """Parse JSON; `place` names the file in messages.

    Raises:
        CheckpointError: see `decode_json`.
    """
    try:
        return decode_json(text)
    except ValueError as error:
        raise CheckpointError(f"{place}: not valid JSON ({error})") from None


def decode_json(text: str | bytes) -> Any:
    """Parse JSON, as strictly as the module says.

    Raises:
        ValueError: it is none; the message says where, or what is refused.
    """
    if isinstance(text, bytes):
        text = text.decode()  # given bytes, json would guess at other encodings
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except _TooLargeError as error:
        raise _name_number(text, error.number) from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_text(json.dumps(value, ensure_ascii=False))
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_short(twice)} appears twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class _TooLargeError(ValueError):
    """A number that float64 has no room for, as it is spelled."""

    def __init__(self, number: str) -> None:
        self.number = number


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS or (value := int(text)).bit_length() > _MAX_BITS:
        raise _TooLargeError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _TooLargeError(text)
    return value


def _name_number(text: str, number: str) -> json.JSONDecodeError:
    """The error for a number that is too large, with the key that it belongs to."""
    place = text.find(number)
    key = re.search(r'"([^"\\]{1,80})"\s*:\s*$', text[max(0, place - 100) : place])
    shown = number if len(number) <= 40 else f"{number[:12]}... of {len(number)} digits"
    said = f"{key[1] + ': ' if key else ''}the number {shown} is too large"
    return json.JSONDecodeError(said, text, place)


def _check_depth(value: object) -> None:
    """Refuse what is nested too deep, a level at a time: no recursion, whatever is in it."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} is half a surrogate pair, not a character") from None


def _short(text: str) -> str:
    """A text from a file, cut to 80 characters, as a message can show it."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


# PyYAML does not catch Python's own errors for values like "!!int ''" or "!!timestamp x".
_YAML_ERRORS = (
    *(yaml.YAMLError, ValueError, RecursionError),
    *(AttributeError, LookupError, TypeError, ArithmeticError),
)


class _StrictLoader(yaml.SafeLoader):
    """Loads plain values only, as strictly as the module says."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node unless it is nested too deep."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping, and check it for duplicate keys."""
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        name, times = max(names.items(), key=lambda item: item[1], default=("", 0))
        if times > 1:
            raise _at(node, f"duplicate key {_short(str(name))}")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the keys of `<<` into a mapping, up to a limit."""
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise _at(node, f"more than {_MAX_KEYS} keys")

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number that float64 has room for."""
        value: int = super().construct_yaml_int(node) if len(node.value) <= 2 * _MAX_BITS else 0
        if len(node.value) > 2 * _MAX_BITS or value.bit_length() > _MAX_BITS:
            raise _at(node, f"the number {node.value[:12]}... is too large")
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A finite number."""
        value: float = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise _at(node, f"{node.value[:40]} is not a finite number")
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Text without halves of surrogate pairs, which escapes can spell."""
        value: str = super().construct_yaml_str(node)
        _check_text(value)
        return value


for _kind in ("int", "float", "str"):
    _StrictLoader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_StrictLoader, f"construct_yaml_{_kind}")
    )


def _at(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: Path) -> Any:
    """The value of a small YAML file of plain values.

    Raises:
        OutlierError: the file cannot be read, is too large, or is not valid.
    """
    data = read_bytes(path)
    if len(data) > MAX_YAML_BYTES:
        raise OutlierError(f"{path.name}: larger than {MAX_YAML_BYTES} bytes")
    return parse_yaml(data, path.name)


def parse_yaml(text: str | bytes, place: str) -> Any:
    """Parse YAML of plain values; `place` names the file in messages.

    Raises:
        CheckpointError: not valid, or not as strict as the module says.
    """
    try:
        return yaml.load(_decoded(text), Loader=_StrictLoader)
    except _YAML_ERRORS as error:
        raise _not_yaml(error, place) from None


def compose_yaml(text: str | bytes, place: str) -> yaml.Node | None:
    """The nodes of YAML with any tags, none of which is looked at; None for an empty file.

    Raises:
        CheckpointError: see `parse_yaml`.
    """
    try:
        return yaml.compose(_decoded(text), Loader=_StrictLoader)
    except _YAML_ERRORS as error:
        raise _not_yaml(error, place) from None


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def _not_yaml(error: Exception, place: str) -> CheckpointError:
    told = str(error).replace('in "<unicode string>", line', "at line")
    reason = " ".join(told.split())[:300] or type(error).__name__
    return CheckpointError(f"{place}: not valid YAML: {reason}")
