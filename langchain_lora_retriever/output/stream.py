"""From the engine's deltas to LangChain messages: text, reasoning, tool calls, usage and metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from langchain_lora_retriever.output.readers import Reasoning, read
from langchain_lora_retriever.output.reasoning import THINK_CLOSE, THINK_OPEN, ThinkReader, reasoning_state
from langchain_lora_retriever.output.response_template import TemplateReader, response_template
from langchain_lora_retriever.output.tool_calls import CALL_CLOSE, CALL_OPEN, ToolCallParser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Delta, TokenLogprob, Usage
    from langchain_lora_retriever.output.format import AnswerFormat
    from langchain_lora_retriever.output.readers import Piece, Reader

__all__ = [
    "Answer",
    "AnswerStream",
    "answer_readers",
    "finish_metadata",
    "logprobs_content",
    "reads_special_tokens",
    "usage_metadata",
]

_NORMALIZED_FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_call"}
"""OpenAI's words, and those that langchain-core (from 1.8.4 on) has for all providers.

Its `finish_state` is for providers whose answers end unfinished in other ways, of which there is none here.
"""


def answer_readers(
    tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], answer: AnswerFormat
) -> list[Reader]:
    """Choose what finds reasoning and tool calls in one answer; nothing where it can hold neither."""
    readers: list[Reader] = []
    reads_own_calls = answer.dialect is not None and answer.dialect.by_response_template
    if reads_own_calls or (answer.is_free_text and response_template(tokenizer) is not None):
        # A constrained answer begins with what the grammar says, whatever the prompt has opened.
        prefix = str(tokenizer.decode(list(prompt_token_ids))) if answer.is_free_text else ""
        readers.append(TemplateReader(tokenizer, prefix, answer.tools if reads_own_calls else ()))
    elif answer.is_free_text:
        is_open = reasoning_state(tokenizer, prompt_token_ids)
        if is_open is not None:
            readers.append(ThinkReader(is_open=is_open))
    if answer.tools and not reads_own_calls:
        readers.append(ToolCallParser())
    return readers


def reads_special_tokens(tokenizer: PreTrainedTokenizerBase, readers: Sequence[Reader]) -> bool:
    """Say whether readers go by special tokens, which must then stay in the text."""
    tags = {CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE}
    return any(isinstance(reader, TemplateReader) for reader in readers) or (
        bool(readers) and not tags.isdisjoint(tokenizer.all_special_tokens)
    )


class Answer:
    """Reads the deltas of one request: what in them is text, reasoning, or part of a tool call.

    Args:
        readers: What finds reasoning and tool calls in the text.
    """

    def __init__(self, readers: Sequence[Reader] = ()) -> None:
        self._readers = readers
        self._has_calls = False

    def push(self, delta: Delta) -> tuple[list[Piece], str | None]:
        """Return the pieces that a delta makes, and why the answer ended, if it did: "stop", "length", "tool_calls"."""
        is_last = delta.finish_reason is not None
        pieces = list(read(self._readers, delta.text, is_last=is_last, is_cut_off=delta.finish_reason == "length"))
        self._has_calls |= any(isinstance(piece, dict) for piece in pieces)
        if delta.is_shortened:
            return pieces, "length"
        return pieces, "tool_calls" if self._has_calls and delta.finish_reason == "stop" else delta.finish_reason


class AnswerStream:
    """Turns the engine's deltas of one request into message chunks.

    Args:
        answer: Reads them.
        tokenizer: The base model's, to spell out log-probabilities.
        metadata: `response_metadata` that does not depend on the answer. It goes into the last chunk only: LangChain
            adds chunks up, and would join two equal strings into one twice as long.
        tells_usage: Whether the last chunk says how many tokens were used.
    """

    def __init__(
        self,
        answer: Answer,
        tokenizer: PreTrainedTokenizerBase,
        metadata: Mapping[str, Any],
        *,
        tells_usage: bool = True,
    ) -> None:
        self._answer = answer
        self._tells_usage = tells_usage
        self._tokenizer = tokenizer
        self._metadata = metadata

    def push(self, delta: Delta) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks that a delta makes; what is known beside a text comes in the text's chunk."""
        pieces, finish_reason = self._answer.push(delta)
        final = pieces[-1] if pieces else None
        text = final if isinstance(final, str) else ""
        for piece in pieces[:-1] if text else pieces:
            yield ChatGenerationChunk(message=_to_message(piece))
        metadata: dict[str, Any] = {}
        if delta.logprobs:
            metadata["logprobs"] = logprobs_content(self._tokenizer, delta.logprobs)
        if finish_reason is not None:
            metadata |= finish_metadata(self._metadata, finish_reason)
        if text or metadata:
            message = AIMessageChunk(
                content=text,
                response_metadata=metadata,
                usage_metadata=usage_metadata(delta.usage) if delta.usage and self._tells_usage else None,
                chunk_position=None if finish_reason is None else "last",
            )
            yield ChatGenerationChunk(message=message)


def _to_message(piece: Piece) -> AIMessageChunk:
    if isinstance(piece, str):
        return AIMessageChunk(content=piece)
    if isinstance(piece, Reasoning):
        return AIMessageChunk(content="", additional_kwargs={"reasoning_content": piece.text})
    return AIMessageChunk(content="", tool_call_chunks=[piece])


def finish_metadata(metadata: Mapping[str, Any], finish_reason: str) -> dict[str, Any]:
    """Return the `response_metadata` of a message that has ended, but for log-probabilities."""
    normalized = _NORMALIZED_FINISH_REASONS[finish_reason]
    return {**metadata, "finish_reason": finish_reason, "normalized_finish_reason": normalized}


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Return LangChain's word for how many tokens were used."""
    return UsageMetadata(
        input_tokens=usage.num_prompt_tokens,
        output_tokens=usage.num_output_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.num_cached_tokens),
    )


def logprobs_content(
    tokenizer: PreTrainedTokenizerBase, logprobs: Sequence[TokenLogprob]
) -> dict[str, list[dict[str, Any]]]:
    """Lay out log-probabilities as chat-completion APIs do: `{"content": [{"token", "logprob", "top_logprobs"}]}`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token_id]), "token_id": token_id, "logprob": logprob}

    return {
        "content": [
            {**entry(item.token_id, item.logprob), "top_logprobs": [entry(*alternative) for alternative in item.top]}
            for item in logprobs
        ]
    }
