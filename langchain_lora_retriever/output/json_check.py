"""Whether a JSON value satisfies a schema."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.output.schemas import resolve
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_lora_retriever.output.schemas import Schema

__all__ = ["violation"]

_MAX_CHECKS = 500_000  # of a value against a part of a schema


def violation(schema: Schema, value: Any) -> str | None:
    """Say what of a value does not satisfy a schema; None if all does.

    `pattern`, `patternProperties` and `format` are not looked at again: decoding has held them, and Python's regular
    expressions may take for ever. Nor is what is beyond some depth or number of comparisons. Unknown keywords say
    nothing.

    Args:
        schema: As `checked_schema` returns it, one that llguidance takes.
        value: Parsed JSON.
    """
    try:
        return _Validator(schema).violation(schema, value, "$")
    except (RecursionError, _TooManyError):
        return None


class _TooManyError(Exception):
    """The value would have to be compared too often."""


class _Validator:
    """Checks values against the parts of one schema, each pair once: unions may refer to the same parts again."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._known: dict[tuple[int, int], str | None] = {}

    def violation(self, schema: Any, value: Any, at: str) -> str | None:
        """Say what of a value does not satisfy a part of the schema."""
        if schema is False:
            return f"{at} is not allowed"
        if not isinstance(schema, dict):
            return None
        key = (id(schema), id(value))
        if key not in self._known:
            if len(self._known) >= _MAX_CHECKS:
                raise _TooManyError
            self._known[key] = None  # what refers to itself for the same value says nothing more
            self._known[key] = next(self._violations(schema, value, at), None)
        return self._known[key]

    def _violations(self, schema: Schema, value: Any, at: str) -> Iterator[str]:
        yield from _not_the_value(schema, value, at)
        yield from self._of_combined(schema, value, at)
        if isinstance(value, dict):
            yield from self._of_object(schema, value, at)
        elif isinstance(value, list):
            yield from self._of_array(schema, value, at)
        elif isinstance(value, str):
            yield from _out_of_range(schema, len(value), at, ("minLength", "maxLength"))
        elif not isinstance(value, bool) and value is not None:
            yield from _not_the_number(schema, value, at)

    def _of_combined(self, schema: Schema, value: Any, at: str) -> Iterator[str]:
        if "$ref" in schema:
            yield from self._of(resolve(self._root, schema["$ref"]), value, at)
        for part in schema.get("allOf", ()):
            yield from self._of(part, value, at)
        for key, most in (("anyOf", math.inf), ("oneOf", 1)):
            if key in schema:
                num = sum(self.violation(part, value, at) is None for part in schema[key])
                if not 1 <= num <= most:
                    yield f"{at} satisfies {num} of {key}"

    def _of(self, schema: Any, value: Any, at: str) -> Iterator[str]:
        found = self.violation(schema, value, at)
        if found is not None:
            yield found

    def _of_object(self, schema: Schema, value: dict[str, Any], at: str) -> Iterator[str]:
        properties = schema.get("properties", {})
        missing = [key for key in schema.get("required", ()) if key not in value]
        if missing:
            yield f"{at} lacks {shown(missing)}"
        yield from _out_of_range(schema, len(value), at, ("minProperties", "maxProperties"))
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        for key, item in value.items():
            yield from self._of(properties.get(key, others), item, f"{at}.{key:.40}")

    def _of_array(self, schema: Schema, value: list[Any], at: str) -> Iterator[str]:
        first, others = schema.get("prefixItems", ()), schema.get("items", True)
        if isinstance(others, list):  # before 2020-12
            first, others = others, schema.get("additionalItems", True)
        yield from _out_of_range(schema, len(value), at, ("minItems", "maxItems"))
        for index, item in enumerate(value):
            yield from self._of(first[index] if index < len(first) else others, item, f"{at}[{index}]")


def _not_the_value(schema: Schema, value: Any, at: str) -> Iterator[str]:
    types = schema.get("type")
    allowed = [types] if isinstance(types, str) else types
    if isinstance(allowed, list) and not any(_is_of_type(value, each) for each in allowed):
        yield f"{at} is not of type {', '.join(map(str, allowed))}"
    if "const" in schema and not _is_same(value, schema["const"]):
        yield f"{at} is not {shown(schema['const'])}"
    if isinstance(schema.get("enum"), list) and not any(_is_same(value, each) for each in schema["enum"]):
        yield f"{at} is none of {shown(schema['enum'])}"


def _is_of_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return bool(kind == "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    if isinstance(value, int):
        return kind in {"integer", "number"}
    kinds = {str: "string", list: "array", dict: "object", type(None): "null"}
    return bool(kinds.get(type(value)) == kind)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: `1` and `1.0` are, `1` and `true` are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _out_of_range(schema: Schema, size: int, at: str, keys: Sequence[str]) -> Iterator[str]:
    least, most = (schema.get(key) for key in keys)
    if least is not None and size < least:
        yield f"{at} has {size}, below {keys[0]}={least}"
    if most is not None and size > most:
        yield f"{at} has {size}, above {keys[1]}={most}"


def _not_the_number(schema: Schema, value: float, at: str) -> Iterator[str]:
    least, most = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is True:  # before draft 6
        above, least = least, None
    if below is True:
        below, most = most, None
    for is_wrong, text in (
        (least is not None and value < least, f"below minimum={least}"),
        (most is not None and value > most, f"above maximum={most}"),
        (above not in {None, False} and value <= above, f"not above exclusiveMinimum={above}"),
        (below not in {None, False} and value >= below, f"not below exclusiveMaximum={below}"),
    ):
        if is_wrong:
            yield f"{at} is {shown(value)}, {text}"
    multiple = schema.get("multipleOf")
    if multiple is not None and not (math.isfinite(value) and Fraction(str(value)) % Fraction(str(multiple)) == 0):
        yield f"{at} is {shown(value)}, no multiple of {multiple}"
