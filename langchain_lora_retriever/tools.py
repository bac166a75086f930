"""Tool calling: tools into the prompt, calls out of the text.

The format is that of Hermes and Qwen: tools in the system message, a call as a JSON object between `<tool_call>` tags.
Where the chat template writes tools in this format itself, the template does it; all other models get a section of the
system message.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jinja2
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.utils.function_calling import convert_to_openai_tool

from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from langchain_core.tools import BaseTool
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.messages import ChatTurn

__all__ = [
    "ToolCallParser",
    "ToolChoice",
    "add_tools_section",
    "call_text",
    "template_writes_tools",
    "to_tool_choice",
    "to_tools",
    "tool_name",
]

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"

_SECTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')

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
    converted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
    for tool in converted:
        if not isinstance(tool.get("function"), Mapping):
            raise InvalidRequestError(
                f"The tool {tool!r:.200} is not a function: pass a function, a BaseTool, a pydantic class, a TypedDict "
                "or a JSON schema with a title."
            )
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
        choice = (choice.get("function") or choice).get("name", choice)
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
        raise InvalidRequestError(f"tool_choice={choice!r} forces a call, but there are no tools: bind some.")
    raise InvalidRequestError(
        f"tool_choice={choice!r} is not allowed: pass 'auto', 'any', 'none' or the name of a tool ({', '.join(names)})."
    )


def template_writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the chat template shows tools and writes calls in the format that is read here.

    Most templates ignore tools without a word, so it is asked to render a tool and a call, and what it makes of them
    is looked at.
    """
    template = getattr(tokenizer, "chat_template", None)
    return bool(template) and _probe(tokenizer, repr(template))


@lru_cache(maxsize=32)
def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:  # noqa: ARG001 - a changed template is probed again
    parameters = {"type": "object", "properties": {"probe_argument": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "probe_tool", "description": "Probe.", "parameters": parameters}}
    function = {"name": "probe_tool", "arguments": {"probe_argument": 731}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    turns: list[Any] = [
        {"role": "user", "content": "probe"},
        call,
        {"role": "tool", "name": "probe_tool", "content": "7"},
    ]
    try:
        shown = str(tokenizer.apply_chat_template(turns, tools=[tool], tokenize=False))
        shown_without = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return False
    if shown.count("probe_argument") <= shown_without.count("probe_argument"):
        return False
    parser = ToolCallParser()
    chunks = [piece for piece in (*parser.push(shown), *parser.finish()) if not isinstance(piece, str)]
    arguments = "".join(chunk["args"] or "" for chunk in chunks)
    return "probe_tool" in {chunk["name"] for chunk in chunks} and '"probe_argument": 731' in arguments


def add_tools_section(chat: Sequence[ChatTurn], tools: Sequence[Tool]) -> list[ChatTurn]:
    """Write tools into the system message and past calls into the answers, for a template that does neither."""
    turns = [_without_calls(turn) for turn in chat]
    if not tools:
        return turns
    section = _SECTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{section}"}, *turns[1:]]
    return [{"role": "system", "content": section}, *turns]


def _without_calls(turn: ChatTurn) -> ChatTurn:
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    texts = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    content = "\n".join([turn["content"], *texts] if turn["content"] else texts)
    return {"role": turn["role"], "content": content}


def call_text(name: str | None, arguments: Any) -> str:
    """Write a call as the model writes it. Arguments that were not JSON stand as they came."""
    if isinstance(arguments, str):
        body = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
    else:
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


class ToolCallParser:
    """Finds calls in text while it is generated.

    Text before a call is passed on as it comes, except what may turn out to be a tag. Of a call the name comes first,
    then its arguments in pieces. Calls are numbered from 1: LangChain gives the text before them number 0.
    """

    def __init__(self) -> None:
        self._held = ""
        self._call: _OpenCall | None = None
        self._num_calls = 0

    def push(self, text: str) -> Iterator[str | ToolCallChunk]:
        """Read more text; yield text that belongs to no call, and pieces of calls."""
        self._held += text
        while True:
            if self._call is None:
                before, tag, after = self._held.partition(CALL_OPEN)
                if not tag:
                    keep = _num_undecided(self._held)
                    shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                    if shown:
                        yield shown
                    return
                if before.rstrip():
                    yield before.rstrip()
                self._num_calls += 1
                self._call, self._held = _OpenCall(self._num_calls), after
            else:
                self._held = yield from self._call.push(self._held)
                if not self._call.is_closed:
                    return
                self._call = None
                self._held = self._held.lstrip()

    def finish(self) -> Iterator[str | ToolCallChunk]:
        """Yield what was held back; a call that was cut off becomes an invalid one."""
        if self._call is not None:
            yield from self._call.cut_off(self._held)
        elif self._held.strip() or not self._num_calls:
            yield self._held
        self._held = ""


class _OpenCall:
    """A call between its tags.

    Args:
        index: Its number.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._id = f"call_{uuid.uuid4().hex}"
        self._has_head = False
        self._scan = _JsonScan()
        self.is_closed = False

    def push(self, text: str) -> Generator[ToolCallChunk, None, str]:
        """Read text, yield pieces, and return the text not used yet."""
        if not self._has_head:
            body, tag, rest = text.partition(CALL_CLOSE)
            head = _HEAD.match(text)
            if head is not None and (not tag or head.end() <= len(body)):
                self._has_head = True
                yield tool_call_chunk(name=json.loads(head[1]), args="", id=self._id, index=self._index)
                text = text[head.end() :]
            elif not tag:
                return text
            else:
                yield self._whole(body)
                self.is_closed = True
                return rest
        if not self._scan.is_done:
            used = self._scan.push(text)
            if used:
                yield tool_call_chunk(name=None, args=text[:used], id=None, index=self._index)
            text = text[used:]
            if not self._scan.is_done:
                return text
        _, tag, rest = text.partition(CALL_CLOSE)
        self.is_closed = bool(tag)
        return rest if tag else text

    def cut_off(self, text: str) -> Iterator[ToolCallChunk]:
        """End without a closing tag."""
        if not self._has_head:
            yield self._invalid(text)
        elif not self._scan.is_done:
            yield tool_call_chunk(name=None, args=_mismatch(self._scan), id=None, index=self._index)

    def _whole(self, body: str) -> ToolCallChunk:
        """Read a call whose keys come in another order, or that is no JSON at all."""
        try:
            call = json.loads(body)
            arguments = call.get("arguments", call.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            return tool_call_chunk(name=call["name"], args=text, id=self._id, index=self._index)
        except (ValueError, KeyError, AttributeError):
            return self._invalid(body)

    def _invalid(self, body: str) -> ToolCallChunk:
        scan = _JsonScan()
        scan.push(body)
        return tool_call_chunk(name=None, args=body.strip() + _mismatch(scan), id=self._id, index=self._index)


class _JsonScan:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self.is_in_string = False
        self._is_escaped = False
        self.is_done = False

    def push(self, text: str) -> int:
        """Read on; return how many characters belong to the object."""
        for at, char in enumerate(text):
            if self.is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self.is_in_string = False
            elif char == '"':
                self.is_in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_done = True
                    return at + 1
        return len(text)


def _mismatch(scan: _JsonScan) -> str:
    """Return what makes a text no JSON for good.

    LangChain completes JSON that breaks off. A call must not run with arguments that were cut short.
    """
    return '"]' if scan.is_in_string else "]"


def _num_undecided(text: str) -> int:
    """Length of the end of `text` that a call may begin with, white space before it included."""
    for length in range(min(len(CALL_OPEN) - 1, len(text)), 0, -1):
        if CALL_OPEN.startswith(text[-length:]):
            return len(text) - len(text[:-length].rstrip())
    return len(text) - len(text.rstrip())
