"""Structured output: what an answer must look like, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pydantic.v1
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from pydantic import BaseModel, ValidationError

from langchain_lora_retriever.constraints import (
    GrammarConstraint,
    calls_grammar,
    choice_grammar,
    json_grammar,
    make_constraint,
    regex_grammar,
)
from langchain_lora_retriever.errors import InvalidRequestError, StructuredOutputError
from langchain_lora_retriever.tools import CALL_CLOSE, CALL_OPEN, Tool, to_tool_choice, to_tools, tool_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.call_options import CallOptions

__all__ = ["AnswerFormat", "StructuredOutputParser", "answer_format", "structured_output"]

Method = Literal["json_schema", "function_calling", "json_mode"]


class AnswerFormat(NamedTuple):
    """What an answer may look like.

    Attributes:
        tools: Tools to show the model.
        grammar: What decoding is constrained to; None leaves it free.
        is_free_text: The grammar allows any text, up to a tool call.
        is_json: The answer is JSON, between tags or alone, and can be closed to fit the token limit.
    """

    tools: list[Tool]
    grammar: str | None = None
    is_free_text: bool = False
    is_json: bool = False

    def make_constraint(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> GrammarConstraint | None:
        """Compile the grammar for one request.

        Raises:
            InvalidRequestError: If it asks for what cannot be honoured.
        """
        if self.grammar is None:
            return None
        return make_constraint(tokenizer, self.grammar, fit=max_tokens if self.is_json else None)


def answer_format(options: CallOptions) -> AnswerFormat:
    """Decide from a call's options what its answer may look like.

    Raises:
        InvalidRequestError: If the options contradict each other.
    """
    schema = _response_schema(options.response_format)
    tools = to_tools(options.tools or (), strict=None)
    choice = to_tool_choice(options.tool_choice, tools)
    if options.guided is not None:
        if tools or schema is not None:
            raise InvalidRequestError("guided constrains the whole answer: pass it without tools and response_format.")
        return AnswerFormat([], _guided_grammar(options.guided), is_json="json" in options.guided)
    if not tools or choice == "none":
        if schema is None:
            return AnswerFormat([], is_free_text=True)
        return AnswerFormat([], json_grammar(schema), is_json=True)
    is_forced = choice != "auto"
    callable_tools = [tool for tool in tools if not isinstance(choice, tuple) or tool_name(tool) == choice[0]]
    grammar = calls_grammar(
        {tool_name(tool): tool["function"].get("parameters") or {"type": "object", "properties": {}}
         for tool in callable_tools},
        tags=(CALL_OPEN, CALL_CLOSE),
        is_forced=is_forced or schema is not None,
        is_repeatable=options.parallel_tool_calls is not False and not isinstance(choice, tuple),
        otherwise=None if is_forced else schema,
    )  # fmt: skip
    is_free_text = not is_forced and schema is None
    return AnswerFormat(tools, grammar, is_free_text=is_free_text, is_json=not is_free_text)


def _response_schema(response_format: Any) -> dict[str, Any] | None:
    """Read OpenAI's `response_format`, or a schema that stands alone; None for plain text."""
    if response_format is None:
        return None
    if isinstance(response_format, Mapping):
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return dict(response_format.get("schema") or {"type": "object"})
        if kind == "json_schema":
            described = response_format.get("json_schema", response_format)
            schema = described.get("schema") if isinstance(described, Mapping) else None
            if not isinstance(schema, Mapping):
                raise InvalidRequestError(
                    f"response_format={response_format!r:.200} holds no schema: pass "
                    '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.'
                )
            return dict(schema)
    return _json_schema(response_format)


def _guided_grammar(guided: Mapping[str, Any]) -> str:
    writers: dict[str, Callable[[Any], str]] = {
        "json": lambda schema: json_grammar(_json_schema(schema)),
        "regex": regex_grammar,
        "choice": choice_grammar,
        "grammar": str,
    }
    if len(guided) != 1 or next(iter(guided)) not in writers:
        raise InvalidRequestError(
            f"guided={guided!r:.200} is not allowed: pass one of json (a schema), regex, choice (a list of texts) "
            "and grammar (Lark)."
        )
    kind, value = next(iter(guided.items()))
    return writers[kind](value)


def _json_schema(schema: Any) -> dict[str, Any]:
    # LangChain's conversion asks for a title, which a plain JSON schema may lack and decoding does not need.
    if (
        isinstance(schema, Mapping)
        and "title" not in schema
        and "function" not in schema
        and "parameters" not in schema
    ):
        return dict(schema)
    try:
        return dict(convert_to_json_schema(schema))
    except ValueError as error:
        raise InvalidRequestError(f"{schema!r:.200} is not a schema: {error}") from error


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
        InvalidRequestError: If the method is unknown or the schema is none.
    """
    trace = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    if method == "function_calling":
        tool = convert_to_openai_tool(schema, strict=strict)
        bound = llm.bind_tools(
            [tool], tool_choice=tool_name(tool), parallel_tool_calls=False, ls_structured_output_format=trace, **kwargs
        )
    elif method in {"json_schema", "json_mode"}:
        json_schema = _json_schema(schema)
        described = {"name": json_schema.get("title", "answer"), "schema": json_schema, "strict": strict}
        response_format = {"type": "json_schema", "json_schema": described}
        bound = llm.bind(response_format=response_format, ls_structured_output_format=trace, **kwargs)
    else:
        raise InvalidRequestError(
            f"method={method!r} is not allowed: pass 'json_schema', 'function_calling' or 'json_mode'."
        )
    parser = StructuredOutputParser(target=schema)
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


class StructuredOutputParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads the JSON of an answer's text, or of its tool call, and validates it against the schema asked for.

    In a stream, dictionaries are given as they grow; an object of a class only when it is whole.

    Attributes:
        target: The pydantic class, TypedDict or JSON schema.
    """

    target: Any

    def parse(self, text: str) -> Any:
        """Read an answer's text."""
        return self.parse_result([Generation(text=text)])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Read an answer.

        Raises:
            StructuredOutputError: If it is cut off, or does not satisfy the schema.
        """
        text, is_whole = _json_of(result[0])
        if partial and not is_whole:
            if isinstance(self.target, type) and not _is_typed_dict(self.target):
                return None
            try:
                value = parse_partial_json(text) if text else None
            except json.JSONDecodeError:
                return None
            return value if isinstance(value, dict) else None
        try:
            return self._validate(json.loads(text, strict=False))
        except (ValueError, TypeError, ValidationError, pydantic.v1.ValidationError) as error:
            raise StructuredOutputError(
                f"The answer does not satisfy the schema: {error}\nThe answer was: {text!r:.500}\n"
                "If it was cut off, raise max_tokens."
            ) from error

    def _validate(self, value: Any) -> Any:
        target = self.target
        if isinstance(target, type) and issubclass(target, BaseModel):
            return target.model_validate(value)
        if isinstance(target, type) and issubclass(target, pydantic.v1.BaseModel):
            return target.parse_obj(value)
        missing = [key for key in _json_schema(target).get("required", ()) if key not in value]
        if missing:
            raise OutputParserException(f"the keys {missing} are missing")
        return value


def _json_of(generation: Generation) -> tuple[str, bool]:
    """Return the JSON text of an answer, and whether there is no more to come."""
    if not isinstance(generation, ChatGeneration) or not isinstance(generation.message, AIMessage):
        return generation.text, True
    message = generation.message
    is_whole = not isinstance(message, AIMessageChunk) or message.chunk_position == "last"
    if isinstance(message, AIMessageChunk) and message.tool_call_chunks:
        return message.tool_call_chunks[0]["args"] or "", is_whole
    if message.tool_calls:
        return json.dumps(message.tool_calls[0]["args"]), is_whole
    if message.invalid_tool_calls:
        return message.invalid_tool_calls[0]["args"] or "", is_whole
    return str(message.text), is_whole


def _is_typed_dict(target: type) -> bool:
    return issubclass(target, dict)
