"""Structured output: a chat model bound to a schema, and a parser that reads its answers back."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import pydantic.v1
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json
from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from langchain_lora_retriever.errors import InvalidRequestError, StructuredOutputError
from langchain_lora_retriever.output.json_check import violation
from langchain_lora_retriever.output.tools import schema_tool, to_json_schema, tool_name
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.language_models import BaseChatModel, LanguageModelInput


__all__ = ["StructuredOutputParser", "structured_output"]

Method = Literal["json_schema", "function_calling", "json_mode"]


def structured_output(
    llm: BaseChatModel,
    schema: Mapping[str, Any] | type,
    *,
    method: Method = "json_schema",
    include_raw: bool = False,
    strict: bool | None = None,
    **kwargs: Any,
) -> Runnable[LanguageModelInput, Any]:
    """Build the runnable of `with_structured_output`.

    Raises:
        InvalidRequestError: If the method is unknown, the schema is none, or there are `tools` beside a schema that is
            a tool itself.
    """
    # A trace converts it, too, and LangChain's conversion raises where a TypedDict has keys that are not required.
    told = to_json_schema(schema) if is_typeddict(schema) else schema
    trace = {"kwargs": {"method": method, "strict": strict}, "schema": told}
    called = None
    if method == "function_calling":
        tool = schema_tool(schema, strict=strict)
        called = tool_name(tool)
        if given := sorted(kwargs.keys() & {"tools", "tool_choice", "parallel_tool_calls"}):
            raise InvalidRequestError(
                f"{given[0]!r} goes with method='json_schema': with 'function_calling' the schema is the only tool, "
                "and is always called."
            )
        bound = llm.bind_tools(
            [tool], tool_choice=called, parallel_tool_calls=False, ls_structured_output_format=trace, **kwargs
        )
    elif method in {"json_schema", "json_mode"}:
        json_schema = to_json_schema(schema)
        described = {"name": json_schema.get("title", "answer"), "schema": json_schema, "strict": strict}
        response_format = {"type": "json_schema", "json_schema": described}
        bound = llm.bind(response_format=response_format, ls_structured_output_format=trace, **kwargs)
    else:
        raise InvalidRequestError(
            f"method={method!r} is not allowed: pass 'json_schema', 'function_calling' or 'json_mode'."
        )
    parser = StructuredOutputParser(target=schema, called=called)
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    read = parsed.with_fallbacks([failed], exception_key="parsing_error")
    # Called and not streamed: a stream does not fall back any more once it has given the raw answer.
    return RunnableMap(raw=bound) | RunnableLambda(read.invoke, read.ainvoke, name="read")


class StructuredOutputParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads the JSON of an answer's text, or of the call that stands for it, and validates it against the schema.

    In a stream, dictionaries and lists are given as they grow; an object of a class only when it is whole. Of an answer
    that calls other tools there is nothing to read, and None is given, as by LangChain's own parsers.

    Attributes:
        target: The pydantic class, TypedDict or JSON schema.
        called: Name of the tool whose arguments are the answer; None where its text is.
    """

    target: Any
    called: str | None = None

    def parse(self, text: str) -> Any:
        """Read an answer's text."""
        return self.parse_result([Generation(text=text)])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Read an answer.

        Raises:
            StructuredOutputError: If it is cut off, or does not satisfy the schema.
        """
        text, is_whole = _json_of(result[0], self.called)
        if text is None:
            return None
        if partial and not is_whole:
            if isinstance(self.target, type) and not _is_typed_dict(self.target):
                return None
            try:
                value = parse_partial_json(text) if text else None
            except (ValueError, RecursionError):
                return None
            return value if isinstance(value, dict | list) else None
        try:
            return self._validate(json.loads(text, strict=False))
        except (ValueError, TypeError, RecursionError, ValidationError, pydantic.v1.ValidationError) as error:
            raise StructuredOutputError(
                f"The answer does not satisfy the schema: {error!s:.2000}\nThe answer was: {shown(text)}\n"
                "If it was cut off, raise max_tokens."
            ) from error

    def _validate(self, value: Any) -> Any:
        target = self.target
        if isinstance(target, type) and issubclass(target, BaseModel):
            return target.model_validate(value)
        if isinstance(target, type) and issubclass(target, pydantic.v1.BaseModel):
            return target.parse_obj(value)
        wrong = violation(to_json_schema(target), value)
        if wrong is not None:
            raise OutputParserException(wrong)
        return value


def _json_of(generation: Generation, called: str | None) -> tuple[str | None, bool]:
    """Return the JSON text of an answer, and whether there is no more to come; None if it calls other tools instead."""
    if not isinstance(generation, ChatGeneration) or not isinstance(generation.message, AIMessage):
        return generation.text, True
    message = generation.message
    is_whole = not isinstance(message, AIMessageChunk) or message.chunk_position == "last"
    calls: list[tuple[str | None, str]]
    if isinstance(message, AIMessageChunk) and message.tool_call_chunks:
        calls = [(chunk["name"], chunk["args"] or "") for chunk in message.tool_call_chunks]
    else:
        calls = [(call["name"], json.dumps(call["args"])) for call in message.tool_calls]
        calls += [(call["name"], call["args"] or "") for call in message.invalid_tool_calls]
    if calls:
        return next((arguments for name, arguments in calls if called is not None and name == called), None), is_whole
    return str(message.text), is_whole


def _is_typed_dict(target: type) -> bool:
    return issubclass(target, dict)
