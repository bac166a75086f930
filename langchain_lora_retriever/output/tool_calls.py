"""Tool calls in text, as Hermes and Qwen write them: a JSON object between `<tool_call>` tags."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any

from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.readers import num_undecided
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from langchain_lora_retriever.output.readers import Piece

__all__ = ["CALL_CLOSE", "CALL_OPEN", "ToolCallParser", "call_text", "invalid_call", "new_call_id", "whole_call"]

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def call_text(name: str | None, arguments: Any) -> str:
    """Write a call as the model writes it. Arguments that were not JSON stand as they came.

    Raises:
        InvalidRequestError: If the arguments cannot be written as JSON.
    """
    if isinstance(arguments, str):
        body = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
    else:
        try:
            body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"The arguments of the past call of {shown(name)} are no JSON: {error!s:.200}"
            ) from error
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


def new_call_id() -> str:
    """Make an id that no other call has."""
    return f"call_{uuid.uuid4().hex}"


_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of pairs, which escapes in JSON may stand for, and no text has


def whole_call(call: Any, *, id_: str, index: int) -> ToolCallChunk:
    """Make a call of an object with a name and arguments (or parameters), which may themselves be JSON text.

    Raises:
        KeyError: If there is no name.
        TypeError: If it is no object, or the name is no text.
    """
    name = call["name"]
    if not isinstance(name, str) or _SURROGATES.search(name):
        raise TypeError(f"the name {name!r} is not a string")
    arguments = call.get("arguments", call.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text = _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return tool_call_chunk(name=name, args=text, id=id_, index=index)


def invalid_call(text: str, *, id_: str, index: int) -> ToolCallChunk:
    """Make a call that LangChain will report as invalid, whatever its text is."""
    scan = _JsonScan()
    scan.push(text)
    return tool_call_chunk(name=None, args=text.strip() + _mismatch(scan), id=id_, index=index)


class ToolCallParser:
    """Finds calls in text while it is generated.

    Text before a call is passed on as it comes, except what may turn out to be a tag. Of a call the name comes first,
    then its arguments in pieces. Calls are numbered from 1: LangChain gives the text before them number 0.
    """

    def __init__(self) -> None:
        self._held = ""
        self._call: _OpenCall | None = None
        self._num_calls = 0

    def push(self, text: str) -> Iterator[Piece]:
        """Read more text; yield text that belongs to no call, and pieces of calls."""
        self._held += text
        while True:
            if self._call is None:
                before, tag, after = self._held.partition(CALL_OPEN)
                if not tag:
                    keep = num_undecided(self._held, CALL_OPEN)
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

    def finish(self, *, is_cut_off: bool) -> Iterator[Piece]:  # noqa: ARG002 - what has no closing tag is cut off
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
        self._id = new_call_id()
        self._has_head = False
        self._scan = _JsonScan()
        self.is_closed = False

    def push(self, text: str) -> Generator[ToolCallChunk, None, str]:
        """Read text, yield pieces, and return the text not used yet."""
        if not self._has_head:
            body, tag, rest = text.partition(CALL_CLOSE)
            head = _HEAD.match(text)
            name = _parsed(head[1]) if head is not None and (not tag or head.end() <= len(body)) else None
            if head is not None and name is not None:
                self._has_head = True
                yield tool_call_chunk(name=name, args="", id=self._id, index=self._index)
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
            yield invalid_call(text, id_=self._id, index=self._index)
        elif not self._scan.is_done:
            yield tool_call_chunk(name=None, args=_mismatch(self._scan), id=None, index=self._index)

    def _whole(self, body: str) -> ToolCallChunk:
        """Read a call whose keys come in another order, or that is no JSON at all."""
        try:
            return whole_call(json.loads(body), id_=self._id, index=self._index)
        except (ValueError, KeyError, TypeError, RecursionError):
            return invalid_call(body, id_=self._id, index=self._index)


def _parsed(quoted: str) -> str | None:
    """Read a JSON string; None if it is none, by an escape that there is not, or that stands for half a character."""
    try:
        read = str(json.loads(quoted, strict=False))
    except ValueError:
        return None
    return None if _SURROGATES.search(read) else read


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
