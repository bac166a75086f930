"""Reading answers by a tokenizer's own `response_template`, with transformers' parser for it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.readers import Reasoning
from langchain_lora_retriever.output.tool_calls import invalid_call, new_call_id, whole_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from langchain_core.messages.tool import ToolCallChunk
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.output.readers import Piece
    from langchain_lora_retriever.output.tools import Tool

__all__ = ["REASONING", "TemplateReader", "response_template"]

CALLS, CONTENT = "tool_calls", "content"
REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
_MALFORMED = (ValueError, KeyError, TypeError)  # what the parser raises for a call that is not what its template says


def response_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the tokenizer's description of the model's answers, if it has one."""
    template: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    return template if hasattr(tokenizer, "get_response_parser") else None  # transformers before 5.20 has none


class TemplateReader:
    """Finds reasoning, answer and tool calls by the tokenizer's `response_template`.

    It reads text that still holds the special tokens, because they are what a template goes by. Reasoning and answer
    are passed on as they come, without the white space around them. A call is passed on when it is whole, for only
    then its arguments have types; one that does not parse, or is cut off, becomes an invalid call.

    Args:
        tokenizer: The base model's; it has a `response_template`.
        prefix: The prompt as text, which may have begun the answer (with an opening reasoning tag, say).
        tools: Tools the model may call; without any, a call is text like any other.

    Raises:
        InvalidRequestError: If the template is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str, tools: Sequence[Tool] = ()) -> None:
        template = response_template(tokenizer)
        assert template is not None, "the caller looks whether there is one"
        # An answer that lacks a field is reported as it is, not refused.
        fields = {name: {**field, "optional": True} for name, field in template["fields"].items()}
        if not tools:
            fields.pop(CALLS, None)
        template = {**template, "fields": fields}
        self._new_parser = partial(tokenizer.get_response_parser, template, tools=list(tools) or None)
        try:
            self._parser: Any = self._new_parser(prefix=prefix)
        except ValueError as error:
            raise InvalidRequestError(
                f"The tokenizer's response_template cannot be used: {error}. Correct it, or set it to None to have "
                "answers read without it."
            ) from error
        self._blanks = ""  # white space that belongs to a region only if more of the region follows
        self._is_at_start = False
        self._call: str | None = None  # the arguments of an open call
        self._num_calls = 0
        for event in self._parser.initial_events:
            self._follow(event)

    def push(self, text: str) -> list[Piece]:
        """Read more text; return reasoning, answer and whole calls."""
        # One character at a time, so that the parser, which drops all it found where it fails, has found nothing else.
        return _joined(piece for char in text for piece in self._feed(char))

    def finish(self, *, is_cut_off: bool) -> list[Piece]:
        """Return what was held back; a call that was cut off becomes an invalid one."""
        if self._call is not None and is_cut_off:
            return [self._break()]
        try:
            _, events = self._parser.finalize()
        except _MALFORMED:
            return [self._break()]
        return _joined(piece for event in events for piece in self._follow(event))

    def _feed(self, char: str) -> list[Piece]:
        try:
            events = self._parser.feed(char)
        except _MALFORMED:
            return [self._break()]
        return [piece for event in events for piece in self._follow(event)]

    def _follow(self, event: Mapping[str, Any]) -> list[Piece]:
        kind, field = event["type"], event["field"]
        if kind == "region_open":
            self._blanks, self._is_at_start = "", True
            if field == CALLS:
                self._call = ""
        elif kind == "region_close" and field == CALLS:
            self._call = None
            values = event["value"] if isinstance(event["value"], list) else [event["value"]]
            return [self._whole(value) for value in values]
        elif kind == "region_chunk" and field == CALLS:
            self._call = f"{self._call}{event['text']}"
        elif kind == "region_chunk" and (field == CONTENT or field in REASONING):
            text = self._trimmed(event["text"])
            if text:
                return [text if field == CONTENT else Reasoning(text)]
        return []

    def _trimmed(self, text: str) -> str:
        """Drop white space at a region's start, and hold it back at its end."""
        text = self._blanks + text
        if self._is_at_start:
            text = text.lstrip()
            self._is_at_start = not text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        return kept

    def _whole(self, value: Any) -> ToolCallChunk:
        self._num_calls += 1
        try:
            return whole_call(value.get("function", value), id_=new_call_id(), index=self._num_calls)
        except (KeyError, TypeError, AttributeError):
            return invalid_call(repr(value), id_=new_call_id(), index=self._num_calls)

    def _break(self) -> ToolCallChunk:
        """Report the open call as an invalid one, and go on with a parser that has not met it."""
        text, self._call = self._call or "", None
        self._parser = self._new_parser(prefix="")
        self._num_calls += 1
        return invalid_call(text, id_=new_call_id(), index=self._num_calls)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Put neighbouring texts of one kind together."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + piece.text)
        else:
            joined.append(piece)
    return joined
