"""Fifty JSON schemas of many kinds, all of whose values are short."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 8}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}


def record(optional: dict[str, Any] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties | (optional or {}),
        "required": list(properties),
        "additionalProperties": False,
    }


def items(of: Any, most: int = 3, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, "maxItems": most} | more


SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "word": WORD,
    "least length": {"type": "string", "minLength": 5, "maxLength": 9},
    "no text": {"type": "string", "maxLength": 0},
    "enum": {"enum": ["red", "green", "blue"]},
    "mixed enum": {"enum": ["red", 1, 2.5, None, True, [1, 2], {"a": "b"}]},
    "marks in texts": {"enum": ['say "no"', "back\\slash", "line\nbreak", "ünïcode ✓ 漢"]},
    "const": {"const": {"kind": "fixed", "list": [1, "two", None]}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "open pattern": {"type": "string", "pattern": "[0-9]", "maxLength": 6},
    "either pattern": {"type": "string", "pattern": "^(cat|dog)s?( and (cat|dog)s?)?$"},
    "classes": {"type": "string", "pattern": r"^\d{1,3}(\.\d{1,2})? (kg|g)$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 30},
    "time": {"type": "string", "format": "time", "maxLength": 20},
    "email": {"type": "string", "format": "email", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "small": SMALL,
    "negative": {"type": "integer", "minimum": -50, "maximum": -3},
    "exclusive": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25, "multipleOf": 0.25},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    "record": record(name=WORD, age=SMALL, active={"type": "boolean"}),
    "optional": record(
        {"nick": WORD, "note": {"type": ["string", "null"], "maxLength": 5}}, id=SMALL
    ),
    "empty record": record(),
    "nested": record(a=record(b=record(c=record(d=SMALL)))),
    "list": items(SMALL),
    "list of two at least": items({"enum": ["x", "y"]}, 4, minItems=2),
    "list of records": items(record(key=WORD, value=SMALL), 2, minItems=1),
    "list of lists": items(items(SMALL, 2), 2, minItems=1),
    "tuple": {
        "type": "array",
        "prefixItems": [WORD, SMALL, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "tuple with rest": {
        "type": "array",
        "prefixItems": [{"const": "head"}],
        "items": SMALL,
        "minItems": 2,
        "maxItems": 4,
    },
    "union": {"anyOf": [SMALL, WORD, {"type": "null"}]},
    "one of kinds": {
        "oneOf": [
            record(kind={"const": "circle"}, radius=SMALL),
            record(kind={"const": "square"}, side=SMALL),
        ]
    },
    "types": {"type": ["integer", "boolean", "null"], "minimum": 1, "maximum": 3},
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 20}, {"multipleOf": 4}]},
    "all of records": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"properties": {"b": WORD}, "required": ["b"], "additionalProperties": False}
            | {"properties": {"a": True, "b": WORD}},
        ]
    },
    "reference": record(home={"$ref": "#/$defs/place"}, work={"$ref": "#/$defs/place"})
    | {"$defs": {"place": record(street=WORD, number=SMALL)}},
    "definitions": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$ref": "#/definitions/pair",
        "definitions": {
            "pair": record(left=SMALL, right={"$ref": "#/definitions/leaf"}),
            "leaf": WORD,
        },
    },
    "recursion": {
        "$defs": {
            "tree": record(
                value=SMALL,
                children=items({"$ref": "#/$defs/leaf"}, 2),
            ),
            "leaf": record(value=SMALL),
        },
        "$ref": "#/$defs/tree",
    },
    "linked list": {
        "$defs": {
            "link": record(
                value={"enum": [1, 2]},
                next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/link"}]},
            )
        },
        "$ref": "#/$defs/link",
    },
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": SMALL},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
    "no properties": {"type": "object", "additionalProperties": SMALL, "maxProperties": 0},
    "annotated": {
        "title": "Weather",
        "description": "of a town",
        "type": "object",
        "properties": {
            "town": WORD | {"description": "its name", "examples": ["Rome"]},
            "degrees": {
                "type": "number",
                "minimum": -40,
                "maximum": 50,
                "default": 0,
                "multipleOf": 0.5,
            },
        },
        "required": ["town", "degrees"],
        "additionalProperties": False,
        "x-order": 1,
    },
    "const in record": record(version={"const": 2}, mode={"const": "fast"}, flag={"const": False}),
    "nullable": record(
        a={"anyOf": [SMALL, {"type": "null"}]}, b={"type": ["string", "null"], "maxLength": 3}
    ),
    "step by step": record(
        steps=items(record(explanation=WORD, output=WORD), 2, minItems=1), final_answer=WORD
    ),
}
