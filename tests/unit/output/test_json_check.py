"""Whether answers satisfy the schemas they were asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from langchain_lora_retriever.output.json_check import violation

RECURSIVE = {"$ref": "#/$defs/N", "$defs": {"N": {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer"}, 3, "3"),
        ({"type": "integer"}, 3.0, True),
        ({"type": ["string", "null"]}, None, 0),
        ({"enum": [1, "a", [1]]}, [1.0], [True]),
        ({"const": {"a": 1}}, {"a": 1}, {"a": 2}),
        ({"minimum": 1, "exclusiveMaximum": 3}, 1, 3),
        ({"multipleOf": 0.1}, 0.3, 0.35),
        ({"multipleOf": 0.1}, 10**300, float("inf")),
        ({"minLength": 2, "maxLength": 3}, "ab", "abcd"),
        ({"items": {"type": "string"}, "minItems": 1}, ["a"], []),
        ({"prefixItems": [{"type": "string"}], "items": False}, ["a"], ["a", 1]),
        ({"items": [{"type": "string"}], "additionalItems": False}, ["a"], ["a", 1]),
        ({"properties": {"a": {"type": "null"}}, "required": ["a"]}, {"a": None}, {}),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"b": 1}),
        ({"maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None, 1),
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, 1, 3),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, 1, 3),
        (RECURSIVE, {"next": {"next": {}}}, {"next": {"next": 1}}),
        ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, None, 1),
        ({"type": "object", "properties": {"a": False}}, {}, {"a": 1}),
    ],
)
def test_values_of_and_beside_a_schema(schema: dict[str, Any], right: Any, wrong: Any) -> None:
    """Each keyword is looked at, with JSON's own ideas of what is equal and of which type."""
    assert violation(schema, right) is None
    assert violation(schema, wrong)


def test_what_is_wrong_is_named_by_its_place() -> None:
    """The way to it is told, and what is there."""
    schema = {"properties": {"a": {"items": {"type": "string"}}}}
    assert violation(schema, {"a": ["x", 1]}) == "$.a[1] is not of type string"


def test_unions_of_unions_take_no_longer_than_they_are() -> None:
    """Each part of a schema is asked once about each value, however many ways lead to it."""
    parts = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**parts, "d60": {"type": "string"}}}
    begun = time.monotonic()
    assert violation(schema, 1)
    assert violation({"$ref": "#"}, 1) is None
    assert time.monotonic() - begun < 5
