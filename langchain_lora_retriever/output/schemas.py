"""Schemas of callers as plain data: bounded before anything recurses over them, and fit to be a tool's arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeAlias
from urllib.parse import unquote

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.nesting import check_unicode, walk
from langchain_lora_retriever.support.shown import shown

__all__ = [
    "MAX_SCHEMA_CHARACTERS",
    "MAX_SCHEMA_REFS",
    "Schema",
    "checked_schema",
    "inlined",
    "object_schema",
    "opened",
    "resolve",
    "strict_schema",
    "without_titles",
]

Schema: TypeAlias = dict[str, Any]
"""A JSON schema of nothing but dictionaries, lists, texts, numbers, booleans and None."""

MAX_SCHEMA_CHARACTERS = 256 << 10
"""Characters of a schema that is written out as JSON."""
MAX_SCHEMA_REFS = 500
"""Definitions that a schema refers to: native code recurses over chains of them."""
_MAX_MULTIPLE = 10_000
"""Least common multiple of all `multipleOf`, in units of their last digit: an automaton counts remainders."""
_MAX_PATTERN_PROPERTIES = 64
"""Patterns of properties: each is compared with each of the others."""
_MAX_COMBINED_PATTERNS = 8
"""Patterns that one text may have to match: states of automata multiply."""
_MAX_INLINED = 1_000
"""Parts of a schema whose definitions are written out."""

# Parts of a schema that hold schemas: by name, or in a row or one.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_PARTS = frozenset(
    {"allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalItems", "additionalProperties", "not"}
)
_DEFINITIONS = frozenset({"$defs", "definitions"})
_SAYING_NOTHING = _DEFINITIONS | {"type", "title", "description", "default", "examples", "$schema", "$id", "$comment"}


def checked_schema(schema: Any, what: str = "The schema") -> Schema:
    """Return a plain copy of a schema that may be handed to native code.

    Args:
        schema: A mapping of a caller's.
        what: What to call it in an error.

    Raises:
        InvalidRequestError: If it is no JSON, nests too deep, is too large, refers to too many definitions, or asks for
            multiples of too large a number.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{what} {shown(schema)} is not allowed: pass a JSON object.")
    _check_measures(schema, what)
    try:
        text = json.dumps(schema, allow_nan=False, default=_as_plain)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequestError(f"{what} is no JSON: {error!s:.200}") from error
    _check_size(len(text), what)
    return json.loads(text)  # type: ignore[no-any-return]


def _check_measures(schema: Mapping[str, Any], what: str) -> None:
    """Count what costs more than its length, or more than its text: parts of Python's objects may be shared."""
    refs: set[str] = set()
    patterns: set[str] = set()
    multiples: set[Fraction] = set()
    num_characters = num_named_by_pattern = num_combined = 0
    for value in walk(schema, what):
        if isinstance(value, str):
            check_unicode(value, what)
            num_characters += len(value)
        elif isinstance(value, Mapping):
            refs |= {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            patterns |= {value["pattern"]} if isinstance(value.get("pattern"), str) else set()
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float) and math.isfinite(multiple) and multiple > 0:
                multiples.add(Fraction(str(multiple)))
            num_named_by_pattern += _num_parts(value.get("patternProperties"))
            num_combined += _num_parts(value.get("allOf")) + _is_combined(value)
    for num, limit, of in (
        (len(refs), MAX_SCHEMA_REFS, "refers to {} definitions"),
        (num_named_by_pattern, _MAX_PATTERN_PROPERTIES, "has {} patternProperties"),
        (min(len(patterns), num_combined), _MAX_COMBINED_PATTERNS, "has {} or more patterns that are combined"),
    ):
        if num > limit:
            raise InvalidRequestError(
                f"{what} {of.format(num)}, at most {limit} are allowed: leave out what the answer does not need."
            )
    _check_multiples(multiples, what)
    _check_size(num_characters, what)


def _num_parts(value: Any) -> int:
    return len(value) if isinstance(value, Mapping | list) else 0


def _is_combined(schema: Mapping[str, Any]) -> bool:
    """Whether a part of a schema asks for several things at once, each of which may ask for a pattern."""
    keys = schema.keys() - _SAYING_NOTHING
    return len(keys) > 1 and not keys.isdisjoint({"$ref", "anyOf", "oneOf"})


def _as_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an object of type {type(value).__name__} stands in it")


def _check_size(num_characters: int, what: str) -> None:
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"{what} has {num_characters:,} characters, at most {MAX_SCHEMA_CHARACTERS:,} are allowed: leave out "
            "what the answer does not need."
        )


def _check_multiples(multiples: set[Fraction], what: str) -> None:
    """Bound what all of them together ask for: `allOf` combines them."""
    unit = math.lcm(*(number.denominator for number in multiples))
    if any(number > _MAX_MULTIPLE or number.denominator > 10**18 for number in multiples) or (
        math.lcm(*(int(number * unit) for number in multiples)) > _MAX_MULTIPLE
    ):
        numbers = ", ".join(f"{float(number):.6g}" for number in sorted(multiples)[-4:])
        raise InvalidRequestError(
            f"{what} has multipleOf={numbers}, which is not allowed: numbers must have a least common multiple of "
            f"{_MAX_MULTIPLE:,} at most, in units of their last digit."
        )


def resolve(schema: Schema, reference: Any) -> Any:
    """Find what a reference within a schema means; None if there is nothing."""
    found: Any = schema
    if not isinstance(reference, str) or not (reference in {"", "#"} or reference.startswith("#/")):
        return None
    for part in reference.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and len(key) < 9 and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def opened(schema: Schema) -> Schema:
    """Write out the definition that a schema refers to as a whole, as that of a class which contains itself does."""
    seen: set[str] = set()
    while isinstance(reference := schema.get("$ref"), str) and reference not in seen:
        seen.add(reference)
        target = resolve(schema, reference)
        if not isinstance(target, dict):
            break
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def object_schema(schema: Schema, what: str = "The schema") -> Schema:
    """Return a schema of all objects that a schema allows, as the arguments of a tool are.

    Args:
        schema: As `checked_schema` returns it.
        what: What to call it in an error.

    Raises:
        InvalidRequestError: If its type is another.
    """
    schema = opened(schema)
    types = schema.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise InvalidRequestError(
            f"{what} is of type {shown(types)}, and a function's arguments are an object: wrap it in an object, or "
            "pass method='json_schema' for structured output."
        )
    return {**schema, "type": "object"}


def strict_schema(schema: Any) -> Any:
    """Require every property and allow no others, as OpenAI's strict mode has it."""
    strict = _with_parts(schema, strict_schema)
    if isinstance(strict, dict) and (
        isinstance(strict.get("properties"), dict) or (strict.get("type") == "object" and "$ref" not in strict)
    ):
        strict["required"] = list(strict.get("properties", ()))
        strict["additionalProperties"] = False
    return strict


def without_titles(schema: Any) -> Any:
    """Leave out the titles that pydantic gives everything; a property of that name stays."""
    result = _with_parts(schema, without_titles)
    if isinstance(result, dict) and isinstance(result.get("title"), str):
        del result["title"]
    return result


def _with_parts(schema: Any, change: Any) -> Any:
    """Copy a schema with each of the schemas right inside it changed."""
    if isinstance(schema, list):
        return [change(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: change(item) for name, item in value.items()}
        if key in _NAMED and isinstance(value, dict)
        else change(value)
        if key in _PARTS
        else value
        for key, value in schema.items()
    }


def inlined(schema: Schema) -> Schema:
    """Write definitions out where they are meant, which models and chat templates read more easily.

    A schema that refers to itself, or that would grow large, stays as it is.
    """
    left = _MAX_INLINED

    def write(node: Any, inside: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or len(inside) > 20:
            raise _StaysAsItIsError
        reference = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(reference, str):
            target = resolve(schema, reference)
            if reference in inside or not isinstance(target, dict):
                raise _StaysAsItIsError
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
            return write(node, (*inside, reference))
        if isinstance(node, dict):
            node = {key: value for key, value in node.items() if key not in _DEFINITIONS}
        return _with_parts(node, lambda part: write(part, inside))

    try:
        result: Schema = write(schema, ())
    except (_StaysAsItIsError, RecursionError):
        return schema
    return result


class _StaysAsItIsError(Exception):
    """A schema refers to itself, or would grow large."""
