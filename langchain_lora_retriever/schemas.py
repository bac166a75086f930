"""Schemas of callers: read from every form they come in, and bounded before anything recurses over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pydantic
import pydantic.v1
from langchain_core.utils.function_calling import convert_to_json_schema

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.nesting import walk
from langchain_lora_retriever.shown import shown

__all__ = [
    "MAX_SCHEMA_CHARACTERS",
    "MAX_SCHEMA_REFS",
    "check_schema",
    "class_schema",
    "is_object_schema",
    "is_recursive",
    "to_json_schema",
]

MAX_SCHEMA_CHARACTERS = 256 << 10
"""Characters of a schema that is written out as JSON."""
MAX_SCHEMA_REFS = 500
"""Definitions that a schema refers to: native code recurses over chains of them."""
_MAX_MULTIPLE_OF = 100_000
"""Largest `multipleOf` of an integer: an automaton counts remainders."""


def to_json_schema(schema: Any) -> dict[str, Any]:
    """Convert a pydantic class, TypedDict, function description or schema to a plain JSON schema.

    Raises:
        InvalidRequestError: If it is none of these, or beyond the bounds of this module.
    """
    if isinstance(schema, Mapping):
        check_schema(schema)
        converted = _from_mapping(schema)
    else:
        converted = class_schema(schema) or _by_langchain(schema)
    check_schema(converted)
    return converted


def class_schema(schema: Any) -> dict[str, Any] | None:
    """Return the JSON schema that a pydantic class writes of itself, recursion included; None for anything else."""
    if not isinstance(schema, type):
        return None
    try:
        if issubclass(schema, pydantic.BaseModel):
            return _opened(schema.model_json_schema())
        if issubclass(schema, pydantic.v1.BaseModel):
            return _opened(dict(schema.schema()))
    except Exception as error:
        raise InvalidRequestError(f"{schema.__name__} has no JSON schema: {error}") from error
    return None


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that is no JSON, or beyond the bounds of this module, before anything recurses over it.

    Raises:
        InvalidRequestError: If it is no JSON, nests too deep, is too large, refers to too many definitions, or asks for
            multiples of too large a number.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"The schema {shown(schema)} is not allowed: pass a JSON object.")
    refs: set[str] = set()
    for value in walk(schema, "The schema"):
        if isinstance(value, Mapping):
            if isinstance(value.get("$ref"), str):
                refs.add(value["$ref"])
            _check_multiple_of(value.get("multipleOf"))
    if len(refs) > MAX_SCHEMA_REFS:
        raise InvalidRequestError(
            f"The schema refers to {len(refs)} definitions, at most {MAX_SCHEMA_REFS} are allowed: leave out what the "
            "answer does not need."
        )
    try:
        num_characters = len(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"The schema is no JSON: {error}") from error
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"The schema has {num_characters:,} characters, at most {MAX_SCHEMA_CHARACTERS:,} are allowed: leave out "
            "what the answer does not need."
        )


def is_object_schema(schema: Mapping[str, Any]) -> bool:
    """Say whether everything a schema allows is an object, as the arguments of a tool are."""
    definitions = schema.get("$defs") or schema.get("definitions") or {}

    def is_object(part: Any, seen: frozenset[str]) -> bool:
        if not isinstance(part, Mapping):
            return False
        if "type" in part or "properties" in part:
            return bool(part.get("type", "object") == "object")
        if isinstance(part.get("$ref"), str):
            name = part["$ref"].rpartition("/")[2]
            return name not in seen and is_object(definitions.get(name), seen | {name})
        for key, combine in (("anyOf", all), ("oneOf", all), ("allOf", any)):
            if part.get(key):
                return combine(is_object(item, seen) for item in part[key])
        return False

    return is_object(schema, frozenset())


def is_recursive(schema: Mapping[str, Any]) -> bool:
    """Say whether a definition of a schema refers to itself, directly or through others."""
    definitions = {name: _refs(part) for name, part in (schema.get("$defs") or {}).items()}
    while True:
        leaves = {name for name, refs in definitions.items() if not refs & definitions.keys()}
        if not leaves:
            return bool(definitions)
        definitions = {name: refs for name, refs in definitions.items() if name not in leaves}


def _from_mapping(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A plain schema stays as it is; descriptions of functions hold theirs in one of several places."""
    if "function" in schema or "parameters" in schema or "input_schema" in schema:
        return _by_langchain(dict(schema))
    if isinstance(schema.get("schema"), Mapping) and "name" in schema:  # OpenAI's {"name", "strict", "schema"}
        return {"title": schema["name"], **schema["schema"]}
    return dict(schema)


def _opened(schema: dict[str, Any]) -> dict[str, Any]:
    """Write the definition out that a class which refers to itself consists of."""
    place, _, name = schema.get("$ref", "").rpartition("/")
    definition = (schema.get(place.removeprefix("#/")) or {}).get(name, {})
    return {**{key: value for key, value in schema.items() if key != "$ref" or not definition}, **definition}


def _by_langchain(schema: Any) -> dict[str, Any]:
    try:
        return dict(convert_to_json_schema(schema))
    except Exception as error:
        raise InvalidRequestError(
            f"{shown(schema)} is not a schema: {shown(error)}. Pass a pydantic class, a TypedDict or a JSON schema."
        ) from error


def _refs(schema: Any) -> set[str]:
    return {
        value["$ref"].rpartition("/")[2]
        for value in walk(schema, "The schema")
        if isinstance(value, Mapping) and isinstance(value.get("$ref"), str)
    }


def _check_multiple_of(value: object) -> None:
    if isinstance(value, int | float) and abs(value) > _MAX_MULTIPLE_OF:
        raise InvalidRequestError(
            f"multipleOf={value:.6g} is not allowed in a schema: pass a number of {_MAX_MULTIPLE_OF:,} at most."
        )
