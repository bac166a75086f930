"""Tools and schemas in every form LangChain takes them, and the choice between tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import pydantic
import pydantic.v1
from langchain_core.tools import BaseTool, create_schema_from_function
from langchain_core.tools import Tool as TextTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from typing_extensions import is_typeddict

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.schemas import (
    Schema,
    checked_schema,
    inlined,
    object_schema,
    opened,
    strict_schema,
    without_titles,
)
from langchain_lora_retriever.output.typed_dicts import typed_dict_schema
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.shown import shown

__all__ = [
    "MAX_TOOLS",
    "Tool",
    "ToolChoice",
    "schema_tool",
    "to_json_schema",
    "to_tool_choice",
    "to_tools",
    "tool_name",
]

MAX_TOOLS = 512
"""Tools of one call."""
MAX_DESCRIPTION_CHARACTERS = 32 << 10
"""Characters of one tool's description."""

Tool: TypeAlias = dict[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`; `parameters` is a checked schema."""

ToolChoice: TypeAlias = "Literal['auto', 'required', 'none'] | tuple[str]"
"""Whether a call is free, forced or forbidden, or the one tool that must be called."""

_NAME = re.compile(r'[^"\\<>{}]{1,256}')  # what needs no escape in JSON, and is no tag

# What tells a schema from a dictionary that holds one under a key.
_SCHEMA_KEYS = frozenset(
    {"$defs", "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains"}
    | {"definitions", "dependentRequired", "dependentSchemas", "enum", "exclusiveMaximum", "exclusiveMinimum"}
    | {"format", "if", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength"}
    | {"minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties", "prefixItems"}
    | {"properties", "propertyNames", "required", "title", "uniqueItems"}
)
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def to_tools(
    tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool], *, strict: bool | None
) -> list[Tool]:
    """Convert whatever LangChain takes for a tool to OpenAI's JSON form.

    Args:
        tools: Functions, `BaseTool`s, pydantic classes, TypedDicts, and dictionaries in the forms of OpenAI, Anthropic,
            Bedrock and JSON schema with a title.
        strict: Require every property and allow no others; None leaves it to each tool.

    Raises:
        InvalidRequestError: If there are too many, two of one name differ, or one is not a function tool (a provider's
            built-in one, say), has a name that cannot be written, or a schema beyond bounds.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InvalidRequestError(f"tools={shown(tools)} is not allowed: pass a list of tools.")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"{len(tools)} tools are bound, at most {MAX_TOOLS} are allowed: bind those that this call may need."
        )
    converted: dict[str, Tool] = {}
    for given in tools:
        tool = _to_tool(given, strict=strict)
        name = tool_name(tool)
        if converted.setdefault(name, tool) != tool:
            raise InvalidRequestError(f"Two different tools are named {name!r}: give each a name of its own.")
    return list(converted.values())


def _to_tool(given: Any, *, strict: bool | None) -> Tool:
    described = _described(given)
    name = described.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable():
        raise InvalidRequestError(
            f"The tool's name {shown(name)} is not allowed: pass 1 to 256 printable characters, none of them "
            'one of " \\ < > { }.'
        )
    schema = checked_schema(described.get("parameters") or {"type": "object", "properties": {}}, _schema_of(name))
    parameters = object_schema(schema, _schema_of(name))
    own = described.get("strict")
    if strict is not None and own is not None and bool(own) != strict:
        raise InvalidRequestError(f"The tool {name!r} has strict={own!r}, and strict={strict} is asked for: pass one.")
    function: dict[str, Any] = {"name": name}
    if described.get("description") is not None:
        function["description"] = _description(described["description"], name)
    function["parameters"] = strict_schema(parameters) if strict else parameters
    if strict is not None or own is not None:
        function["strict"] = bool(own if strict is None else strict)
    return {"type": "function", "function": function}


def _schema_of(name: str) -> str:
    return f"The schema of the tool {name!r}"


def _description(text: Any, name: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_DESCRIPTION_CHARACTERS:
        raise InvalidRequestError(
            f"The description of the tool {name!r}, {shown(text)}, is not allowed: pass a text of at most "
            f"{MAX_DESCRIPTION_CHARACTERS:,} characters."
        )
    check_unicode(text, f"The description of the tool {name!r}")
    return text


def _described(tool: Any) -> Mapping[str, Any]:
    """Find the name, the description and the parameters of a tool.

    LangChain's own conversion gives up below the first level of a class that contains itself, and writes every
    definition out wherever it is meant; so it is asked only where there is no schema to be had otherwise.
    """
    if isinstance(tool, Mapping):
        return _unwrapped(tool)
    try:
        if isinstance(tool, BaseTool) and not (isinstance(tool, TextTool) and not tool.args_schema):
            parameters = _readable(_class_schema(tool.tool_call_schema))
            return {"name": tool.name, "description": tool.description, "parameters": parameters}
        if isinstance(tool, BaseTool):
            return _unwrapped(convert_to_openai_tool(tool))
        if is_typeddict(tool):
            return _titled(typed_dict_schema(tool))
        if _is_model(tool):
            return _titled(_class_schema(tool))
        if callable(tool):
            model = create_schema_from_function(
                tool.__name__, tool, parse_docstring=True, error_on_invalid_docstring=False, include_injected=False
            )
            return {"name": tool.__name__, "description": model.__doc__, "parameters": _readable(_class_schema(model))}
    except InvalidRequestError:
        raise
    except Exception as error:  # whatever the annotations, validators and hooks of a caller's class raise
        raise InvalidRequestError(f"{shown(tool)} has no JSON schema: {error!s:.500}") from error
    raise _no_tool(tool)


def _unwrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a dictionary in the form of OpenAI, Anthropic or Bedrock, or a JSON schema with a title."""
    function = tool.get("function")
    if isinstance(function, Mapping):
        return {"strict": tool.get("strict"), **function}
    spec = tool.get("toolSpec")
    if isinstance(spec, Mapping):
        schema = spec.get("inputSchema")
        return {**spec, "parameters": schema.get("json") if isinstance(schema, Mapping) else None}
    if "input_schema" in tool and "name" in tool:
        return {**tool, "parameters": tool["input_schema"]}
    if "name" in tool and tool.get("type", "function") == "function" and not _is_schema(tool):
        return tool  # OpenAI's function by itself
    if _is_schema(tool) and "title" in tool:
        return _titled(tool)
    raise _no_tool(tool)


def _no_tool(tool: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"The tool {shown(tool)} is not a function: pass a function, a BaseTool, a pydantic class, a TypedDict or a "
        "JSON schema with a title."
    )


def _titled(schema: Any) -> dict[str, Any]:
    """Take a schema with a title for a tool of that name."""
    whole = opened(checked_schema(schema))
    return {"name": whole.get("title"), "description": whole.get("description"), "parameters": _readable(whole)}


def _readable(parameters: Any) -> Schema:
    """Make a schema that was not written for a model easier to read for one; what it describes is the tool's."""
    schema = without_titles(inlined(object_schema(checked_schema(parameters))))
    return {key: value for key, value in schema.items() if key != "description"}


def schema_tool(schema: Any, *, strict: bool | None) -> Tool:
    """Write a schema as the one tool whose arguments are the answer.

    Raises:
        InvalidRequestError: If it is no schema, or not one of objects.
    """
    described = {"strict": None, **_titled(to_json_schema(schema))}
    described["name"] = re.sub(r"[^\w.\[\]-]+", "_", str(described["name"] or "answer"))[:64]
    (tool,) = to_tools([described], strict=strict)
    return tool


def to_json_schema(schema: Any) -> Schema:
    """Convert a pydantic class, TypedDict, function or tool, or a schema in any wrapping, to a plain JSON schema.

    Raises:
        InvalidRequestError: If it is none of these, or beyond the bounds of `checked_schema`.
    """
    if _is_model(schema):
        try:
            return opened(checked_schema(_class_schema(schema)))
        except InvalidRequestError:
            raise
        except Exception as error:  # whatever the annotations and hooks of a caller's class raise
            raise InvalidRequestError(f"{schema.__name__} has no JSON schema: {error!s:.500}") from error
    if isinstance(schema, Mapping):
        if _is_schema(schema):
            return checked_schema(schema)
        wrapping = schema.get("json_schema", schema)
        if isinstance(wrapping, Mapping) and isinstance(wrapping.get("schema"), Mapping):
            return _named(wrapping["schema"], wrapping)  # OpenAI's {"name", "strict", "schema"}
        if not schema.keys() & {"function", "parameters", "input_schema", "toolSpec"}:
            raise InvalidRequestError(f"{shown(schema)} is not a schema: no keyword of JSON schema stands in it.")
    elif not callable(schema) and not isinstance(schema, BaseTool):
        raise InvalidRequestError(
            f"{shown(schema)} is not a schema: pass a pydantic class, a TypedDict or a JSON schema as a dictionary."
        )
    described = _described(schema)
    return _named(described.get("parameters") or {"type": "object"}, described)


def _named(schema: Any, wrapping: Mapping[str, Any]) -> Schema:
    named = {"title": wrapping.get("name"), "description": wrapping.get("description")}
    return {**{key: value for key, value in named.items() if isinstance(value, str)}, **checked_schema(schema)}


def _is_schema(value: Mapping[str, Any]) -> bool:
    """Whether a dictionary is a JSON schema itself, and holds none under a key; the empty one allows everything."""
    kind = value.get("type")
    return (
        not value
        or not value.keys().isdisjoint(_SCHEMA_KEYS)
        or isinstance(kind, list)
        or (isinstance(kind, str) and (kind in _TYPES or value.keys() == {"type"}))
    )


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, pydantic.BaseModel | pydantic.v1.BaseModel)


def _class_schema(model: Any) -> Any:
    """Ask a pydantic class for its schema, in which definitions stand by themselves."""
    if isinstance(model, Mapping):
        return model
    return model.model_json_schema() if issubclass(model, pydantic.BaseModel) else model.schema()


def tool_name(tool: Tool) -> str:
    """Return the name a tool is called by."""
    return str(tool["function"]["name"])


def to_tool_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Understand every way LangChain and OpenAI have of writing a tool choice.

    Args:
        choice: None or "auto"; "any", "required" or True; "none" or False; a tool's name, or
            `{"type": "function", "function": {"name": ...}}`.
        tools: The tools there are.

    Raises:
        InvalidRequestError: If it names no tool there is.
    """
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(choice, str):
            raise InvalidRequestError("tool_choice names no function: pass a tool's name.")
    names = [tool_name(tool) for tool in tools]
    if isinstance(choice, str) and choice in names:
        return (choice,)
    if choice is None or choice == "auto":
        return "auto"
    if choice == "none" or choice is False:
        return "none"
    if choice is True or choice in ("any", "required"):
        if names:
            return "required"
        raise InvalidRequestError(f"tool_choice={shown(choice)} forces a call, but there are no tools: bind some.")
    known = ", ".join([*names[:20], "..."] if len(names) > 20 else names)
    raise InvalidRequestError(
        f"tool_choice={shown(choice)} is not allowed: pass 'auto', 'any', 'none' or the name of a tool ({known})."
    )
