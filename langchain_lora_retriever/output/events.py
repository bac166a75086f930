"""From the engine's deltas to the events of LangChain's v3 protocol: content blocks that begin, grow and end.

LangChain makes these events of message chunks, too, but by less than is known here: a block would end with the answer
and not where the next begins, text after a tool call would be joined with the text before it, and of
log-probabilities only the last chunk's would be left.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from langchain_lora_retriever.output.readers import Reasoning
from langchain_lora_retriever.output.stream import finish_metadata, logprobs_content, usage_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from langchain_core.messages.tool import ToolCallChunk
    from langchain_protocol.protocol import MessagesData
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Delta
    from langchain_lora_retriever.output.readers import Piece
    from langchain_lora_retriever.output.stream import Answer

__all__ = ["AnswerEvents"]


class AnswerEvents:
    """Turns the engine's deltas of one request into events.

    Args:
        answer: Reads the deltas.
        tokenizer: The base model's, to spell out log-probabilities.
        metadata: `response_metadata` that does not depend on the answer.
        message_id: The message's id.
        tells_usage: Whether the last event says how many tokens were used.
    """

    def __init__(
        self,
        answer: Answer,
        tokenizer: PreTrainedTokenizerBase,
        metadata: Mapping[str, Any],
        *,
        message_id: str,
        tells_usage: bool = True,
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._metadata = metadata
        self._message_id = message_id
        self._tells_usage = tells_usage
        self._is_started = False
        self._num_blocks = 0
        self._block: _Block | None = None
        self._reasoning = ""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> Iterator[MessagesData]:
        """Yield the events that a delta makes."""
        for event in self._events(delta):
            yield cast("MessagesData", event)

    def _events(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if not self._is_started:
            self._is_started = True
            metadata = {"provider": self._metadata["model_provider"], "model": self._metadata["model_name"]}
            yield {"event": "message-start", "role": "ai", "id": self._message_id, "metadata": metadata}
        pieces, finish_reason = self._answer.push(delta)
        if delta.logprobs:
            self._logprobs += logprobs_content(self._tokenizer, delta.logprobs)["content"]
        for piece in pieces:
            yield from self._grow(piece)
        if finish_reason is None:
            return
        yield from self._end_block()
        metadata = finish_metadata(self._metadata, finish_reason)
        reasons = {name: metadata[name] for name in ("finish_reason", "normalized_finish_reason")}
        if self._logprobs:
            metadata["logprobs"] = {"content": self._logprobs}
        finish = {"event": "message-finish", "metadata": metadata, **reasons}
        if delta.usage and self._tells_usage:
            finish["usage"] = usage_metadata(delta.usage)
        if self._reasoning:
            finish["additional_kwargs"] = {"reasoning_content": self._reasoning}
        yield finish

    def _grow(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add a piece to the block that is open, or end that and begin one for it."""
        key = piece["index"] if isinstance(piece, dict) else type(piece)
        if not piece or piece == Reasoning(""):
            return
        if self._block is None or self._block.key != key:
            yield from self._end_block()
            self._block = _Block(self._num_blocks, key, piece)
            self._num_blocks += 1
            yield self._block.start()
        if isinstance(piece, Reasoning):
            self._reasoning += piece.text
        delta = self._block.grow(piece)
        if delta is not None:
            yield delta

    def _end_block(self) -> Iterator[dict[str, Any]]:
        if self._block is not None:
            yield self._block.end()
            self._block = None


class _Block:
    """One content block.

    Args:
        index: Its place in the message.
        key: What the pieces have in common that belong to it: their type, or the call's number.
        first: The first of them.
    """

    def __init__(self, index: int, key: object, first: Piece) -> None:
        self.key = key
        self._index = index
        self._call: ToolCallChunk | None = first if isinstance(first, dict) else None
        self._type = "reasoning" if isinstance(first, Reasoning) else "text"
        self._text = ""

    def start(self) -> dict[str, Any]:
        """The event that it begins."""
        if self._call is None:
            return self._event("start", "content", {"type": self._type, self._type: ""})
        named = {name: self._call[name] for name in ("id", "name", "index")}
        return self._event("start", "content", {"type": "tool_call_chunk", **named, "args": ""})

    def grow(self, piece: Piece) -> dict[str, Any] | None:
        """Take a piece in; the event of that, unless there is nothing in it."""
        if isinstance(piece, dict):
            kind, field, text = "tool-call", "args", piece["args"] or ""
        elif isinstance(piece, Reasoning):
            kind, field, text = "reasoning", "reasoning", piece.text
        else:
            kind, field, text = "text", "text", piece
        self._text += text
        return self._event("delta", "delta", {"type": f"{kind}-delta", field: text}) if text else None

    def end(self) -> dict[str, Any]:
        """The event that it is whole: arguments of calls are read now."""
        if self._call is None:
            return self._event("finish", "content", {"type": self._type, self._type: self._text})
        named = {"id": self._call["id"], "name": self._call["name"]}
        arguments = _parsed(self._text)
        if arguments is None or not named["name"]:
            said = "The arguments are no JSON object."
            return self._event(
                "finish", "content", {"type": "invalid_tool_call", **named, "args": self._text, "error": said}
            )
        return self._event("finish", "content", {"type": "tool_call", **named, "args": arguments})

    def _event(self, kind: str, field: str, value: dict[str, Any]) -> dict[str, Any]:
        return {"event": f"content-block-{kind}", "index": self._index, field: value}


def _parsed(arguments: str) -> dict[str, Any] | None:
    """Read a call's arguments; None if they are no JSON object."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
