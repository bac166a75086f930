"""What an answer may look like: free text, tool calls, JSON of a schema, or what a grammar says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, InstanceOf

from langchain_lora_retriever.engine.grammar import can_constrain, compiler_of
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.dialects import SECTION, Dialect, dialect_of
from langchain_lora_retriever.output.grammars import (
    calls_grammar,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
)
from langchain_lora_retriever.output.tools import Tool, ToolChoice, to_json_schema, to_tool_choice, to_tools, tool_name
from langchain_lora_retriever.support.checks import settings
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Grammar

__all__ = ["AnswerFormat", "OutputRequest", "answer_format", "written_out"]


@settings(kw_only=True)
class OutputRequest:
    """What may be asked of an answer's form.

    Attributes:
        tools: Tools the model may call.
        tool_choice: "auto", "any", "none" or the name of a tool.
        parallel_tool_calls: Whether one answer may hold several calls.
        response_format: OpenAI's `{"type": "json_schema", ...}`, or a schema.
        guided: One of `{"json": schema}`, `{"regex": ...}`, `{"choice": [...]}` and `{"grammar": ...}`.
    """

    tools: Annotated[
        InstanceOf[list[Any]] | InstanceOf[tuple[Any, ...]] | None, Field(description="a list of tools")
    ] = None
    tool_choice: Annotated[
        str | bool | InstanceOf[Mapping[str, Any]] | None,
        Field(description='"auto", "any", "none", a tool\'s name, or a mapping'),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="True or False")] = None
    response_format: Any = None
    guided: Annotated[
        InstanceOf[Mapping[str, Any]] | None, Field(description="a mapping of one of json, regex, choice and grammar")
    ] = None

    @property
    def has_format(self) -> bool:
        """Whether an answer must be of some form, which may take long to be understood."""
        return self.tools is not None or self.response_format is not None or self.guided is not None


class AnswerFormat(NamedTuple):
    """What an answer may look like.

    Attributes:
        tools: Tools to show the model.
        dialect: How they are shown, and calls written; None where there are none.
        grammar: What decoding is constrained to; None leaves it free.
        is_free_text: The grammar allows any text, up to a tool call.
        then: What an answer that calls no tool is written in after that, by a second request; see `output.draft`.
    """

    tools: list[Tool]
    dialect: Dialect | None = None
    grammar: Grammar | None = None
    is_free_text: bool = False
    then: Grammar | None = None


def answer_format(options: OutputRequest, tokenizer: PreTrainedTokenizerBase) -> AnswerFormat:
    """Decide from a call's options what its answer may look like.

    Args:
        options: The call's.
        tokenizer: The base model's.

    Raises:
        InvalidRequestError: If the options contradict each other.
    """
    schema = _response_schema(options.response_format)
    tools = to_tools(options.tools or (), strict=None)
    choice = to_tool_choice(options.tool_choice, tools)
    if options.guided is not None:
        if tools or schema is not None:
            raise InvalidRequestError("guided constrains the whole answer: pass it without tools and response_format.")
        return AnswerFormat([], grammar=_guided_grammar(options.guided))
    if not tools or choice == "none":
        if schema is None:
            return AnswerFormat([], is_free_text=True)
        return AnswerFormat([], grammar=json_grammar(schema))
    return _calls_format(tools, choice, schema, options, tokenizer)


def _calls_format(
    tools: list[Tool],
    choice: ToolChoice,
    schema: dict[str, Any] | None,
    options: OutputRequest,
    tokenizer: PreTrainedTokenizerBase,
) -> AnswerFormat:
    """Decide what an answer may look like in which tools may be called."""
    is_forced = choice != "auto"
    then = None if is_forced or schema is None else json_grammar(schema)
    if then is not None:
        compiler_of(tokenizer).compile(then)  # what is not supported is told before anything is generated
    dialect = dialect_of(tokenizer)
    if dialect.form is None and is_forced:
        dialect = SECTION  # what must be constrained is asked for in a form that can be
    is_constrained = is_forced or (dialect.is_told_by_opening and can_constrain(tokenizer))
    if dialect.form is None or not is_constrained:
        return AnswerFormat(tools, dialect, is_free_text=True, then=then)
    callable_tools = [tool for tool in tools if not isinstance(choice, tuple) or tool_name(tool) == choice[0]]
    grammar = calls_grammar(
        {tool_name(tool): _parameters(tool, tokenizer, is_strict=is_forced) for tool in callable_tools},
        form=dialect.form,
        special=compiler_of(tokenizer).vocabulary.special,
        eos_token_id=tokenizer.eos_token_id,
        is_forced=is_forced,
        is_repeatable=options.parallel_tool_calls is not False and not isinstance(choice, tuple),
    )
    return AnswerFormat(tools, dialect, grammar, is_free_text=not is_forced, then=then)


def _parameters(tool: Tool, tokenizer: PreTrainedTokenizerBase, *, is_strict: bool) -> Mapping[str, Any]:
    """Return the schema that a tool's arguments are constrained to.

    Where nobody insists on it, a schema that is not supported is let go, and the arguments may be any JSON object.
    """
    function = tool["function"]
    schema: Mapping[str, Any] = function["parameters"]
    if is_strict or function.get("strict") or compiler_of(tokenizer).is_valid(json_grammar(schema)):
        return schema
    return {"type": "object"}


def _response_schema(response_format: Any) -> dict[str, Any] | None:
    """Read OpenAI's `response_format`, or a schema that stands alone; None for plain text."""
    if response_format is None:
        return None
    if isinstance(response_format, Mapping):
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return to_json_schema(response_format.get("schema") or {"type": "object"})
        if kind == "json_schema":
            described = response_format.get("json_schema", response_format)
            schema = described.get("schema") if isinstance(described, Mapping) else None
            if not isinstance(schema, Mapping):
                raise InvalidRequestError(
                    f"response_format={shown(response_format)} holds no schema: pass "
                    '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.'
                )
            return to_json_schema(schema)
    return to_json_schema(response_format)


def _guided_grammar(guided: Mapping[str, Any]) -> Grammar:
    writers: dict[str, Callable[[Any], Grammar]] = {
        "json": lambda schema: json_grammar(to_json_schema(schema)),
        "regex": regex_grammar,
        "choice": choice_grammar,
        "grammar": lark_grammar,
    }
    if len(guided) != 1 or next(iter(guided)) not in writers:
        raise InvalidRequestError(
            f"guided={shown(guided)} is not allowed: pass one of json (a schema), regex, choice (a list of texts) "
            "and grammar (Lark)."
        )
    kind, value = next(iter(guided.items()))
    return writers[kind](value)


def written_out(options: OutputRequest) -> dict[str, Any]:
    """Write the options that hold classes or functions as what they mean, so that equal values mean the same."""
    guided = options.guided
    if guided is not None and "json" in guided:
        guided = {**guided, "json": to_json_schema(guided["json"])}
    return {
        "tools": to_tools(options.tools or (), strict=None),
        "response_format": _response_schema(options.response_format),
        "guided": guided,
    }
