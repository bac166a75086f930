"""Reasoning between `<think>` tags, which stands before the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.output.readers import Reasoning, num_undecided

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.output.readers import Piece

__all__ = ["THINK_CLOSE", "THINK_OPEN", "ThinkReader", "reasoning_state"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def reasoning_state(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> bool | None:
    """Say whether an answer begins inside a `<think>` block; None if the chat template knows no such block."""
    if THINK_CLOSE not in repr(getattr(tokenizer, "chat_template", None)):
        return None
    end = str(tokenizer.decode(list(prompt_token_ids[-8:])))
    return end.rstrip().endswith(THINK_OPEN)


class ThinkReader:
    """Tells an answer's `<think>` block, which stands first if there is one, from the rest.

    Args:
        is_open: The prompt has opened the block; else the answer may.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._held = ""
        self._is_decided = is_open
        self._is_over = False
        self._is_answered = False

    def push(self, text: str) -> Iterator[Piece]:
        """Read more text; yield what of it is reasoning and what is answer."""
        return self._read(text, is_last=False)

    def finish(self, *, is_cut_off: bool) -> Iterator[Piece]:  # noqa: ARG002 - half a thought is a thought
        """Yield what was held back."""
        return self._read("", is_last=True)

    def _read(self, text: str, *, is_last: bool) -> Iterator[Piece]:
        thought, answer = ("", text) if self._is_over else self._split(text, is_last=is_last)
        if thought:
            yield Reasoning(thought)
        if not self._is_answered:
            answer = answer.lstrip("\n")
            self._is_answered = bool(answer)
        if answer:
            yield answer

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
        keep = 0 if is_last else num_undecided(self._held, THINK_CLOSE, "\n")
        return self._take(len(self._held) - keep), ""

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken
