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

__all__ = ["AnswerStream", "answer_readers", "reads_special_tokens"]


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


class AnswerStream:
    """Turns the engine's deltas of one request into message chunks.

    Args:
        tokenizer: The base model's, to spell out log-probabilities.
        metadata: `response_metadata` that does not depend on the answer. It goes into the last chunk only: LangChain
            adds chunks up, and would join two equal strings into one twice as long.
        readers: What finds reasoning and tool calls in the text.
        tells_usage: Whether the last chunk says how many tokens were used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        metadata: Mapping[str, Any],
        *,
        readers: Sequence[Reader] = (),
        tells_usage: bool = True,
    ) -> None:
        self._tells_usage = tells_usage
        self._tokenizer = tokenizer
        self._metadata = metadata
        self._readers = readers
        self._has_calls = False

    def push(self, delta: Delta) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks that a delta makes; what is known beside a text comes in the text's chunk."""
        is_last = delta.finish_reason is not None
        pieces = list(read(self._readers, delta.text, is_last=is_last, is_cut_off=delta.finish_reason == "length"))
        self._has_calls |= any(isinstance(piece, dict) for piece in pieces)
        final = pieces[-1] if pieces else None
        text = final if isinstance(final, str) else ""
        for piece in pieces[:-1] if text else pieces:
            yield ChatGenerationChunk(message=_to_message(piece))
        metadata: dict[str, Any] = {}
        if delta.logprobs:
            metadata["logprobs"] = _logprobs_metadata(self._tokenizer, delta.logprobs)
        if is_last:
            metadata |= {**self._metadata, "finish_reason": self._finish_reason(delta)}
        if text or metadata:
            message = AIMessageChunk(
                content=text,
                response_metadata=metadata,
                usage_metadata=_usage_metadata(delta.usage) if delta.usage and self._tells_usage else None,
                chunk_position="last" if is_last else None,
            )
            yield ChatGenerationChunk(message=message)

    def _finish_reason(self, delta: Delta) -> str | None:
        if delta.is_shortened:
            return "length"
        return "tool_calls" if self._has_calls and delta.finish_reason == "stop" else delta.finish_reason


def _to_message(piece: Piece) -> AIMessageChunk:
    if isinstance(piece, str):
        return AIMessageChunk(content=piece)
    if isinstance(piece, Reasoning):
        return AIMessageChunk(content="", additional_kwargs={"reasoning_content": piece.text})
    return AIMessageChunk(content="", tool_call_chunks=[piece])


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.num_prompt_tokens,
        output_tokens=usage.num_output_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.num_cached_tokens),
    )


def _logprobs_metadata(
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
