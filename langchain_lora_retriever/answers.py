"""From the engine's deltas to LangChain messages: text, reasoning, tool calls, usage and metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from langchain_lora_retriever.tools import ToolCallParser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.constraints import GrammarConstraint
    from langchain_lora_retriever.engine import Delta, TokenLogprob, Usage

__all__ = ["AnswerStream", "reasoning_state"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class AnswerStream:
    """Turns the engine's deltas of one request into message chunks.

    Args:
        tokenizer: The base model's, to spell out log-probabilities.
        metadata: `response_metadata` that does not depend on the answer. It goes into the last chunk only: LangChain
            adds chunks up, and would join two equal strings into one twice as long.
        reads_calls: Look for tool calls in the text.
        is_reasoning: True if the answer begins inside a `<think>` block, False if it may open one, None if the
            model knows no such block.
        constraint: What the answer is constrained by, if anything; it knows whether the answer was shortened to fit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        metadata: Mapping[str, Any],
        *,
        reads_calls: bool = False,
        is_reasoning: bool | None = None,
        constraint: GrammarConstraint | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._metadata = metadata
        self._calls = ToolCallParser() if reads_calls else None
        self._reasoning = _ReasoningParser(is_open=is_reasoning) if is_reasoning is not None else None
        self._constraint = constraint
        self._has_calls = False

    def push(self, delta: Delta) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks that a delta makes."""
        is_last = delta.finish_reason is not None
        for message in self._read(delta.text, is_last=is_last):
            yield ChatGenerationChunk(message=message)
        metadata: dict[str, Any] = {}
        if delta.logprobs:
            metadata["logprobs"] = _logprobs_metadata(self._tokenizer, delta.logprobs)
        if is_last:
            metadata |= {**self._metadata, "finish_reason": self._finish_reason(delta)}
        if metadata:
            usage = _usage_metadata(delta.usage) if delta.usage else None
            position: Any = "last" if is_last else None
            message = AIMessageChunk(
                content="", response_metadata=metadata, usage_metadata=usage, chunk_position=position
            )
            yield ChatGenerationChunk(message=message)

    def _finish_reason(self, delta: Delta) -> str | None:
        if self._constraint is not None and self._constraint.is_shortened:
            return "length"
        return "tool_calls" if self._has_calls and delta.finish_reason == "stop" else delta.finish_reason

    def _read(self, text: str, *, is_last: bool) -> Iterator[AIMessageChunk]:
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text, is_last=is_last)
            if thought:
                yield AIMessageChunk(content="", additional_kwargs={"reasoning_content": thought})
        if self._calls is None:
            if text:
                yield AIMessageChunk(content=text)
            return
        pieces = list(self._calls.push(text))
        if is_last:
            pieces += self._calls.finish()
        for piece in pieces:
            if not isinstance(piece, str):
                self._has_calls = True
                yield AIMessageChunk(content="", tool_call_chunks=[piece])
            elif piece:
                yield AIMessageChunk(content=piece)


class _ReasoningParser:
    """Tells an answer's `<think>` block, which stands first if there is one, from the rest."""

    def __init__(self, *, is_open: bool) -> None:
        self._held = ""
        self._is_decided = is_open
        self._is_over = False
        self._is_answered = False

    def push(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """Read more text; return what of it is reasoning and what is answer."""
        thought, answer = ("", text) if self._is_over else self._split(text, is_last=is_last)
        if not self._is_answered:
            answer = answer.lstrip("\n")
            self._is_answered = bool(answer)
        return thought, answer

    def _split(self, text: str, *, is_last: bool) -> tuple[str, str]:
        self._held += text
        if not self._is_decided:
            start = self._held.lstrip()
            if start.startswith(THINK_OPEN):
                self._held, self._is_decided = start[len(THINK_OPEN) :].lstrip("\n"), True
            elif is_last or not THINK_OPEN.startswith(start):
                self._is_over = True
                return "", self._take(len(self._held))
            else:
                return "", ""
        thought, tag, answer = self._held.partition(THINK_CLOSE)
        if tag:
            self._is_over = True
            return thought.rstrip("\n"), answer
        keep = 0 if is_last else _num_undecided(self._held)
        return self._take(len(self._held) - keep), ""

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


def reasoning_state(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> bool | None:
    """Say whether an answer begins inside a `<think>` block; None if the chat template knows no such block."""
    if THINK_CLOSE not in repr(getattr(tokenizer, "chat_template", None)):
        return None
    end = str(tokenizer.decode(list(prompt_token_ids[-8:])))
    return end.rstrip().endswith(THINK_OPEN)


def _num_undecided(text: str) -> int:
    lengths = range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1)
    length = next((length for length in lengths if THINK_CLOSE.startswith(text[-length:])), 0)
    return len(text) - len(text[: len(text) - length].rstrip("\n"))


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
