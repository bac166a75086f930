"""From LangChain messages to what is routed on and what the model reads."""

from __future__ import annotations

import inspect
import json
import re
import threading
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

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
from transformers import PreTrainedTokenizerBase

from langchain_lora_retriever.errors import InvalidRequestError, PromptTooLongError
from langchain_lora_retriever.output.dialects import add_tools_section, dialect_of
from langchain_lora_retriever.support.forking import after_fork
from langchain_lora_retriever.support.nesting import check_json, check_texts, check_unicode, walk
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.output.dialects import ChatTurn, Dialect
    from langchain_lora_retriever.output.tools import Tool

__all__ = [
    "check_length",
    "check_messages",
    "check_num_messages",
    "content_text",
    "encode_chat",
    "encode_text",
    "is_encoding",
    "routing_text",
    "to_chat",
]

_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_HEADINGS = {"user": "### Instruction:", "assistant": "### Response:", "tool": "### Input:"}
_MEDIA_BLOCKS = frozenset({"image", "image_url", "input_image", "audio", "input_audio", "video", "file", "document"})
# Past calls, which become `tool_calls` of their turn, with the names that providers give to a call's parts.
_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call"})
_CALL_IDS, _CALL_ARGUMENTS = ("id", "call_id"), ("args", "input", "arguments")
# Blocks that the model is not shown again.
_SILENT_BLOCKS = frozenset({"reasoning", "thinking", "redacted_thinking"})
_NOTIFIER = "lc_source"
"""Where langchain-core's `add_notification_metadata` names the part of an agent that wrote a message."""
_ROLES = {"human": "user", "ai": "assistant", "developer": "system", "function": "tool"}
_ROLE_PATTERN = re.compile(r"[A-Za-z][\w-]{,63}")

_MAX_MESSAGES = 10_000
"""Messages of one prompt."""
_MAX_PLAIN_TEXT = 1 << 20
"""Characters of a plain text whose tokens are asked for."""
_MAX_CONTROL_TOKENS = 4_096
"""Control tokens that may stand in the text of one prompt; each is encoded by itself."""
_PIECE = 16_384
"""Characters that are encoded at once where a long prompt's tokens are counted beforehand."""
_SPLIT = 16
"""Tokens that a text may have fewer of than its two halves."""
_NEAR = 4
"""Characters per token up to which a prompt is encoded without a count."""

# What transformers takes itself; the rest are variables of the template.
_RESERVED_KWARGS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
_RESERVED_KWARGS -= {"documents"}
# What a template's code may raise over values it did not expect.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

# A fast tokenizer switches its treatment of special tokens in place while it encodes a sanitized chat, and refuses
# to be borrowed twice: whoever encodes holds its lock, well under a millisecond where the prompt is short.
_locks: WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = WeakKeyDictionary()


after_fork(_locks.clear)  # a thread that held one is not there


def _lock_of(tokenizer: PreTrainedTokenizerBase) -> threading.Lock:
    return _locks.get(tokenizer) or _locks.setdefault(tokenizer, threading.Lock())


def is_encoding(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer is in use by another thread just now, so that whoever wants it would have to wait."""
    return _lock_of(tokenizer).locked()


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
    if not isinstance(kind, str):
        kind = shown(kind)
    if kind in _SILENT_BLOCKS or (kind in _CALL_BLOCKS and isinstance(message, AIMessage)):
        return None
    if kind in {"text", "text-plain", "output_text", "input_text"} and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _MEDIA_BLOCKS:
        raise InvalidRequestError(
            f"A {message.type} message holds content of type {kind!r}, but the base model reads text only. "
            "Pass text blocks, or describe or transcribe the file first."
        )
    if isinstance(message, ToolMessage):
        return json.dumps(block, ensure_ascii=False, default=shown)
    raise InvalidRequestError(
        f"A {message.type} message holds a content block of type {kind!r}; text blocks "
        '({"type": "text", "text": ...}) and plain strings are what a text model can be given.'
    )


def routing_text(messages: Sequence[BaseMessage]) -> str:
    """Return the text that adapters are retrieved for: that of the last human message.

    After a tool's result it is still the human's, so an agent keeps its adapters through a loop of calls. What an agent
    writes in the human's name (a summary of the conversation, news of a task in the background) is none of it, unless
    there is nothing else. Where no human has spoken it is the last message that has any text.

    Args:
        messages: Messages that `check_messages` has let pass.
    """
    humans = [
        message
        for message in messages
        if isinstance(message, HumanMessage) or (isinstance(message, ChatMessage) and message.role == "user")
    ]
    typed = [message for message in humans if not isinstance(message.additional_kwargs.get(_NOTIFIER), str)]
    if humans:
        return content_text((typed or humans)[-1])
    return next((text for message in reversed(messages) if (text := content_text(message))), "")


def to_chat(messages: Sequence[BaseMessage]) -> list[ChatTurn]:
    """Convert LangChain messages to chat-template turns.

    Raises:
        InvalidRequestError: If there is no message, or one that a text model cannot be given.
    """
    if not messages:
        raise InvalidRequestError("The message list is empty: pass at least one message.")
    check_num_messages(messages)
    check_messages(messages)
    return [_to_turn(message) for message in messages]


def check_messages(messages: Sequence[BaseMessage]) -> None:
    """Refuse what is no list of messages, and texts in them that are no Unicode or nest too deep.

    Raises:
        InvalidRequestError: For the first that cannot be read.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, BaseMessage) for message in messages):
        raise InvalidRequestError(f"{shown(messages)} is not allowed: pass a list of LangChain messages.")
    for message in messages:
        what = f"A {message.type} message"
        if isinstance(message.content, str) and not message.additional_kwargs and not isinstance(message, AIMessage):
            check_unicode(message.content, what)
            continue
        check_texts([message.content, getattr(message, "tool_calls", None), message.additional_kwargs], what)
        for block in message.content:
            if isinstance(block, dict) and not isinstance(block.get("type", ""), str):
                raise InvalidRequestError(f"{what} holds a block of type {shown(block['type'])}: a type is a string.")


def check_num_messages(messages: Sequence[Any]) -> None:
    """Refuse more messages than one prompt may have.

    Raises:
        PromptTooLongError: If there are too many.
    """
    if len(messages) > _MAX_MESSAGES:
        raise PromptTooLongError(
            f"The prompt has {len(messages):,} messages, but at most {_MAX_MESSAGES:,} are allowed: summarise or drop "
            "the oldest."
        )


def check_length(tokenizer: PreTrainedTokenizerBase, chat: Sequence[ChatTurn], *, max_num_tokens: int) -> None:
    """Refuse a prompt that cannot fit, before it is rendered and encoded whole.

    Every turn takes a token at least, and no token covers more characters than the longest there is. Where that leaves
    it open, and the prompt is long, tokens are counted piece by piece until there are too many.

    Args:
        tokenizer: The base model's tokenizer.
        chat: Turns, oldest first.
        max_num_tokens: Maximum number of tokens of prompt and answer together.

    Raises:
        PromptTooLongError: If the prompt has more turns, characters or tokens than fit.
        InvalidRequestError: If a past call holds what is no JSON.
    """
    num_characters = sum(len(turn["content"]) + check_json(turn.get("tool_calls"), "A past call") for turn in chat)
    if len(chat) <= max_num_tokens and num_characters <= max_num_tokens:
        return
    longest = _longest_token(tokenizer, len(tokenizer))
    if len(chat) > max_num_tokens or num_characters > longest * max_num_tokens:
        raise PromptTooLongError(
            f"The prompt has {len(chat):,} messages and {num_characters:,} characters, but prompt and answer together "
            f"may have at most {max_num_tokens:,} tokens, of which none covers more than {longest} characters: shorten "
            "the prompt, or raise max_model_len or kv_cache_bytes."
        )
    if num_characters <= _NEAR * max_num_tokens:
        return
    num_tokens = 0
    for piece in (turn["content"][at : at + _PIECE] for turn in chat for at in range(0, len(turn["content"]), _PIECE)):
        with _lock_of(tokenizer):  # others may encode between two pieces
            encoded = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)
        num_tokens += max(0, len(encoded["input_ids"]) - _SPLIT)
        if num_tokens >= max_num_tokens:
            raise PromptTooLongError(
                f"The prompt has {num_characters:,} characters, more than {max_num_tokens:,} tokens, which is the most "
                "that prompt and answer together may have: shorten it, or raise max_model_len or kv_cache_bytes."
            )


@lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> int:  # noqa: ARG001 - a tokenizer that grew is read again
    return max(map(len, tokenizer.get_vocab()), default=1)


def _to_turn(message: BaseMessage) -> ChatTurn:
    turn: ChatTurn = {"role": _role(message), "content": content_text(message)}
    if isinstance(message, AIMessage):
        calls = _past_calls(message)
        if calls:
            turn["tool_calls"] = [
                {"type": "function", "id": id_, "function": {"name": name, "arguments": arguments}}
                for id_, name, arguments in calls
            ]
    if isinstance(message, ToolMessage | FunctionMessage):
        turn["name"] = message.name
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _past_calls(message: AIMessage) -> list[_PastCall]:
    """Return every call, wherever a message holds it; what one place repeats of another counts once."""
    raw = message.additional_kwargs.get("tool_calls")
    function_call = message.additional_kwargs.get("function_call")
    places = (
        [_PastCall(call["id"], call["name"], call["args"]) for call in message.tool_calls]
        + [_PastCall(call["id"], call["name"], call["args"]) for call in message.invalid_tool_calls],
        [_read_call(block) for block in _call_blocks(message)],
        [
            _read_call({"id": call.get("id"), **call["function"]})
            for call in (raw if isinstance(raw, list) else ())
            if isinstance(call, dict) and isinstance(call.get("function"), dict)
        ],
        [_read_call(function_call)] if isinstance(function_call, dict) else [],
    )
    calls: list[_PastCall] = []
    ids: set[str] = set()
    contents: set[str] = set()
    for place in places:
        check_json(place, "A past call")
        new = [
            call
            for call in place
            if (call.id is None or repr(call.id) not in ids) and (call.id is not None or call.content not in contents)
        ]
        calls += new
        ids |= {repr(call.id) for call in new}
        contents |= {call.content for call in new}
    return calls


class _PastCall(NamedTuple):
    """A call as providers hand it back: nothing about it is sure."""

    id: Any
    name: Any
    arguments: Any

    @property
    def content(self) -> str:
        """By what a call without an id is known again."""
        return json.dumps([self.name, _read_arguments(self.arguments)], sort_keys=True, default=str)


def _read_call(block: Mapping[str, Any]) -> _PastCall:
    id_ = next((block[key] for key in _CALL_IDS if block.get(key) is not None), None)
    given = (block[key] for key in _CALL_ARGUMENTS if block.get(key) is not None)
    return _PastCall(id_, block.get("name"), _read_arguments(next(given, {})))


def _call_blocks(message: AIMessage) -> list[dict[str, Any]]:
    """Return the blocks of calls in a message's content; pieces of one call are put together."""
    blocks: list[dict[str, Any]] = []
    pieces: dict[str, dict[str, Any]] = {}
    for block in message.content if isinstance(message.content, list) else ():
        if not isinstance(block, dict) or block.get("type") not in _CALL_BLOCKS:
            continue
        index = repr(block.get("index"))
        if block["type"] == "tool_call_chunk" and block.get("index") is not None and index in pieces:
            pieces[index]["args"] = f"{pieces[index].get('args') or ''}{block.get('args') or ''}"
            continue
        blocks.append(dict(block))
        if block["type"] == "tool_call_chunk":
            pieces[index] = blocks[-1]
    return blocks


def _read_arguments(arguments: Any) -> Any:
    """Read arguments that are JSON; what is none stays as it is."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments


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
            raise InvalidRequestError(f"The role {shown(message.role)} is not allowed: pass one word, such as 'user'.")
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
        InvalidRequestError: If the template refuses the turns, or `template_kwargs` would replace an argument of it.
    """
    own = _RESERVED_KWARGS & (template_kwargs or {}).keys()
    if own:
        raise InvalidRequestError(
            f"chat_template_kwargs may not hold {', '.join(map(repr, sorted(own)))}: these decide how a prompt is "
            "made. Pass variables that the model's template reads, such as enable_thinking=False."
        )
    turns = list(chat)
    is_continued = turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls")
    if is_continued and not turns[-1]["content"]:
        turns, is_continued = turns[:-1], False
        if not turns:
            raise InvalidRequestError("The only message is an empty answer: pass a message with text.")
    if not (dialect or dialect_of(tokenizer)).by_template:
        turns, tools = add_tools_section(turns, tools), ()
    if not getattr(tokenizer, "chat_template", None):
        with _lock_of(tokenizer):
            encoded = tokenizer(_alpaca(turns, is_continued=is_continued), split_special_tokens=True)
        return list(encoded["input_ids"])
    is_sanitized = _names_control_tokens(tokenizer, [turns, tools, template_kwargs])
    refusals: list[Exception] = []
    for variant in (turns, _alternating(turns)):
        try:
            with _lock_of(tokenizer):
                token_ids: Any = tokenizer.apply_chat_template(
                    variant,
                    tools=list(tools) or None,
                    add_generation_prompt=not is_continued,
                    continue_final_message=is_continued,
                    tokenize=True,
                    return_dict=False,
                    # Sanitizing changes nothing where there is nothing to sanitize, and encodes twice.
                    sanitize_control_tokens=is_sanitized,
                    **(template_kwargs or {}),
                )
            return list(token_ids)
        except _REFUSALS as error:
            refusals.append(error)
    raise InvalidRequestError(
        f"The chat template refuses these messages ({', '.join(turn['role'] for turn in turns[:8])}"
        f"{', ...' * (len(turns) > 8)}): {refusals[0]}"
    ) from refusals[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a plain text, without a template.

    Raises:
        InvalidRequestError: If it is none, no Unicode, or longer than what may be encoded at once.
    """
    if not isinstance(text, str):
        raise InvalidRequestError(f"text={shown(text)} is not allowed: pass a string.")
    if len(text) > _MAX_PLAIN_TEXT:
        raise InvalidRequestError(
            f"The text has {len(text):,} characters, but at most {_MAX_PLAIN_TEXT:,} are encoded at once: pass parts "
            "of it, and add up their tokens."
        )
    check_unicode(text, "The text")
    with _lock_of(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False))


def _names_control_tokens(tokenizer: PreTrainedTokenizerBase, parts: Any) -> bool:
    """Say whether a text among a prompt's parts holds what might be a control token of the tokenizer's.

    Raises:
        InvalidRequestError: If a key holds one, which a template would write as it is, or there are very many.
    """
    pattern = _control_tokens(tokenizer, len(tokenizer))
    num_found = 0
    for part in walk(parts, "The prompt"):
        if isinstance(part, str):
            num_found += sum(1 for _ in islice(pattern.finditer(part), _MAX_CONTROL_TOKENS + 1 - num_found))
            if num_found > _MAX_CONTROL_TOKENS:
                raise InvalidRequestError(
                    f"The prompt's text holds more than {_MAX_CONTROL_TOKENS:,} control tokens, such as "
                    f"{shown(next(pattern.finditer(part))[0])}: take them out, or split the prompt."
                )
        elif isinstance(part, dict):
            for key in part:
                if isinstance(key, str) and pattern.search(key):
                    raise InvalidRequestError(
                        f"The key {shown(key)}, of a call's arguments or a tool's schema, holds a control token of the "
                        "base model's: rename it."
                    )
    return num_found > 0


@lru_cache(maxsize=32)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> re.Pattern[str]:  # noqa: ARG001 - a tokenizer that grew is read again
    """Match every added token but blanks that are no special tokens; control tokens are some of these."""
    added = tokenizer.added_tokens_decoder.values()
    contents = [token.content for token in added if token.special or not token.content.isspace()]
    return re.compile("|".join(map(re.escape, contents)) or "(?!)")


def _alternating(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    """Merge turns that follow one of the same role, the system's into the user's that follows."""
    merged: list[ChatTurn] = []
    parts: list[list[str]] = []
    for turn in turns:
        role = "user" if turn["role"] in {"system", "tool"} else turn["role"]
        if merged and merged[-1]["role"] == role:
            merged[-1] = {"role": role, "content": ""}
            parts[-1].append(turn["content"])
        else:
            merged.append({**turn, "role": role})
            parts.append([turn["content"]])
    for turn, contents in zip(merged, parts, strict=True):
        turn["content"] = "\n\n".join(contents)
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
