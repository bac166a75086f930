"""From LangChain messages to what is routed on and what the model reads."""

from __future__ import annotations

import json
import re
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_lora_retriever.dialects import add_tools_section, dialect_of
from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.dialects import ChatTurn, Dialect
    from langchain_lora_retriever.tools import Tool

__all__ = [
    "content_text",
    "encode_chat",
    "routing_text",
    "to_chat",
]

_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_HEADINGS = {"user": "### Instruction:", "assistant": "### Response:", "tool": "### Input:"}
_MEDIA_BLOCKS = frozenset({"image", "image_url", "input_image", "audio", "input_audio", "video", "file", "document"})
# Blocks that repeat what `tool_calls` holds, or that the model is not shown again.
_SILENT_BLOCKS = frozenset(
    {"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "server_tool_call"}
    | {"server_tool_result", "reasoning", "thinking", "redacted_thinking"}
)
_ROLES = {"human": "user", "ai": "assistant", "developer": "system", "function": "tool"}
_ROLE_PATTERN = re.compile(r"[A-Za-z][\w-]*")

# A fast tokenizer switches its treatment of special tokens in place while it encodes a sanitized chat, and refuses
# to be borrowed twice. Encoding takes well under a millisecond, so one lock for all of them is enough.
_encoding = threading.Lock()


def content_text(message: BaseMessage) -> str:
    """Return the text of a message's content, whatever its form.

    Raises:
        InvalidRequestError: If the content holds an image, audio, a file, or a block of an unknown type.
    """
    content = message.content
    if isinstance(content, str):
        return content
    parts = [_block_text(block, message) for block in content]
    # Blocks of an answer are pieces of one text; blocks of a prompt are separate texts (documents, say).
    return ("" if isinstance(message, AIMessage) else "\n").join(part for part in parts if part is not None)


def _block_text(block: str | dict[str, Any], message: BaseMessage) -> str | None:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text" if "text" in block else None)
    if kind in _SILENT_BLOCKS:
        return None
    if kind in {"text", "text-plain", "output_text", "input_text"} and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _MEDIA_BLOCKS:
        raise InvalidRequestError(
            f"A {message.type} message holds content of type {kind!r}, but the base model reads text only. "
            "Pass text blocks, or describe or transcribe the file first."
        )
    if isinstance(message, ToolMessage):
        return json.dumps(block, ensure_ascii=False, default=str)
    raise InvalidRequestError(
        f"A {message.type} message holds a content block of type {kind!r}; text blocks "
        '({"type": "text", "text": ...}) and plain strings are what a text model can be given.'
    )


def routing_text(messages: Sequence[BaseMessage]) -> str:
    """Return the text that adapters are retrieved for: that of the last human message.

    After a tool's result it is still the human's, so an agent keeps its adapters through a loop of calls. Where no
    human has spoken it is the last message that has any text.
    """
    for message in reversed(messages):
        if isinstance(message, HumanMessage) or (isinstance(message, ChatMessage) and message.role == "user"):
            return content_text(message)
    return next((text for message in reversed(messages) if (text := content_text(message))), "")


def to_chat(messages: Sequence[BaseMessage]) -> list[ChatTurn]:
    """Convert LangChain messages to chat-template turns.

    Raises:
        InvalidRequestError: If there is no message, or one that a text model cannot be given.
    """
    if not messages:
        raise InvalidRequestError("The message list is empty: pass at least one message.")
    return [_to_turn(message) for message in messages]


def _to_turn(message: BaseMessage) -> ChatTurn:
    turn: ChatTurn = {"role": _role(message), "content": content_text(message)}
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        calls = [(c["id"], c["name"], c["args"]) for c in message.tool_calls]
        calls += [(c["id"], c["name"], c["args"]) for c in message.invalid_tool_calls]  # type: ignore[misc]
        turn["tool_calls"] = [
            {"type": "function", "id": id_, "function": {"name": name, "arguments": arguments}}
            for id_, name, arguments in calls
        ]
    if isinstance(message, ToolMessage | FunctionMessage):
        turn["name"] = message.name
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool"
    if isinstance(message, ChatMessage):
        # Templates paste the role beside control tokens, so it must be one plain word.
        if not _ROLE_PATTERN.fullmatch(message.role):
            raise InvalidRequestError(f"The role {message.role!r} is not allowed: pass one word, such as 'user'.")
        return _ROLES.get(message.role, message.role)
    raise InvalidRequestError(f"A message of type {message.type!r} cannot be part of a prompt.")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    chat: Sequence[ChatTurn],
    *,
    tools: Sequence[Tool] = (),
    dialect: Dialect | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Render turns with the tokenizer's chat template, or in Alpaca format where it has none, and encode them.

    Control tokens that stand in the turns' text are encoded as plain text. A last turn of the assistant's is
    continued. A template that insists on alternating roles, or knows no system role, is given merged turns.

    Args:
        tokenizer: The base model's tokenizer.
        chat: Turns, oldest first; at least one.
        tools: Tools the model may call.
        dialect: Who writes tools and calls, the template or a section of the system message; found out by default.
        template_kwargs: More variables for the template (`enable_thinking=False`).

    Raises:
        InvalidRequestError: If the template refuses the turns.
    """
    turns = list(chat)
    is_continued = turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls")
    if is_continued and not turns[-1]["content"]:
        turns, is_continued = turns[:-1], False
        if not turns:
            raise InvalidRequestError("The only message is an empty answer: pass a message with text.")
    if not (dialect or dialect_of(tokenizer)).by_template:
        turns, tools = add_tools_section(turns, tools), ()
    if not getattr(tokenizer, "chat_template", None):
        with _encoding:
            encoded = tokenizer(_alpaca(turns, is_continued=is_continued), split_special_tokens=True)
        return list(encoded["input_ids"])
    refusals: list[Exception] = []
    for variant in (turns, _alternating(turns)):
        try:
            with _encoding:
                token_ids: Any = tokenizer.apply_chat_template(
                    variant,
                    tools=list(tools) or None,
                    add_generation_prompt=not is_continued,
                    continue_final_message=is_continued,
                    tokenize=True,
                    return_dict=False,
                    # Sanitizing changes nothing where there is nothing to sanitize, and encodes twice.
                    sanitize_control_tokens=_names_control_tokens(tokenizer, [variant, tools, template_kwargs]),
                    **(template_kwargs or {}),
                )
            return list(token_ids)
        except jinja2.TemplateError as error:
            refusals.append(error)
    raise InvalidRequestError(
        f"The chat template refuses these messages ({', '.join(turn['role'] for turn in turns)}): {refusals[0]}"
    ) from refusals[0]


def _names_control_tokens(tokenizer: PreTrainedTokenizerBase, parts: Any) -> bool:
    """Say whether a text among a prompt's parts holds what might be a control token of the tokenizer's."""
    pattern = _control_tokens(tokenizer, len(tokenizer))
    return any(pattern.search(text) for text in _texts(parts))


@lru_cache(maxsize=32)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> re.Pattern[str]:  # noqa: ARG001 - a tokenizer that grew is read again
    """Match every added token but blanks that are no special tokens; control tokens are some of these."""
    added = tokenizer.added_tokens_decoder.values()
    contents = [token.content for token in added if token.special or not token.content.isspace()]
    return re.compile("|".join(map(re.escape, contents)) or "(?!)")


def _texts(parts: Any) -> Iterator[str]:
    """Yield the texts among nested values."""
    if isinstance(parts, str):
        yield parts
    elif isinstance(parts, dict):
        yield from _texts(list(parts.values()))
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from _texts(part)


def _alternating(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    """Merge turns that follow one of the same role, the system's into the user's that follows."""
    merged: list[ChatTurn] = []
    for turn in turns:
        role = "user" if turn["role"] in {"system", "tool"} else turn["role"]
        if merged and merged[-1]["role"] == role:
            merged[-1] = {"role": role, "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append({**turn, "role": role})
    return merged


def _alpaca(turns: Sequence[ChatTurn], *, is_continued: bool) -> str:
    """Render turns as Alpaca does: the system's in place of the preamble, each other under its heading."""
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    sections = systems or [_ALPACA_PREAMBLE]
    sections += [
        f"{_ALPACA_HEADINGS.get(turn['role'], '### Input:')}\n{turn['content']}"
        for turn in turns
        if turn["role"] != "system"
    ]
    if not is_continued:
        sections.append("### Response:\n")
    return "\n\n".join(sections)
