"""JSON schemas that answers are constrained to: which of them, and in which form.

Every keyword of a schema either is enforced, or cannot make an answer wrong (annotations, which are
left out of the checked form), or is refused by name. Sizes are bounded before anything is compiled,
and a schema whose shortest value is endless or very long is refused: no answer would ever end.
"""

import json
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from outlier_mlx.errors import OutlierError, did_you_mean

#: Bounds of a schema: characters of its JSON text, schemas in schemas, schemas and values in all.
MAX_LENGTH = 200_000
MAX_DEPTH = 48
MAX_NODES = 5_000
#: Levels of a schema and of all schemas that references name, added up. llguidance follows them by
#: recursion, up to 8 KB a level on a stack of some MB; beyond that, the process would end.
MAX_LEVELS = 400
#: Properties of one object; llguidance's limit for alternatives is a few hundred.
MAX_PROPERTIES = 300
MAX_VALUES = 20_000
#: Characters of the shortest value.
MAX_SHORTEST = 100_000
# llguidance computes with float64, which has no other whole numbers exactly.
_EXACT = 1 << 53

# Keywords by what they hold: a schema, a list of schemas, schemas by name, or values.
_ONE = {"items", "additionalProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_COUNTS = {"minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"}
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_PLAIN = {"$ref", "const", "enum", "type", "required", "pattern", "format"} | _NUMBERS | _COUNTS
# They say nothing about which values are valid.
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly"),
    *("writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
}
_DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06")


class SchemaError(OutlierError):
    """A schema that is wrong, or that answers cannot be constrained to."""


def checked_schema(schema: Any) -> dict[str, Any] | bool:
    """The part of a JSON schema that decides which values are valid.

    Args:
        schema: a JSON value: an object, or true for any value.

    Returns:
        The schema without annotations, of enforced keywords only. Its values are shared.

    Raises:
        SchemaError: names the keyword, with its place, that is wrong or not supported; or the
            schema is too large, or its shortest value is endless.
    """
    if not isinstance(schema, dict):
        if schema is True:
            return True
        raise SchemaError("the schema must be an object")
    try:
        length = len(json.dumps(schema, allow_nan=False))
    except (ValueError, RecursionError):
        raise SchemaError("the schema is nested too deeply, or has a number that is none") from None
    if length > MAX_LENGTH:
        raise SchemaError(f"the schema has {length} characters; at most {MAX_LENGTH} are supported")
    draft = str(schema.get("$schema", _DRAFTS[0]))
    if not any(name in draft for name in _DRAFTS):
        raise SchemaError(f"$schema {draft[:80]!r} is not supported; use draft 2020-12")
    root = {name: value for name, value in schema.items() if name not in ("$schema", "$id")}
    clean = _Checker().schema(root, "#", 0)
    assert isinstance(clean, dict)
    _check_levels(clean)
    shortest = _shortest(clean)
    if math.isinf(shortest):
        raise SchemaError("no value of the schema ever ends: each must contain another of its kind")
    if shortest > MAX_SHORTEST:
        raise SchemaError(
            f"the shortest value of the schema has {shortest:.0f} characters;"
            f" at most {MAX_SHORTEST} are supported"
        )
    return clean


class _Checker:
    """Checks the schemas in one schema, and counts them."""

    def __init__(self) -> None:
        self._nodes = 0
        self._values = 0

    def schema(self, schema: Any, place: str, depth: int) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{place} must be a schema: an object, true or false")
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise SchemaError(f"the schema has more than {MAX_NODES} schemas in it")
        if depth > MAX_DEPTH:
            raise SchemaError(f"{place} is nested too deeply: more than {MAX_DEPTH} schemas")
        clean: dict[str, Any] = {}
        for name, value in schema.items():
            if name in _ANNOTATIONS or name.startswith("x-"):
                continue
            if name == "uniqueItems" and value is False:
                continue
            clean[name] = self._keyword(name, value, f"{place}/{name}", depth)
        # llguidance does not keep other names from being written twice, which count once.
        if clean.get("minProperties", 0) > len(clean.get("required", ())) + 1:
            text = "more than one property beyond the required ones is not supported"
            raise SchemaError(f"{place}/minProperties: {text}")
        return clean

    def _keyword(self, name: str, value: Any, place: str, depth: int) -> Any:
        if name in _ONE:
            return self.schema(value, place, depth + 1)
        if name in _LISTS:
            if not isinstance(value, list) or not value:
                raise SchemaError(f"{place} must be a list of schemas")
            parts = enumerate(value)
            return [self.schema(each, f"{place}/{n}", depth + 1) for n, each in parts]
        if name in _MAPS:
            if not isinstance(value, dict):
                raise SchemaError(f"{place} must be an object of schemas")
            if name == "properties" and len(value) > MAX_PROPERTIES:
                raise SchemaError(
                    f"{place} are {len(value)}; at most {MAX_PROPERTIES} are supported"
                )
            named = value.items()
            return {key: self.schema(each, f"{place}/{key}", depth + 1) for key, each in named}
        if name not in _PLAIN:
            raise SchemaError(f"{place}: the keyword {name[:40]!r} is not supported")
        self._check_plain(name, value, place)
        return value

    def _check_plain(self, name: str, value: Any, place: str) -> None:
        if name in _COUNTS and not (type(value) is int and value >= 0):
            raise SchemaError(f"{place} must be a whole number from 0")
        if name in _NUMBERS and type(value) not in (int, float):
            raise SchemaError(f"{place} must be a number")
        if name in ("$ref", "pattern", "format") and not isinstance(value, str):
            raise SchemaError(f"{place} must be a string")
        if name == "$ref" and not (value == "#" or value.startswith("#/")):
            raise SchemaError(
                f"{place}: {value[:80]!r} is not in the schema; only #/… is supported"
            )
        if name == "type" and not (isinstance(value, str) or _are_texts(value)):
            raise SchemaError(f"{place} must be a string, or a list of strings")
        for kind in ([value] if isinstance(value, str) else value) if name == "type" else ():
            if kind not in _TYPES:
                hint = did_you_mean(kind, _TYPES)
                raise SchemaError(f"{place}: there is no type {kind[:40]!r}{hint}")
        if name == "required" and not _are_texts(value):
            raise SchemaError(f"{place} must be a list of strings")
        if name == "enum" and not isinstance(value, list):
            raise SchemaError(f"{place} must be a list")
        if name in ("enum", "const", *_NUMBERS):
            self._check_value(value, place, 0)

    def _check_value(self, value: Any, place: str, depth: int) -> None:
        self._values += 1
        if depth > MAX_DEPTH:
            raise SchemaError(f"{place} is nested too deeply: more than {MAX_DEPTH} values")
        if self._values > MAX_VALUES:
            raise SchemaError(f"the schema has more than {MAX_VALUES} values in it")
        if isinstance(value, int | float) and abs(value) > _EXACT:
            raise SchemaError(f"{place}: numbers beyond 2^53 are not supported")
        inner = value.values() if isinstance(value, dict) else value
        for each in inner if isinstance(value, dict | list) else ():
            self._check_value(each, place, depth + 1)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _check_levels(root: dict[str, Any]) -> None:
    """Bound the levels that there are if references are followed in any order, each once."""
    named = {node["$ref"]: _target(root, node["$ref"]) for node in _nodes(root) if "$ref" in node}
    targets = {id(target): target for target in named.values()}
    levels = _levels(root) + sum(map(_levels, targets.values()))
    if levels > MAX_LEVELS:
        raise SchemaError(
            f"the schema and those that it refers to have {levels} levels, added up;"
            f" at most {MAX_LEVELS} are supported"
        )


def _levels(node: Any) -> int:
    """Schemas in schemas, without what references name."""
    if not isinstance(node, dict):
        return 0
    # Named schemas are read where they are referred to.
    parts = _parts({name: v for name, v in node.items() if name not in ("$defs", "definitions")})
    return 1 + max(map(_levels, parts), default=0)


def _shortest(root: dict[str, Any]) -> float:
    """Characters of a short value of a schema; infinite if all are endless.

    Nodes are visited until no more of them get a finite length, each once it depends on one that
    has.

    Raises:
        SchemaError: a reference leads nowhere.
    """
    needs: dict[int, list[dict[str, Any]]] = {}
    nodes = list(_nodes(root))
    targets = {id(node): _target(root, node["$ref"]) for node in nodes if "$ref" in node}
    for node in nodes:
        for part in [*_parts(node), targets.get(id(node))]:
            if isinstance(part, dict):
                needs.setdefault(id(part), []).append(node)
    lengths: dict[int, float] = {}

    def of(schema: Any) -> float:
        if isinstance(schema, bool):
            return 1 if schema else math.inf
        return lengths.get(id(schema), math.inf)

    waiting = deque(reversed(nodes))
    while waiting:
        node = waiting.popleft()
        if id(node) in lengths:
            continue
        length = max(_own_length(node, of), of(targets.get(id(node), True)))
        if not math.isinf(length):
            lengths[id(node)] = length
            waiting.extend(needs.get(id(node), ()))
    return of(root)


def _own_length(node: dict[str, Any], of: Any) -> float:
    """Characters of a short value of a node, whose parts' lengths are given by `of`."""
    least = [1.0]
    for name in ("anyOf", "oneOf"):
        if name in node:
            least.append(min(map(of, node[name])))
    least += map(of, node.get("allOf", ()))
    if "const" in node:
        least.append(len(json.dumps(node["const"])))
    if "enum" in node:
        least.append(min((len(json.dumps(value)) for value in node["enum"]), default=math.inf))
    kinds = node.get("type", ["null", "object", "array", "string"])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    by_kind = {"object": _object_length, "array": _array_length, "string": _string_length}
    least.append(min((by_kind[k](node, of) if k in by_kind else 1 for k in kinds), default=1))
    return max(least)


def _object_length(node: dict[str, Any], of: Any) -> float:
    properties = node.get("properties", {})
    # A pattern of names can give a property another schema; here it is any.
    others = True if node.get("patternProperties") else node.get("additionalProperties", True)
    required = node.get("required", ())
    known = [len(str(key)) + 4 + of(properties.get(key, others)) for key in required]
    more = max(0, node.get("minProperties", 0) - len(known))
    return 2 + sum(known) + (more * 5 if more else 0)


def _array_length(node: dict[str, Any], of: Any) -> float:
    count, first = node.get("minItems", 0), node.get("prefixItems", [])
    more = max(0, count - len(first))
    rest = more * (1 + of(node.get("items", True))) if more else 0
    return float(2 + sum(1 + of(part) for part in first[:count]) + rest)


def _string_length(node: dict[str, Any], of: Any) -> float:
    return float(2 + node.get("minLength", 0))


def _nodes(root: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it."""
    if isinstance(root, dict):
        yield root
        for part in _parts(root):
            yield from _nodes(part)


def _parts(node: dict[str, Any]) -> Iterator[Any]:
    """The schemas right in a schema."""
    for name, value in node.items():
        if name in _ONE:
            yield value
        elif name in _LISTS:
            yield from value
        elif name in _MAPS:
            yield from value.values()


def _target(root: dict[str, Any], ref: str) -> Any:
    """The schema that a reference names."""
    found: Any = root
    for part in ref.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isascii() and name.isdigit() and len(name) < 9:
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None:
            raise SchemaError(f"$ref {ref[:80]!r} leads nowhere")
    if not isinstance(found, dict | bool):
        raise SchemaError(f"$ref {ref[:80]!r} is no schema")
    return found
