"""Tools in every form LangChain takes them, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_core.utils.function_calling import convert_to_openai_tool

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.schemas import check_schema, class_schema, is_recursive
from langchain_lora_retriever.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.tools import BaseTool

__all__ = ["Tool", "ToolChoice", "to_tool_choice", "to_tools", "tool_name"]

Tool: TypeAlias = dict[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`."""

ToolChoice: TypeAlias = "Literal['auto', 'required', 'none'] | tuple[str]"
"""Whether a call is free, forced or forbidden, or the one tool that must be called."""


def to_tools(
    tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool], *, strict: bool | None
) -> list[Tool]:
    """Convert whatever LangChain takes for a tool to OpenAI's JSON form.

    Raises:
        InvalidRequestError: If one is not a function tool (a provider's built-in one, say).
    """
    converted = [_convert(tool, strict=strict) for tool in tools]
    for tool in converted:
        if not isinstance(tool.get("function"), Mapping):
            raise InvalidRequestError(
                f"The tool {shown(tool)} is not a function: pass a function, a BaseTool, a pydantic class, a TypedDict "
                "or a JSON schema with a title."
            )
    return converted


def _convert(tool: Any, *, strict: bool | None) -> Tool:
    if isinstance(tool, Mapping):
        check_schema(tool)
    try:
        converted: Tool = convert_to_openai_tool(tool, strict=strict)
    except Exception as error:
        raise InvalidRequestError(
            f"The tool {shown(tool)} cannot be read: {shown(error)}. Pass a function, a BaseTool, a pydantic class, a "
            "TypedDict or a JSON schema with a title."
        ) from error
    schema = class_schema(getattr(tool, "tool_call_schema", tool))
    if schema is not None and is_recursive(schema):  # LangChain writes definitions out, and gives up below the first
        kept = {key: value for key, value in schema.items() if key not in {"title", "description"}}
        converted = {**converted, "function": {**converted["function"], "parameters": kept}}
    return converted


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
    if choice is True or choice in {"any", "required"}:
        if names:
            return "required"
        raise InvalidRequestError(f"tool_choice={shown(choice)} forces a call, but there are no tools: bind some.")
    raise InvalidRequestError(
        f"tool_choice={shown(choice)} is not allowed: pass 'auto', 'any', 'none' or the name of a tool "
        f"({', '.join(names[:20])}{', ...' * (len(names) > 20)})."
    )
