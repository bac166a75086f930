"""Requests and answers of `/v1/chat/completions`, as OpenAI's protocol has them.

What is asked is checked here and becomes settings of a call; what the engine gives becomes objects of the protocol. A
parameter is heeded, or refused in words, or without effect on any answer by its meaning (`user`, `store`).
"""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from langchain_core.messages import AIMessage, convert_to_messages
from langchain_core.messages.tool import invalid_tool_call
from pydantic import BaseModel, ConfigDict, Field

from langchain_lora_retriever.chat.messages import check_messages, check_num_messages
from langchain_lora_retriever.engine.api import Delta
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.readers import Reasoning
from langchain_lora_retriever.output.stream import logprobs_content
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.messages import BaseMessage

    from langchain_lora_retriever.chat.begin import Begun, Run
    from langchain_lora_retriever.engine.api import Completion, Usage
    from langchain_lora_retriever.output.readers import Piece

__all__ = ["AUTO", "ChatRequest", "ChunkWriter", "RouteRequest", "RoutingFields", "completion", "event"]

AUTO = "auto"
"""The model's name that leaves the choice of adapters to routing."""

_Item = TypeVar("_Item")
_List: TypeAlias = Annotated[list[_Item], Field(fail_fast=True)]  # a body may have millions of wrong ones


class RoutingFields(BaseModel):
    """What is this server's own, in the field `lora_retriever` of a request; as in `RoutingOptions`."""

    model_config = ConfigDict(extra="forbid")

    adapters: _List[str] | None = None
    exclude_adapters: _List[str] | None = None
    composition: str | None = None
    top_k: int | None = None
    weights: str | None = None
    weight_temperature: float | None = None
    min_score: float | Literal["auto"] | None = None
    route_text: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The settings of a call that were given."""
        return self.model_dump(exclude_unset=True)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for chat completions."""

    model_config = ConfigDict(extra="forbid")

    messages: _List[dict[str, Any]]
    model: str = AUTO
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | _List[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: _List[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    # Asked for by many clients at values that change nothing.
    frequency_penalty: Literal[0] | None = Field(default=None, description="Not supported but as 0.")
    presence_penalty: Literal[0] | None = Field(default=None, description="Not supported but as 0.")
    logit_bias: dict[str, float] | None = None
    modalities: _List[Literal["text"]] | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    verbosity: str | None = None
    # What vLLM and others take too.
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: _List[int] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    lora_retriever: RoutingFields | None = None

    def to_messages(self) -> list[BaseMessage]:
        """The prompt.

        Raises:
            InvalidRequestError: If it is no list of messages.
        """
        return _to_messages(self.messages)

    def arguments(self, *, max_n: int, timeout: float) -> dict[str, Any]:
        """The settings of a call that this request asks for.

        Args:
            max_n: Most answers.
            timeout: Seconds it may take.

        Raises:
            InvalidRequestError: If something is asked for that is not served.
        """
        if self.n is not None and self.n > max_n:
            raise InvalidRequestError(f"n={self.n} is not allowed: this server gives at most {max_n} answers.")
        if self.logit_bias:
            raise InvalidRequestError("logit_bias is not supported: leave it out.")
        if None not in {self.max_tokens, self.max_completion_tokens} and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ: pass one of them.")
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "sampling_top_k": self.top_k,
            "max_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            "n": self.n,
            "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "repetition_penalty": self.repetition_penalty,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "tools": self.tools,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.response_format,
            "chat_template_kwargs": self.chat_template_kwargs,
            "model": None if self.model == AUTO else self.model,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {"timeout": timeout, **given, **_own(self.lora_retriever)}


class RouteRequest(BaseModel):
    """A request for the decision alone: `input`, or the messages of a chat."""

    model_config = ConfigDict(extra="forbid")

    input: str | None = None
    messages: _List[dict[str, Any]] | None = None
    lora_retriever: RoutingFields | None = None

    def arguments(self) -> dict[str, Any]:
        """The settings of a call that this request asks for."""
        return _own(self.lora_retriever)

    def to_messages(self) -> list[BaseMessage]:
        """The prompt, as `check_messages` has let it pass.

        Raises:
            InvalidRequestError: If there is none, or two, or it is no list of messages.
        """
        if (self.input is None) == (self.messages is None):
            raise InvalidRequestError("Pass either input, a text, or messages.")
        given = [{"role": "user", "content": self.input}] if self.messages is None else self.messages
        if not given:
            raise InvalidRequestError("The message list is empty: pass at least one message.")
        messages = _to_messages(given)
        check_messages(messages)
        return messages


def _own(fields: RoutingFields | None) -> dict[str, Any]:
    return {} if fields is None else fields.arguments()


def _to_messages(messages: Sequence[dict[str, Any]]) -> list[BaseMessage]:
    check_num_messages(messages)
    converted: list[BaseMessage] = []
    for place, message in enumerate(messages):
        try:
            converted.append(_to_message(message))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InvalidRequestError(
                f"messages.{place} {shown(message)} cannot be understood ({why:.300}): pass a role (system, developer, "
                "user, assistant or tool) and content; a tool's result has the tool_call_id of its call, a call an id "
                "and a function with name and arguments."
            ) from error
    return converted


def _to_message(message: dict[str, Any]) -> BaseMessage:
    """Read a message; past calls are taken as they were given out, those that broke off too."""
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, list):
        return _converted(message)
    whole: list[Any] = []
    broken: list[dict[str, Any]] = []
    for call in calls:
        (broken if _is_broken(call) else whole).append(call)
    converted = _converted({"content": None, **message, "tool_calls": whole})  # beside calls there need be no content
    assert isinstance(converted, AIMessage)
    converted.invalid_tool_calls = [
        invalid_tool_call(name=call["function"].get("name"), args=call["function"]["arguments"], id=call.get("id"))
        for call in broken
    ]
    return converted


def _converted(message: dict[str, Any]) -> BaseMessage:
    (converted,) = convert_to_messages([message])
    return converted


def _is_broken(call: Any) -> bool:
    """Whether the arguments of a call are no JSON object, as those that a token limit cuts off."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return False
    try:
        return not isinstance(json.loads(arguments, strict=False), dict)
    except (ValueError, RecursionError):
        return True


class ChunkWriter:
    """Writes the events of one stream.

    Args:
        begun: The call.
        model: What the answer is said to come from.
        tells_usage: Whether a last event says how many tokens were used.
    """

    def __init__(self, begun: Begun, model: str, *, tells_usage: bool) -> None:
        self._begun = begun
        self._base = _base("chat.completion.chunk", model)
        self._tells_usage = tells_usage
        self._usages: list[Usage] = []

    def first(self) -> bytes:
        """The events that come before any token: the role of each answer, and which adapters it runs."""
        return b"".join(
            event(
                {
                    **self._base,
                    "choices": [_chunk_choice(index, {"role": "assistant", "content": ""})],
                    "lora_retriever": self._begun.composition.to_metadata(),
                }
            )
            for index in range(len(self._begun.runs))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events that a delta of answer `index` makes."""
        pieces, finish_reason = self._begun.runs[index].answer.push(delta)
        logprobs = None
        if delta.logprobs:
            logprobs = _logprobs(self._begun, delta.logprobs)
        events: list[dict[str, Any]] = []
        for piece in pieces:
            events.append(_chunk_choice(index, _piece(piece), logprobs))
            logprobs = None
        if finish_reason is not None or logprobs is not None:
            events.append(_chunk_choice(index, {}, logprobs, finish_reason))
        if delta.usage is not None:
            self._usages.append(delta.usage)
        return b"".join(event({**self._base, "choices": [choice]}) for choice in events)

    def last(self) -> bytes:
        """The events that end the stream."""
        usage = b""
        if self._tells_usage:
            usage = event({**self._base, "choices": [], "usage": _usage(self._usages)})
        return usage + b"data: [DONE]\n\n"


def completion(begun: Begun, completions: Sequence[Completion], model: str) -> dict[str, Any]:
    """The whole answer, as a `chat.completion`."""
    return {
        **_base("chat.completion", model),
        "choices": [
            _choice(begun, index, run, done)
            for index, (run, done) in enumerate(zip(begun.runs, completions, strict=True))
        ],
        "usage": _usage([done.usage for done in completions]),
        "lora_retriever": begun.composition.to_metadata(),
    }


def _choice(begun: Begun, index: int, run: Run, done: Completion) -> dict[str, Any]:
    pieces, finish_reason = run.answer.push(Delta(*done))
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, dict):
            _add_call(calls, piece)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls.values())
    logprobs = None if done.logprobs is None else _logprobs(begun, done.logprobs)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def _add_call(calls: dict[int, dict[str, Any]], piece: Any) -> None:
    """Add a part of a tool call to what there is of it."""
    index = piece["index"] or 0
    call = calls.setdefault(index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call["id"] = call["id"] or piece["id"]
    call["function"]["name"] += piece["name"] or ""
    call["function"]["arguments"] += piece["args"] or ""


def _piece(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    function = {"arguments": piece["args"] or ""}
    # Ours are numbered from 1, after the text; those of the protocol among themselves.
    call: dict[str, Any] = {"index": (piece["index"] or 1) - 1, "function": function}
    if piece["id"] is not None:  # a call's first part, and all of one that is malformed
        function["name"] = piece["name"] or ""
        call |= {"id": piece["id"], "type": "function"}
    return {"tool_calls": [call]}


def _chunk_choice(
    index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(begun: Begun, logprobs: Any) -> dict[str, Any]:
    def with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
        made = {"token": entry["token"], "bytes": _bytes(entry, begun), "logprob": entry["logprob"]}
        if "top_logprobs" in entry:
            made["top_logprobs"] = [with_bytes(each) for each in entry["top_logprobs"]]
        return made

    entries = logprobs_content(begun.engine.tokenizer, logprobs)["content"]
    return {"content": [with_bytes(entry) for entry in entries], "refusal": None}


def _bytes(entry: dict[str, Any], begun: Begun) -> list[int] | None:
    """A token's bytes, which may be a part of a character; None if they are not known."""
    if "\ufffd" not in entry["token"]:
        return list(entry["token"].encode())
    written = begun.engine.tokenizer.convert_ids_to_tokens(entry["token_id"])
    by_value = re.fullmatch("<0x([0-9A-F]{2})>", written) if isinstance(written, str) else None
    if by_value is not None:
        return [int(by_value[1], 16)]
    is_byte_level = isinstance(written, str) and all(char in _BYTE_LEVEL for char in written)
    return [_BYTE_LEVEL[char] for char in written] if is_byte_level else None


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies, which are GPT-2's."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Count the prompt once, however many answers it got."""
    num_prompt = max((usage.num_prompt_tokens for usage in usages), default=0)
    num_cached = max((usage.num_cached_tokens for usage in usages), default=0)
    num_output = sum(usage.num_output_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def _base(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def event(value: dict[str, Any]) -> bytes:
    """Write one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
